"""Whole runs, from submit to the last head: whatever happens on the way, the weights are the same."""

import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from penstock.common import metrics
from penstock.common.embedded import EmbeddedServer
from penstock.common.errors import ConfigError, DamagedObject, Fenced, ObjectMissing, UserError
from penstock.common.permutation import permutation
from penstock.common.redis import Client
from penstock.store.dataset import Dataset, DatasetWriter
from penstock.store.objects import open_store
from penstock.trainer import mending
from penstock.trainer.config import RunConfig
from penstock.trainer.group import Group
from penstock.trainer.lineage import Lineage, load_checkpoint, load_history, take_over
from penstock.trainer.load import load_sae
from penstock.trainer.observer import RunObserver
from services.command import COMMAND
from services.producing import CountingSource, Producer
from services.runs import Bench, digests, run_settings, standard, topk
from services.synthetic import (
    CHUNKS,
    MLP,
    RESID,
    ROWS,
    SyntheticSource,
    make_manifest,
    write_dataset,
)
from services.valkey import fresh_prefix
from services.waiting import eventually

WINDOWS = 6


class Killed(BaseException):
    """Ends a worker in the middle of what it is doing."""


class Batches:
    """Spies on training: the bytes of every row of every step, by run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, dict[int, dict[str, list[bytes]]]] = {}
        self.redone = 0
        train_step = Group.train_step

        def spying(group: Group, batch: dict[str, torch.Tensor]) -> None:
            steps = self.rows.setdefault(group.config.run_id, {})
            rows = {hook: as_bytes(acts.view(torch.int16).numpy()) for hook, acts in batch.items()}
            if group.step in steps:
                self.redone += 1
                assert steps[group.step] == rows, "a step was redone with other rows"
            steps[group.step] = rows
            train_step(group, batch)

        monkeypatch.setattr(Group, "train_step", spying)

    def trained(self, config: RunConfig, hook: str) -> list[bytes]:
        """Rows in the order they were trained on."""
        steps = self.rows[config.run_id]
        assert sorted(steps) == list(range(config.total_steps()))
        return [row for step in sorted(steps) for row in steps[step][hook]]


def as_bytes(rows: "np.ndarray[Any, np.dtype[Any]]") -> list[bytes]:
    return [row.tobytes() for row in rows]


def stored_rows(dataset: Dataset, hook: str) -> Counter[bytes]:
    return Counter(
        row
        for index in range(CHUNKS)
        for row in as_bytes(dataset.read_chunk(index, [hook]).acts[hook].view(np.int16))
    )


def sample(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture(scope="module")
def reference(
    client: Client, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, str]]:
    """Weights and optimizer states of undisturbed runs, by their settings."""
    known: dict[str, dict[str, str]] = {}

    def digests_of(**changes: Any) -> dict[str, str]:
        key = run_settings(**changes).model_dump_json()
        if key not in known:
            directory = tmp_path_factory.mktemp("reference")
            bench = Bench(open_store(str(directory)), client, fresh_prefix())
            config = bench.submit(dataset, **changes)
            bench.work()
            head = bench.head(config)
            assert head.status == "done"
            known[key] = digests(head)
        return known[key]

    return digests_of


class TestUndisturbed:
    @pytest.mark.parametrize("epochs", [1, 2])
    def test_every_row_is_trained_on_once_per_epoch(
        self, bench: Bench, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, epochs: int
    ) -> None:
        batches = Batches(monkeypatch)
        config = bench.submit(dataset, epochs=epochs)
        bench.work()
        orders = {}
        for hook in (RESID, MLP):
            trained = batches.trained(config, hook)
            for epoch in range(epochs):
                part = trained[epoch * sum(ROWS) : (epoch + 1) * sum(ROWS)]
                assert Counter(part) == stored_rows(dataset, hook)
                orders[hook, epoch] = part
        assert len(set(map(tuple, orders.values()))) == 2 * epochs
        assert batches.redone == 0

    def test_every_hook_gets_the_same_rows(
        self, bench: Bench, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batches = Batches(monkeypatch)
        config = bench.submit(dataset)
        bench.work()
        partner: dict[bytes, bytes] = {}
        for index in range(CHUNKS):
            chunk = dataset.read_chunk(index)
            pairs = (as_bytes(chunk.acts[hook].view(np.int16)) for hook in (MLP, RESID))
            partner |= dict(zip(*pairs, strict=True))
        trained = zip(batches.trained(config, MLP), batches.trained(config, RESID), strict=True)
        assert all(partner[mlp] == resid for mlp, resid in trained)

    def test_windows_are_mixed(self, bench: Bench, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        batches = Batches(monkeypatch)
        config = bench.submit(dataset)
        bench.work()
        chunk_of = {
            row: index
            for index in range(CHUNKS)
            for row in as_bytes(dataset.read_chunk(index, [MLP]).acts[MLP].view(np.int16))
        }
        for step, rows in batches.rows[config.run_id].items():
            chunks = {chunk_of[row] for row in rows[MLP]}
            window = min(chunks) // 3
            assert chunks <= set(range(3 * window, min(CHUNKS, 3 * window + 3))), step
            assert len(chunks) == (3 if window < 5 else 1)

    def test_the_order_is_that_of_the_protocol(
        self, bench: Bench, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batches = Batches(monkeypatch)
        config = bench.submit(dataset, epochs=2, seed=9)
        bench.work()
        chunks = [as_bytes(dataset.read_chunk(i, [MLP]).acts[MLP].view(np.int16)) for i in range(CHUNKS)]
        epochs = [list(range(CHUNKS)), permutation(CHUNKS, 9, "epoch", 1).tolist()]
        expected = []
        for number in range(2 * WINDOWS):
            first = 3 * (number % WINDOWS)
            rows = [row for i in epochs[number // WINDOWS][first : first + 3] for row in chunks[i]]
            expected += [rows[i] for i in permutation(len(rows), 9, "window", number)]
        assert batches.trained(config, MLP) == expected

    def test_the_last_head_says_what_was_done(self, bench: Bench, dataset: Dataset) -> None:
        config = bench.submit(dataset)
        bench.work()
        heads = bench.heads(config)
        assert [head.n for head in heads] == list(range(4))
        assert [head.kind for head in heads] == ["takeover", "progress", "progress", "progress"]
        assert [head.position for head in heads] == [0, 6, 12, 16]
        last = heads[-1]
        assert (last.status, last.step, last.rows) == ("done", config.total_steps(), sum(ROWS))
        assert last.environment["strict"] is True
        assert last.environment["threads"] == 1
        assert set(last.checkpoint) == {
            f"{kind}/{sae}" for kind in ("sae", "optimizer") for sae in ("topk", "l1")
        }
        history = load_history(bench.runs, config.run_id, last)
        assert [point["position"] for point in history] == [3, 6, 9, 12, 15, 16]
        assert history[-1]["saes"] == last.metrics
        assert history[-1]["rows"] == last.rows
        losses = [point["saes"]["l1"]["loss"] for point in history]
        assert losses[-1] < losses[0]

    def test_gauges_show_what_the_last_head_says(self, bench: Bench, dataset: Dataset) -> None:
        config = bench.submit(dataset, name="gauges")
        run = config.run_id
        bench.work()
        head = bench.head(config)
        for sae, figures in head.metrics.items():
            assert figures["l0"] > 0
            assert sample("sae_l0", run=run, sae=sae) == figures["l0"]
            assert sample("sae_dead_features", run=run, sae=sae) == figures["dead_features"]
            assert sample("sae_explained_variance", run=run, sae=sae) == figures["explained_variance"]
            assert sample("sae_loss", run=run, sae=sae, component="total") == figures["loss"]
            assert sample("sae_loss", run=run, sae=sae, component="mse") == figures["mse"]
            assert sample("sae_dead_window_rows", run=run, sae=sae) == (150 if sae == "topk" else 500)
        assert sample("sae_train_rows_total", run=run) == head.rows
        assert sample("sae_steps_total", run=run) == head.step
        assert "aux" in head.metrics["topk"], "no feature was dead: AuxK was never tried"

    def test_the_same_run_anywhere_gives_the_same_bits(
        self, bench: Bench, dataset: Dataset, reference: Callable[..., dict[str, str]]
    ) -> None:
        config = bench.submit(dataset)
        bench.work()
        assert digests(bench.head(config)) == reference()
        other = bench.submit(dataset, seed=1)
        bench.work()
        assert digests(bench.head(other)) != reference()

    def test_nothing_of_it_stays_in_redis(self, bench: Bench, dataset: Dataset) -> None:
        bench.submit(dataset)
        bench.work()
        assert list(bench.client.scan_iter(f"{bench.redis.prefix}:*")) == []


class TestStreaming:
    @pytest.mark.parametrize("epochs", [1, 2])
    def test_training_while_producing_and_replaying_give_the_same_bits(
        self, bench: Bench, tmp_path: Path, reference: Callable[..., dict[str, str]], epochs: int
    ) -> None:
        dataset = write_dataset(tmp_path / "dataset", indices=[])
        config = bench.submit(dataset, epochs=epochs)
        positions: list[int] = []

        def commit() -> None:
            writer = DatasetWriter(dataset.store, dataset.manifest)
            source = SyntheticSource(dataset.manifest)
            for index in [1, 0, 2, 5, 4, 3, *range(6, CHUNKS)]:
                writer.write(index, source.chunk(index))
                positions.append(bench.position(config))
                time.sleep(0.05)
            writer.close()

        committing = threading.Thread(target=commit, daemon=True)
        committing.start()
        bench.work()
        committing.join()
        assert max(positions) >= 6, "training did not overlap with producing: the test is void"
        assert digests(bench.head(config)) == reference(epochs=epochs)

    def test_with_a_producer_that_announces(
        self, bench: Bench, tmp_path: Path, reference: Callable[..., dict[str, str]]
    ) -> None:
        dataset = write_dataset(tmp_path / "dataset", indices=[])
        config = bench.submit(dataset)
        source = CountingSource(dataset.manifest, seconds=0.02)
        producer = Producer(bench.client, bench.redis.prefix, dataset.url, "producer", source)
        producing = producer.start()
        bench.work()
        producing.join()
        assert digests(bench.head(config)) == reference()


@contextmanager
def interrupted(how: str, after: int, stop: threading.Event) -> Iterator[None]:
    """For one worker's life: something happens to it after a number of steps or head creations."""
    left = after
    with pytest.MonkeyPatch.context() as patch:
        stepped, create, put = RunObserver.stepped, Lineage._create, Lineage._store_history

        def count_step(observer: RunObserver, group: Group, seconds: float) -> None:
            nonlocal left
            stepped(observer, group, seconds)
            left -= 1
            if left == 0:
                if how == "stop":
                    stop.set()
                else:
                    raise Killed

        def count_create(lineage: Lineage, head: Any) -> None:
            nonlocal left
            left -= 1
            if left <= 0 and how == "killed before a head":
                raise Killed
            create(lineage, head)
            if left <= 0:
                raise Killed

        def count_history(lineage: Lineage, *arguments: Any) -> str | None:
            nonlocal left
            left -= 1
            if left <= 0:
                raise Killed
            return put(lineage, *arguments)

        if how in ("stop", "killed in a step"):
            patch.setattr(RunObserver, "stepped", count_step)
        elif how == "killed while storing":
            patch.setattr(Lineage, "_store_history", count_history)
        else:
            patch.setattr(Lineage, "_create", count_create)
        yield


@contextmanager
def working(bench: Bench) -> Iterator[threading.Event]:
    """A worker in a thread, asked to stop at the end of the block at the latest."""
    stop = threading.Event()
    worker = threading.Thread(target=bench.work, args=(stop,), daemon=True)
    worker.start()
    try:
        yield stop
    finally:
        stop.set()
        worker.join()


class TestDisturbed:
    @pytest.mark.parametrize(
        ("how", "most"),
        [
            ("stop", 40),
            ("killed in a step", 40),
            ("killed while storing", 2),
            ("killed before a head", 3),
            ("killed after a head", 3),
        ],
    )
    def test_workers_that_come_and_go_change_nothing(
        self,
        bench: Bench,
        dataset: Dataset,
        reference: Callable[..., dict[str, str]],
        monkeypatch: pytest.MonkeyPatch,
        how: str,
        most: int,
    ) -> None:
        batches = Batches(monkeypatch)
        config = bench.submit(dataset, epochs=2)
        chance = random.Random(how)
        workers = 0
        while not bench.ended(config):
            workers += 1
            assert workers < 60, "no progress"
            stop = threading.Event()
            with suppress(Killed), interrupted(how, chance.randint(1, most), stop):
                bench.work(stop)
        assert workers >= 4
        assert digests(bench.head(config)) == reference(epochs=2)
        for hook in (RESID, MLP):
            trained = batches.trained(config, hook)
            assert (
                Counter(trained[: sum(ROWS)]) == Counter(trained[sum(ROWS) :]) == stored_rows(dataset, hook)
            )
        assert sorted(int(Path(key).stem) for key in bench.all_heads(config)) == list(
            range(bench.head(config).n + 1)
        )
        history = load_history(bench.runs, config.run_id, bench.head(config))
        steps = [point["step"] for point in history]
        assert len(steps) == 2 * WINDOWS
        assert steps == sorted(set(steps))

    def test_redis_that_forgets_everything_changes_nothing(
        self,
        bench: Bench,
        tmp_path: Path,
        reference: Callable[..., dict[str, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        dataset = write_dataset(tmp_path / "dataset", indices=range(8))
        config = bench.submit(dataset)
        ended = RunObserver.window_ended

        def forget(observer: RunObserver, group: Group, seconds: float) -> None:
            ended(observer, group, seconds)
            for key in list(bench.client.scan_iter(f"{bench.redis.prefix}:*")):
                bench.client.delete(key)
            if group.position == 6:
                write_dataset(tmp_path / "dataset", indices=range(8, CHUNKS))

        monkeypatch.setattr(RunObserver, "window_ended", forget)
        bench.work()
        assert digests(bench.head(config)) == reference()
        assert len(bench.heads(config)) == 4, "nobody took the run over"

    def test_a_replaced_worker_stops_and_what_it_did_is_discarded(
        self,
        bench: Bench,
        dataset: Dataset,
        reference: Callable[..., dict[str, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        config = bench.submit(dataset)
        ended = RunObserver.window_ended
        replaced: list[int] = []

        def freeze(observer: RunObserver, group: Group, seconds: float) -> None:
            ended(observer, group, seconds)
            if group.position == 9 and not replaced:
                lineage = take_over(bench.runs, config.run_id, bench.head(config).environment)
                assert lineage is not None
                replaced.append(lineage.head.n)

        monkeypatch.setattr(RunObserver, "window_ended", freeze)
        fenced, takeovers = sample("sae_fenced_total"), sample("sae_takeovers_total")
        bench.work()
        assert sample("sae_fenced_total") == fenced + 1
        assert sample("sae_takeovers_total") == takeovers + 1
        heads = bench.heads(config)
        assert replaced == [2]
        assert [(h.n, h.kind, h.position) for h in heads] == [
            (0, "takeover", 0),
            (1, "progress", 6),
            (2, "takeover", 6),
            (3, "takeover", 6),
            (4, "progress", 12),
            (5, "progress", 16),
        ]
        assert digests(heads[-1]) == reference()

    def test_two_workers_at_once_share_one_lineage(
        self, bench: Bench, dataset: Dataset, reference: Callable[..., dict[str, str]]
    ) -> None:
        configs = [bench.submit(dataset, name=name) for name in ("a", "b", "c")]
        workers = [threading.Thread(target=bench.work, daemon=True) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for config in configs:
            assert digests(bench.head(config)) == reference()

    def test_a_damaged_checkpoint_costs_work_and_nothing_else(
        self, bench: Bench, dataset: Dataset, reference: Callable[..., dict[str, str]]
    ) -> None:
        config = bench.submit(dataset, head_interval=1)
        stop = threading.Event()
        with interrupted("stop", 35, stop):
            bench.work(stop)
        head = bench.head(config)
        assert head.position == 9
        bench.runs.put(f"{config.run_id}/{head.checkpoint['optimizer/l1'].key}", b"nothing")
        bench.work()
        takeover = bench.heads(config)[3]
        assert (takeover.kind, takeover.parent, takeover.position) == ("takeover", head.n - 1, 6)
        assert str(takeover.reason).startswith(f"fell back from head {head.n}")
        assert digests(bench.head(config)) == reference(head_interval=1)


class TestHandingOver:
    @pytest.mark.parametrize("submitted", ["together", "later"])
    def test_a_waiting_worker_goes_to_the_run_that_lies_behind(
        self,
        bench: Bench,
        tmp_path: Path,
        reference: Callable[..., dict[str, str]],
        submitted: str,
    ) -> None:
        dataset = write_dataset(tmp_path / "dataset", indices=range(10))
        first = bench.submit(dataset, name="first", head_interval=5)
        together = bench.submit(dataset, name="second") if submitted == "together" else None
        with working(bench):
            if together is None:
                eventually(lambda: bench.position(first) == 0)
                time.sleep(0.5)
            second = together or bench.submit(dataset, name="second")
            eventually(lambda: (bench.position(first), bench.position(second)) == (9, 6))
            assert bench.head(first).kind == "progress"
            assert len(load_history(bench.runs, first.run_id, bench.head(first))) == 3
            write_dataset(tmp_path / "dataset")
            eventually(lambda: bench.ended(first) and bench.ended(second))
        assert digests(bench.head(first)) == reference(head_interval=5)
        assert digests(bench.head(second)) == reference()

    def test_a_run_that_lies_ahead_does_not_take_the_worker_away(
        self, bench: Bench, tmp_path: Path, dataset: Dataset
    ) -> None:
        ahead = bench.submit(dataset, name="ahead", head_interval=1)
        stop = threading.Event()
        with interrupted("stop", 35, stop):
            bench.work(stop)
        assert bench.position(ahead) == 9
        unfinished = write_dataset(tmp_path / "unfinished", indices=range(4))
        behind = bench.submit(unfinished, name="behind", head_interval=1)
        with working(bench):
            eventually(lambda: bench.position(behind) == 3)
            time.sleep(1.2)
        assert bench.position(ahead) == 9
        assert [head.kind for head in bench.heads(behind)] == ["takeover", "progress"]


class TestStopping:
    def test_a_stop_while_waiting_commits_what_was_done(self, bench: Bench, tmp_path: Path) -> None:
        dataset = write_dataset(tmp_path / "dataset", indices=range(4))
        config = bench.submit(dataset, name="waiting")
        with working(bench) as stop:
            eventually(lambda: sample("sae_data_wait_seconds_total", run=config.run_id) > 0.7)
            assert bench.position(config) == 0
            started = time.monotonic()
            stop.set()
        assert time.monotonic() - started < 5
        assert bench.position(config) == 3
        assert not bench.head(config).terminal

    def test_a_stop_within_a_window_discards_it(self, bench: Bench, dataset: Dataset) -> None:
        config = bench.submit(dataset, head_interval=1)
        stop = threading.Event()
        with interrupted("stop", 13, stop):
            bench.work(stop)
        assert bench.head(config).position == 3
        assert list(bench.client.scan_iter(f"{bench.redis.prefix}:*:lease:*")) == []


class TestDiverging:
    @pytest.fixture
    def poisoned(self, tmp_path: Path) -> tuple[Dataset, int]:
        """A dataset with one row, in chunk 10 at hook MLP, that no float32 loss survives; its place."""
        manifest = make_manifest()
        writer = DatasetWriter(open_store(str(tmp_path / "poisoned")), manifest)
        source = SyntheticSource(manifest)
        for index in range(CHUNKS):
            chunk = source.chunk(index)
            if index == 10:
                chunk.acts[MLP][77] = 1e30
            writer.write(index, chunk)
        writer.close()
        dataset = Dataset(writer.store, manifest)
        stored = dataset.read_chunk(10, [MLP]).acts[MLP].astype(np.float32)
        return dataset, int(np.abs(stored).max(axis=1).argmax())

    def test_the_run_ends_at_its_last_good_head_naming_sae_and_step(
        self, bench: Bench, poisoned: tuple[Dataset, int]
    ) -> None:
        dataset, row = poisoned
        config = bench.submit(dataset, head_interval=1)
        bench.work()
        window = config.order.window(3)
        place = ROWS[9] + row
        order = config.order.row_order(window, config.window_rows(3)).tolist()
        batch_count = -(-config.window_rows(3) // 64)
        batch = order.index(place) * batch_count // config.window_rows(3)
        before = sum(-(-config.window_rows(w) // 64) for w in range(3))
        *_, good, last = bench.heads(config)
        assert (good.status, good.position) == ("running", 9)
        assert (last.status, last.parent, last.position, last.step) == ("failed", good.n, 9, good.step)
        assert last.checkpoint == good.checkpoint
        assert last.metrics == good.metrics
        assert last.reason is not None
        assert f"loss or weights of l1 are not finite at step {before + batch}, " in last.reason
        assert "in the window of chunks 9, 10, 11;" in last.reason
        weights = load_checkpoint(bench.runs, config.run_id, last)
        assert len(weights) == 4
        for name in ("l1", "topk"):
            sae = load_sae(f"{bench.runs.url}/{config.run_id}", name)
            assert all(p.isfinite().all() for p in sae.parameters())
        assert bench.client.zcard(f"{bench.redis.prefix}:runs") == 0

    def test_other_runs_go_on(self, bench: Bench, dataset: Dataset, poisoned: tuple[Dataset, int]) -> None:
        bad = bench.submit(poisoned[0], name="bad")
        good = bench.submit(dataset, name="good")
        unharmed = bench.submit(poisoned[0], name="unharmed", saes=[topk()])
        bench.work()
        assert [bench.head(c).status for c in (bad, good, unharmed)] == ["failed", "done", "done"]


class TestRefusing:
    def test_a_dataset_that_is_not_the_one_pinned(self, bench: Bench, tmp_path: Path) -> None:
        dataset = write_dataset(tmp_path / "dataset")
        bench.submit(dataset)
        for file in sorted((tmp_path / "dataset").rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        write_dataset(tmp_path / "dataset", make_manifest().model_copy(update={"seed": 4}))
        with pytest.raises(ConfigError, match="is not the one it was submitted with"):
            bench.work()

    def test_a_strict_run_that_began_elsewhere(self, bench: Bench, dataset: Dataset) -> None:
        config = bench.submit(dataset)
        lineage = take_over(bench.runs, config.run_id, {"torch": "1.0", "threads": 1})
        assert lineage is not None
        lineage.commit(position=3, step=1, rows=1, checkpoint={"sae/topk": b""}, history=[], metrics={})
        with pytest.raises(ConfigError, match=r"strict and began elsewhere: torch was 1\.0"):
            bench.work()
        assert len(bench.heads(config)) == 2, "it must not be taken over"

    def test_a_lost_chunk_is_never_trained_on_as_zeros(
        self, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = write_dataset(tmp_path / "dataset")
        config = bench.submit(dataset, head_interval=1)
        dataset.store.delete(f"activations.zarr/acts/{MLP}/c/7/0")
        monkeypatch.setattr(mending, "ALONE_SECONDS", 0.05)
        with pytest.raises(ObjectMissing, match="c/7/0"):
            bench.work()
        assert bench.position(config) == 6


class TestLoading:
    def test_it_is_the_last_heads_sae_on_raw_activations(self, bench: Bench, dataset: Dataset) -> None:
        config = bench.submit(dataset)
        bench.work()
        url = f"{bench.runs.url}/{config.run_id}"
        figures = bench.head(config).metrics
        window = [dataset.read_chunk(15).acts[hook] for hook in (RESID, MLP)]
        for name, rows in zip(("topk", "l1"), window, strict=True):
            x = torch.from_numpy(rows.astype(np.float32))
            sae = load_sae(url, name)
            assert sae.d_in == x.shape[1]
            residual = (x - sae(x)).square().sum()
            variance = 1 - float(residual / (x - x.mean(0)).square().sum())
            # the head's figure is the mean over the window's steps, the weights are those after the last
            assert variance == pytest.approx(figures[name]["explained_variance"], abs=0.03)
            assert figures[name]["explained_variance"] > 0.2
            assert not any(p.requires_grad for p in sae.parameters())

    def test_errors_say_what_there_is(self, bench: Bench, dataset: Dataset) -> None:
        config = bench.submit(dataset)
        url = f"{bench.runs.url}/{config.run_id}"
        with pytest.raises(UserError, match="has no checkpoint yet"):
            load_sae(url, "topk")
        with pytest.raises(ObjectMissing, match="is not a run"):
            load_sae(f"{bench.runs.url}/none", "topk")
        bench.work()
        with pytest.raises(UserError, match=r"has no SAE 'topkk'. Did you mean topk\? It has topk, l1\."):
            load_sae(url, "topkk")
        key = bench.head(config).checkpoint["sae/l1"].key
        bench.runs.put(f"{config.run_id}/{key}", b"not this")
        with pytest.raises(DamagedObject, match="is damaged"):
            load_sae(url, "l1")
        assert load_sae(url + "/", "topk").d_sae == 64, "the other SAE is whole"


class TestKilledProcess:
    def test_another_process_carries_on_to_the_same_bits(
        self,
        client: Client,
        valkey: EmbeddedServer,
        dataset: Dataset,
        tmp_path: Path,
    ) -> None:
        """`penstock train` is killed with SIGKILL in the middle of its steps."""
        changes: dict[str, Any] = {
            "batch_rows": 4,
            "window_chunks": 1,
            "head_interval": 1,
            "epochs": 2,
            "saes": [topk(), standard()],
        }
        prefix = fresh_prefix()
        bench = Bench(open_store(str(tmp_path / "runs")), client, prefix)
        config = bench.submit(dataset, **changes)
        settings = {
            "workdir": str(tmp_path),
            "runs_url": bench.runs.url,
            "dataset": {"url": dataset.url, "hooks": [RESID, MLP]},
            "redis": {"url": valkey.url, "prefix": prefix, "lease_seconds": 1.0},
            "metrics": {"port": -1},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        arguments = [*COMMAND, "train", "--drain", str(tmp_path / "config.yaml")]

        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen(arguments, stdout=log, stderr=log)
            try:
                eventually(lambda: process.poll() is not None or bench.position(config) >= 5, 60)
            finally:
                process.kill()
                process.wait()
            killed_at = bench.head(config)
            assert 5 <= killed_at.position < 2 * CHUNKS, (tmp_path / "log").read_text()
            subprocess.run(arguments, stdout=log, stderr=log, check=True, timeout=120)

        heads = bench.heads(config)
        assert heads[-1].status == "done"
        assert [h.position for h in heads if h.kind == "takeover"] == [0, killed_at.position]
        undisturbed = Bench(open_store(str(tmp_path / "undisturbed")), client, fresh_prefix())
        again = undisturbed.submit(dataset, **changes)
        undisturbed.work()
        expected = {head.position: digests(head) for head in undisturbed.heads(again)}
        differing = [head.position for head in heads if digests(head) != expected[head.position]]
        assert differing == []


def test_a_fenced_lineage_raises(bench: Bench, dataset: Dataset) -> None:
    config = bench.submit(dataset)
    old = take_over(bench.runs, config.run_id, {})
    take_over(bench.runs, config.run_id, {})
    assert old is not None
    with pytest.raises(Fenced):
        old.end("cancelled", "too late")
