"""Run configs: an id that stands for everything, arithmetic known before a row is read, refusals."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import ConfigError, DamagedObject, ObjectMissing, UserError
from penstock.common.settings import parse
from penstock.store import joined
from penstock.store.dataset import Dataset
from penstock.store.joined import JoinedDataset
from penstock.store.objects import ObjectStore, open_store
from penstock.trainer.config import (
    RunSettings,
    load_run_config,
    resolve_run,
    run_ids,
    submit_run,
)
from services.runs import run_settings, standard, topk
from services.synthetic import MLP, RESID, ROWS, WIDTHS, make_manifest, write_dataset
from services.trees import tree_digests


@pytest.fixture
def runs(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "runs"))


def alone(dataset: Dataset) -> JoinedDataset:
    return JoinedDataset([dataset])


class TestRunId:
    def test_it_does_not_depend_on_where_the_dataset_lies(self, dataset: Dataset, tmp_path: Path) -> None:
        copy = write_dataset(tmp_path / "copy", indices=[])
        one, two = resolve_run(run_settings(), alone(dataset)), resolve_run(run_settings(), alone(copy))
        assert one.run_id == two.run_id
        assert one.run_id.startswith("run-")
        assert one.dataset_urls != two.dataset_urls

    def test_it_does_not_depend_on_how_settings_are_written(self, dataset: Dataset) -> None:
        backwards = dict(reversed(run_settings().model_dump(mode="json").items()))
        again = parse(RunSettings, backwards, "test")
        assert resolve_run(again, alone(dataset)).run_id == resolve_run(run_settings(), alone(dataset)).run_id

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "other"},
            {"batch_rows": 65},
            {"window_chunks": 4},
            {"epochs": 2},
            {"head_interval": 3},
            {"seed": 1},
            {"strict": False},
            {"saes": [topk()]},
            {"saes": [standard(), topk()]},
            {"saes": [topk(lr=1e-4), standard()]},
        ],
        ids=str,
    )
    def test_every_setting_counts(self, dataset: Dataset, change: dict[str, Any]) -> None:
        assert (
            resolve_run(run_settings(**change), alone(dataset)).run_id
            != resolve_run(run_settings(), alone(dataset)).run_id
        )

    def test_the_dataset_counts(self, dataset: Dataset, tmp_path: Path) -> None:
        manifest = make_manifest().model_copy(update={"seed": 4})
        other = write_dataset(tmp_path / "other", manifest, indices=[])
        assert (
            resolve_run(run_settings(), alone(other)).run_id
            != resolve_run(run_settings(), alone(dataset)).run_id
        )


class TestDefaultWindow:
    """Nobody chose window_chunks: as many as fill a gibibyte of the run's hook points."""

    def settings(self, *saes: dict[str, Any]) -> RunSettings:
        told = run_settings(saes=list(saes)).model_dump(mode="json", exclude={"window_chunks"})
        return parse(RunSettings, told, "test")

    @pytest.mark.parametrize("chunks", [1, 3, len(ROWS)])
    def test_it_follows_the_hooks_that_are_read(
        self, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, chunks: int
    ) -> None:
        per_chunk = sum(ROWS) * 2 * WIDTHS[RESID] / len(ROWS)
        monkeypatch.setattr(joined, "WINDOW_BYTES", math.ceil(chunks * per_chunk))
        # two SAEs at one hook point read it once
        config = resolve_run(self.settings(topk(), topk(name="other")), alone(dataset))
        assert config.settings.window_chunks == config.order.window_chunks == chunks
        both = resolve_run(self.settings(topk(), standard()), alone(dataset))
        share = WIDTHS[RESID] / (WIDTHS[RESID] + WIDTHS[MLP])
        assert both.settings.window_chunks == max(1, int(chunks * share + 1e-9))

    def test_small_datasets_are_one_window_and_windows_hold_a_chunk_at_least(
        self, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert resolve_run(self.settings(topk()), alone(dataset)).order.n_windows == 1
        monkeypatch.setattr(joined, "WINDOW_BYTES", 1)
        assert resolve_run(self.settings(topk()), alone(dataset)).order.n_windows == len(ROWS)

    def test_it_is_written_down(
        self, dataset: Dataset, runs: ObjectStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config, _ = submit_run(runs, alone(dataset), self.settings(topk()))
        monkeypatch.setattr(joined, "WINDOW_BYTES", 1)
        assert load_run_config(runs, config.run_id).order == config.order
        chosen = run_settings(saes=[topk()], window_chunks=config.order.window_chunks)
        assert resolve_run(chosen, alone(dataset)).run_id == config.run_id


class TestArithmetic:
    @pytest.mark.parametrize("epochs", [1, 3])
    @pytest.mark.parametrize("window_chunks", [1, 3, 16, 50])
    @pytest.mark.parametrize("batch_rows", [1, 64, 197, 4096])
    def test_steps_and_rows_are_what_a_run_will_make(
        self, dataset: Dataset, epochs: int, window_chunks: int, batch_rows: int
    ) -> None:
        config = resolve_run(
            run_settings(epochs=epochs, window_chunks=window_chunks, batch_rows=batch_rows), alone(dataset)
        )
        steps, seen = 0, Counter[int]()
        for epoch in range(epochs):
            order = [config.order.chunk_at(epoch * len(ROWS) + i) for i in range(len(ROWS))]
            seen.update(order)
            for start in range(0, len(ROWS), window_chunks):
                rows = sum(ROWS[chunk] for chunk in order[start : start + window_chunks])
                steps += -(-rows // batch_rows)
        assert seen == dict.fromkeys(range(len(ROWS)), epochs)
        assert config.total_steps() == steps
        assert config.total_rows() == sum(ROWS) * epochs
        assert sum(config.window_rows(i) for i in range(config.order.n_windows)) == sum(ROWS) * epochs

    def test_each_hook_is_read_once(self, dataset: Dataset) -> None:
        saes = [topk(name="a"), standard(name="b"), topk(name="c"), standard(name="d")]
        config = resolve_run(run_settings(saes=saes), alone(dataset))
        assert config.hooks == [RESID, MLP]
        assert config.widths == WIDTHS


class TestRefusals:
    def test_k_larger_than_the_dictionary(self, dataset: Dataset) -> None:
        with pytest.raises(ConfigError, match="topk: k is 25, more than its d_sae of 24"):
            resolve_run(run_settings(saes=[topk(d_sae=24, k=25)]), alone(dataset))
        assert resolve_run(run_settings(saes=[topk(d_sae=24, k=24)]), alone(dataset))

    def test_a_hook_that_the_dataset_lacks(self, dataset: Dataset) -> None:
        with pytest.raises(UserError, match=r"hook 'blocks\.9\.hook_out' is not in this dataset.*resid_post"):
            resolve_run(run_settings(saes=[topk(hook_name="blocks.9.hook_out")]), alone(dataset))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"saes": [topk(), standard(name="topk")]}, "saes: the name 'topk' is used twice"),
            ({"saes": []}, "saes"),
            ({"saes": [topk(architecture="topkk")]}, "saes.0"),
            ({"saes": [topk(l1_coefficient=1.0)]}, "l1_coefficient"),
            ({"saes": [topk(k=0)]}, "k: "),
            ({"saes": [topk(name="a/b")]}, "name: "),
            ({"name": "../up"}, "name: "),
            ({"batch_rows": 0}, "batch_rows: "),
            ({"batch_row": 64}, "batch_row: unknown setting. Did you mean batch_rows"),
            ({"epochs": "two"}, "epochs: "),
        ],
        ids=str,
    )
    def test_settings(self, change: dict[str, Any], message: str) -> None:
        data = run_settings().model_dump(mode="json") | change
        with pytest.raises(ConfigError) as caught:
            parse(RunSettings, data, "runs.0")
        assert str(caught.value).startswith("runs.0: ")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


class TestSubmit:
    def test_twice_is_once(self, dataset: Dataset, runs: ObjectStore) -> None:
        config, new = submit_run(runs, alone(dataset), run_settings())
        before = tree_digests(Path(runs.url)) | tree_digests(Path(dataset.url))
        again, new_again = submit_run(runs, alone(dataset), run_settings())
        assert (new, new_again) == (True, False)
        assert again == config == load_run_config(runs, config.run_id)
        assert tree_digests(Path(runs.url)) | tree_digests(Path(dataset.url)) == before
        assert run_ids(runs) == [config.run_id]

    def test_it_registers_the_run_as_a_reader_first(
        self, dataset: Dataset, runs: ObjectStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_id = resolve_run(run_settings(name="reader"), alone(dataset)).run_id

        def killed(key: str, record: object) -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(runs, "create_guarded", killed)
        with pytest.raises(KeyboardInterrupt):
            submit_run(runs, alone(dataset), run_settings(name="reader"))
        record = dataset.store.get_record(f"readers/{run_id}.json")
        assert (record["run"], record["start"]) == (run_id, 0)
        assert run_ids(runs) == []

    def test_a_config_that_is_missing_or_damaged(self, dataset: Dataset, runs: ObjectStore) -> None:
        with pytest.raises(ObjectMissing):
            load_run_config(runs, "none")
        config, _ = submit_run(runs, alone(dataset), run_settings())
        key = f"{config.run_id}/config.json"
        runs.put(key, runs.get(key).replace(b'"seed":0', b'"seed":1'))
        with pytest.raises(DamagedObject, match=r"config\.json"):
            load_run_config(runs, config.run_id)
