"""Whole runs, from submit to the last head: each row once per epoch, the same bits anywhere."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.common.errors import ConfigError, DamagedObject, ObjectMissing, UserError
from penstock.common.permutation import permutation
from penstock.store.dataset import Dataset
from penstock.store.objects import open_store
from penstock.store.writer import DatasetWriter
from penstock.trainer import mending
from penstock.trainer.lineage import load_checkpoint, load_history, take_over
from penstock.trainer.load import load_sae
from services.producing import CountingSource, Producer
from services.runs import Bench, digests, topk
from services.synthetic import (
    CHUNKS,
    MLP,
    RESID,
    ROWS,
    SyntheticSource,
    make_manifest,
    write_dataset,
)
from services.training import Batches, as_bytes, sample, stored_rows

WINDOWS = 6


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
        assert "in the window of chunk 9, chunk 10, chunk 11;" in last.reason
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
        with pytest.raises(UserError, match="is not a run"):
            load_sae(f"{bench.runs.url}/none", "topk")
        # a copy of its config is left: this is damage, which repair puts right
        bench.runs.put("lost/config.copy", b"")
        with pytest.raises(ObjectMissing, match="lost its config"):
            load_sae(f"{bench.runs.url}/lost", "topk")
        bench.work()
        with pytest.raises(UserError, match=r"has no SAE 'topkk'. Did you mean topk\? It has topk, l1\."):
            load_sae(url, "topkk")
        key = bench.head(config).checkpoint["sae/l1"].key
        bench.runs.put(f"{config.run_id}/{key}", b"not this")
        with pytest.raises(DamagedObject, match="is damaged"):
            load_sae(url, "l1")
        assert load_sae(url + "/", "topk").d_sae == 64, "the other SAE is whole"
