"""The comparison finds every kind of difference: a check that cannot fail is worthless."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from chaos.campaign import Result
from chaos.compare import Facts, Verdict, gather, judge, rows_along
from chaos.disturbed import Tally
from chaos.light import chunk_rows
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.joined import JoinedDataset
from penstock.store.local import LocalStore
from penstock.store.objects import open_store
from penstock.store.writer import DatasetWriter
from penstock.trainer.config import RunConfig, submit_run
from penstock.trainer.lineage import take_over
from services.runs import run_settings
from services.synthetic import SyntheticSource, index_dataset, make_manifest, write_dataset

MANIFEST = make_manifest([chunk_rows(index) for index in range(8)])
WINDOWS = range(6)
"""Two epochs of three windows: 3, 3 and 2 chunks."""


def train(
    directory: Path, windows: Iterable[int] = WINDOWS, weight: bytes = b"weight", excess: int = 0
) -> RunConfig:
    """A run with the given windows in its history; nothing is computed."""
    dataset = open_dataset(str(directory / "dataset"))
    runs = LocalStore(str(directory / "runs"))
    config, _ = submit_run(runs, JoinedDataset([dataset]), run_settings(epochs=2))
    lineage = take_over(runs, config.run_id, {})
    assert lineage is not None
    windows, rows = list(windows), excess
    for place, number in enumerate(windows):
        rows += config.window_rows(number)
        window = config.order.window(number)
        last = place == len(windows) - 1
        lineage.commit(
            position=window.stop,
            step=place + 1,
            rows=rows,
            checkpoint={"sae/topk": weight if last else b"%d" % place, "optimizer/topk": b"moments"},
            history=[{"position": window.stop, "rows": rows}],
            metrics={},
            status="done" if last else "running",
        )
    return config


def experiment(directory: Path) -> Path:
    write_dataset(directory / "dataset", MANIFEST, indexed=True)
    return directory


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    directory = experiment(tmp_path_factory.mktemp("reference"))
    train(directory)
    return facts(directory)


def facts(directory: Path) -> Facts:
    return gather(str(directory / "dataset"), str(directory / "runs"))


def verdict(reference: Facts, directory: Path) -> Verdict:
    return judge(reference, str(directory / "dataset"), str(directory / "runs"))


def test_an_equal_experiment_is_clean(reference: Facts, tmp_path: Path) -> None:
    train(experiment(tmp_path))
    assert verdict(reference, tmp_path) == Verdict()
    assert len(reference.weights) == 2
    assert sum("/c/" in key for key in reference.dataset) == 8 * 5
    assert sum(key.startswith("commits/") for key in reference.dataset) == 8
    assert verdict(reference, tmp_path).clean


def test_another_weight_is_found(reference: Facts, tmp_path: Path) -> None:
    config = train(experiment(tmp_path), weight=b"Weight")
    found = verdict(reference, tmp_path)
    assert found == Verdict(weights=[f"{config.run_id}/sae/topk differs"])
    assert not found.clean


def test_a_damaged_weight_is_found(reference: Facts, tmp_path: Path) -> None:
    train(experiment(tmp_path))
    files = (tmp_path / "runs").rglob("sae/topk.safetensors")
    max(files, key=lambda file: int(file.parts[-3].split("-")[0])).write_bytes(b"weighT")
    found = verdict(reference, tmp_path)
    assert any("is damaged" in line for line in found.weights)
    assert any("is damaged" in line for line in found.faults)


def test_a_missing_run_is_found(reference: Facts, tmp_path: Path) -> None:
    experiment(tmp_path)
    assert [line.split()[-1] for line in verdict(reference, tmp_path).weights] == ["missing", "missing"]


@pytest.mark.parametrize("left_out", WINDOWS)
def test_a_missing_window_is_found(reference: Facts, tmp_path: Path, left_out: int) -> None:
    config = train(experiment(tmp_path), [number for number in WINDOWS if number != left_out])
    found = verdict(reference, tmp_path)
    assert (found.rows_lost, found.rows_repeated) == (config.window_rows(left_out), 0)
    assert not found.clean


@pytest.mark.parametrize("twice", WINDOWS)
def test_a_repeated_window_is_found(reference: Facts, tmp_path: Path, twice: int) -> None:
    config = train(experiment(tmp_path), sorted([*WINDOWS, twice]))
    found = verdict(reference, tmp_path)
    assert (found.rows_lost, found.rows_repeated) == (0, config.window_rows(twice))
    assert not found.clean


@pytest.mark.parametrize(("excess", "wanted"), [(5, (0, 5)), (-5, (5, 0))])
def test_a_window_with_other_rows_than_planned_is_found(
    reference: Facts, tmp_path: Path, excess: int, wanted: tuple[int, int]
) -> None:
    train(experiment(tmp_path), excess=excess)
    found = verdict(reference, tmp_path)
    assert (found.rows_lost, found.rows_repeated) == wanted


def test_no_window_hides_another(tmp_path: Path) -> None:
    """One lost and one repeated do not cancel out, and what ends inside a window is no window."""
    config = train(experiment(tmp_path))
    first, second = config.window_rows(0), config.window_rows(1)
    rows = np.cumsum([first, first, *(config.window_rows(number) for number in range(2, 6))])
    points = [{"position": stop, "rows": int(r)} for stop, r in zip([3, 3, 8, 11, 14, 16], rows, strict=True)]
    assert rows_along(config, points) == (second, first)
    assert rows_along(config, [{"position": 2, "rows": 70}])[1] == 70
    assert rows_along(config, []) == (config.total_rows(), 0)


def chunk_file(directory: Path) -> Path:
    (file,) = (directory / "dataset" / "activations.zarr").glob("acts/*mlp*/c/4/0")
    return file


def test_a_changed_chunk_byte_is_found(reference: Facts, tmp_path: Path) -> None:
    train(experiment(tmp_path))
    data = bytearray(chunk_file(tmp_path).read_bytes())
    data[100] ^= 1
    chunk_file(tmp_path).write_bytes(bytes(data))
    found = verdict(reference, tmp_path)
    assert [line.split("/")[-2:] for line in found.dataset] == [["4", "0 differs"]]
    assert len(found.faults) == 1


def test_a_wrong_chunk_with_a_right_commit_is_found(reference: Facts, tmp_path: Path) -> None:
    """Whole by its own checksums, so that only the comparison can tell."""
    writer = DatasetWriter(open_store(str(tmp_path / "dataset")), MANIFEST)
    source = SyntheticSource(MANIFEST)
    for index in range(MANIFEST.n_chunks):
        chunk = source.chunk(index)
        if index == 4:
            chunk.tokens[0] += 1
        writer.write(index, chunk)
    index_dataset(writer)
    writer.close()
    train(tmp_path)
    found = verdict(reference, tmp_path)
    differing = ["activations.zarr/tokens/c/4", "commits/0/4.json", "index/0.safetensors"]
    assert found.dataset == [f"{key} differs" for key in differing]
    assert not found.faults


def test_an_extra_and_a_missing_object_are_found(reference: Facts, tmp_path: Path) -> None:
    train(experiment(tmp_path))
    chunk_file(tmp_path).rename(chunk_file(tmp_path).with_name("1"))
    assert [line.split(" is ")[1] for line in verdict(reference, tmp_path).dataset] == ["missing", "extra"]


def test_who_made_a_chunk_makes_no_difference(reference: Facts, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "dataset"))
    writer = DatasetWriter(store, MANIFEST)
    for index in range(MANIFEST.n_chunks):
        writer.write(index, SyntheticSource(MANIFEST).chunk(index), f"producer-{index}")
    index_dataset(writer)
    writer.close()
    train(tmp_path)
    assert sum(1 for _ in store.list("provenance/")) == 16
    assert Dataset(store, MANIFEST).committed() == set(range(8))
    assert verdict(reference, tmp_path).clean


def test_a_gap_and_a_fork_among_the_heads_are_found(reference: Facts, tmp_path: Path) -> None:
    config = train(experiment(tmp_path))
    heads = tmp_path / "runs" / config.run_id / "heads"
    for kind in ("json", "copy"):
        (heads / f"3.{kind}").unlink()
    found = verdict(reference, tmp_path)
    assert any("heads/3.json is missing" in line for line in found.faults)
    assert any("3" in line and line.startswith("run run-") for line in found.faults)


def test_a_head_that_passes_one_over_is_found(reference: Facts, tmp_path: Path) -> None:
    """A fallback is right after damage, but nothing was damaged here."""
    config = train(experiment(tmp_path), [0, 1, 2, 3, 4])
    runs = LocalStore(str(tmp_path / "runs"))
    newest = tmp_path / "runs" / config.run_id
    heads = sorted(newest.glob("heads/*"), key=lambda file: int(file.stem))
    for file in heads[-2:]:  # it was done: let it go on
        file.unlink()
    for file in newest.glob("checkpoints/4-*/sae/*"):
        file.write_bytes(b"damaged")
    assert take_over(runs, config.run_id, {}) is not None
    faults = verdict(reference, tmp_path).faults
    assert any("head 5 continues head 0: fell back from head" in line for line in faults), faults


def test_a_run_that_is_not_done_is_found(reference: Facts, tmp_path: Path) -> None:
    dataset = open_dataset(str(experiment(tmp_path) / "dataset"))
    runs = LocalStore(str(tmp_path / "runs"))
    config, _ = submit_run(runs, JoinedDataset([dataset]), run_settings(epochs=2))
    assert take_over(runs, config.run_id, {}) is not None
    found = verdict(reference, tmp_path)
    assert f"run {config.run_id}: it is running: None" in found.faults
    assert found.rows_lost == config.total_rows()


def test_the_last_line() -> None:
    tallies = [Tally(kills=150, fenced=1), Tally(kills=50, fenced=2, restarts=1)]
    result = Result([Verdict(takeovers=4), Verdict()], tallies)
    wanted = "kills=200 dataset=identical weights=identical rows_lost=0 rows_repeated=0 fenced=3 takeovers=4"
    assert result.line().startswith(wanted)
    assert result.ok


@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        (Verdict(dataset=["a differs"]), "dataset=different"),
        (Verdict(weights=["a differs"]), "weights=different"),
        (Verdict(rows_lost=3), "rows_lost=3"),
        (Verdict(rows_repeated=3), "rows_repeated=3"),
        (Verdict(faults=["a hole"]), "faults=1"),
    ],
)
def test_one_bad_round_spoils_everything(verdict: Verdict, word: str) -> None:
    result = Result([Verdict(), verdict, Verdict()], [Tally(), Tally(), Tally()])
    assert word in result.line().split()
    assert not result.ok


def test_what_does_not_end_or_leaves_something_behind_is_no_success() -> None:
    assert not Result([Verdict()], [Tally(left_behind=["process 1 still runs"])]).ok
    assert not Result([], [Tally()], failed=["stuck"]).ok
    assert "weights=different" in Result([], [Tally()], failed=["stuck"]).line()
    assert not Result().ok
