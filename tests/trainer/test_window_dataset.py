"""Datasets that keep only a window: every row is trained on before it goes, within the budget."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.common.errors import ConfigError, DamagedObject, UserError
from penstock.common.redis import Client
from penstock.store.dataset import Dataset
from penstock.store.layout import ARRAYS, config_key, floor_key
from penstock.store.objects import open_store
from penstock.store.retention import detach_reader, newest_floor, read_reader
from penstock.trainer.config import chunks_needed, load_run_config
from services.producing import CountingSource, Producer
from services.runs import Bench, digests, run_settings
from services.synthetic import CHUNKS, MLP, RESID, ROWS, make_manifest, write_dataset
from services.training import Batches, Killed, interrupted, stored_rows, working
from services.valkey import fresh_prefix
from services.waiting import eventually

MANIFEST = make_manifest(retention="window")


@pytest.fixture
def window(tmp_path: Path) -> Dataset:
    """Nothing of it is made yet."""
    return write_dataset(tmp_path / "window", MANIFEST, [])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[bytes]]:
    """All rows there are, by hook."""
    kept = write_dataset(tmp_path_factory.mktemp("kept") / "dataset")
    return {hook: stored_rows(kept, hook) for hook in (RESID, MLP)}


def stored(dataset: Dataset) -> set[int]:
    """Chunks of which an object of the widest array is there."""
    keys = (key for key, _ in dataset.store.list(f"{ARRAYS}/acts/{MLP}/c/"))
    return {int(key.split("/")[-2]) for key in keys}


def raise_floor(dataset: Dataset, floor: int) -> None:
    n = newest_floor(dataset.store)[0] + 1
    dataset.store.create_guarded(floor_key(n), {"format_version": 1, "n": n, "floor": floor})


@contextmanager
def producing(bench: Bench, dataset: Dataset, budget: int) -> Iterator[Producer]:
    """A producer in a thread, stopped at the end of the block at the latest."""
    producer = Producer(
        bench.client,
        bench.redis.prefix,
        dataset.url,
        "producer",
        CountingSource(MANIFEST),
        manifest=MANIFEST,
        budget=budget,
    )
    thread = producer.start()
    try:
        yield producer
    finally:
        producer.stop.set()
        thread.join()


class TestRunsThatBeginLate:
    @pytest.fixture
    def finished(self, tmp_path: Path) -> Dataset:
        """All chunks are there, and the floor is in the middle of a window of three."""
        dataset = write_dataset(tmp_path / "finished", MANIFEST)
        raise_floor(dataset, 4)
        return dataset

    def test_they_train_on_exactly_what_follows(
        self, bench: Bench, finished: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batches = Batches(monkeypatch)
        config = bench.submit(finished, head_interval=1)
        assert config.start == 6
        assert config.windows == range(2, 6)
        assert config.total_rows() == sum(ROWS[6:])
        bench.work()
        head = bench.head(config)
        assert (head.status, head.position) == ("done", CHUNKS)
        assert (head.rows, head.step) == (config.total_rows(), config.total_steps())
        for hook in (RESID, MLP):
            assert Counter(batches.trained(config, hook)) == stored_rows(finished, hook, range(6, CHUNKS))
        assert [h.position for h in bench.heads(config)] == [6, 9, 12, 15, 16]

    def test_replaying_and_kills_give_the_same_weights(self, bench: Bench, finished: Dataset) -> None:
        undisturbed = bench.submit(finished, name="undisturbed")
        bench.work()
        again = bench.submit(finished, name="again")
        for after in (3, 9, 20):
            with pytest.raises(Killed), interrupted("killed in a step", after, threading.Event()):
                bench.work()
        bench.work()
        assert bench.head(again).n > 4
        assert digests(bench.head(again)) == digests(bench.head(undisturbed))

    def test_a_checkpoint_that_is_lost_sends_them_back_to_their_start(
        self, bench: Bench, finished: Dataset
    ) -> None:
        undisturbed = bench.submit(finished, name="undisturbed")
        bench.work()
        config = bench.submit(finished, name="again", head_interval=2)
        stop = threading.Event()
        with interrupted("stop", 25, stop):
            bench.work(stop)
        head = bench.head(config)
        assert head.position > 6
        for file in head.checkpoint.values():
            bench.runs.delete(f"{config.run_id}/{file.key}")
        bench.work()
        assert 6 in [h.position for h in bench.heads(config) if h.kind == "takeover"]
        assert digests(bench.head(config)) == digests(bench.head(undisturbed))

    def test_submitting_again_changes_nothing(self, bench: Bench, finished: Dataset) -> None:
        config = bench.submit(finished)
        raise_floor(finished, 9)
        assert bench.submit(finished) == config
        assert load_run_config(bench.runs, config.run_id).start == 6
        assert read_reader(finished.store, config.run_id).needs == 12

    def test_when_nothing_is_left_they_are_refused(self, bench: Bench, finished: Dataset) -> None:
        raise_floor(finished, CHUNKS)
        with pytest.raises(UserError, match="keeps only a window, and nothing of it is left to read"):
            bench.submit(finished)

    @pytest.mark.parametrize("start", [-3, 4, CHUNKS, "6"])
    def test_a_config_whose_start_cannot_be_is_damaged(
        self, bench: Bench, finished: Dataset, start: object
    ) -> None:
        config = bench.submit(finished)
        record = config.model_dump(mode="json")
        record["start"] = start
        bench.runs.put_guarded(config_key(config.run_id), record)
        with pytest.raises(DamagedObject, match=r"config\.json is not a run config"):
            load_run_config(bench.runs, config.run_id)


class TestBudget:
    def test_what_a_run_needs(self) -> None:
        """From its older kept checkpoint, over the newest, to the head after that."""
        settings = run_settings(window_chunks=3, head_interval=2)
        assert chunks_needed(settings, 100) == 12
        assert chunks_needed(settings, 7) == 7

    @pytest.mark.parametrize("head_interval", [1, 2])
    def test_one_chunk_less_is_refused_at_submit(
        self, bench: Bench, window: Dataset, head_interval: int
    ) -> None:
        needs = chunks_needed(run_settings(head_interval=head_interval), CHUNKS)
        message = (
            rf"holds {needs - 1} chunks, but run run needs {needs} "
            rf"\(2 × head_interval of {head_interval} × window_chunks of 3\)"
        )
        with pytest.raises(ConfigError, match=message):
            bench.submit(window, needs - 1, head_interval=head_interval)
        assert list(window.store.list("readers/")) == []
        bench.submit(window, needs, head_interval=head_interval)

    def test_a_second_epoch_is_refused(self, bench: Bench, window: Dataset) -> None:
        with pytest.raises(ConfigError, match=r"epochs is 2, but the dataset keeps only a window"):
            bench.submit(window, CHUNKS, epochs=2)

    @pytest.mark.parametrize(("window_chunks", "head_interval"), [(3, 1), (3, 2), (1, 2)])
    def test_two_runs_and_one_worker_finish_within_the_least_budget(
        self,
        bench: Bench,
        window: Dataset,
        rows: dict[str, Counter[bytes]],
        monkeypatch: pytest.MonkeyPatch,
        window_chunks: int,
        head_interval: int,
    ) -> None:
        batches = Batches(monkeypatch)
        changes = {"window_chunks": window_chunks, "head_interval": head_interval}
        budget = chunks_needed(run_settings(**changes), CHUNKS)
        configs = [bench.submit(window, budget, name=name, **changes) for name in ("a", "b")]
        seen: list[int] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.002):
                seen.append(len(stored(window)))

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        with producing(bench, window, budget) as producer:
            bench.work()
        stop.set()
        watching.join()
        assert max(seen) <= budget + 1
        assert producer.source.made == list(range(CHUNKS))
        for config in configs:
            assert bench.head(config).status == "done"
            for hook in (RESID, MLP):
                assert Counter(batches.trained(config, hook)) == rows[hook]
        assert newest_floor(window.store)[1] >= CHUNKS - budget

    def test_it_gives_the_weights_of_a_kept_dataset(
        self, bench: Bench, window: Dataset, dataset: Dataset
    ) -> None:
        kept = bench.submit(dataset, name="kept", head_interval=1)
        config = bench.submit(window, 6, name="window", head_interval=1)
        with producing(bench, window, 6):
            bench.work()
        assert digests(bench.head(config)) == digests(bench.head(kept))


class TestTwoReaders:
    def test_a_slower_run_holds_the_window_back_until_it_is_detached(
        self, bench: Bench, client: Client, window: Dataset, tmp_path: Path
    ) -> None:
        elsewhere = Bench(open_store(str(tmp_path / "elsewhere")), client, fresh_prefix())
        budget = 6
        fast = bench.submit(window, budget, name="fast", head_interval=1)
        with producing(bench, window, budget) as producer, working(bench):
            eventually(lambda: bench.position(fast) >= 6)
            slow = elsewhere.submit(window, budget, name="slow", head_interval=1)
            start = slow.start
            if bench.ended(fast):
                pytest.fail("the fast run was over before the slow one came: the test is void")
            eventually(lambda: f"run {slow.run_id}, which still needs chunk {start}" in producer.work.waiting)
            limit = newest_floor(window.store)[1] + budget
            eventually(lambda: window.committed() == set(range(limit)))
            assert not bench.ended(fast)
            assert stored(window) >= set(range(start, limit)), "nothing that the slow run needs is gone"
            detach_reader(window.store, slow.run_id, "it is too slow")
            eventually(lambda: bench.ended(fast))
        assert bench.head(fast).status == "done"
        assert window.committed() == set(range(CHUNKS))
        assert start not in stored(window)
        elsewhere.work()
        head = elsewhere.head(slow)
        assert (head.status, head.position) == ("failed", start)
        assert "was detached" in str(head.reason)
        assert "it is too slow" in str(head.reason)

    def test_a_slower_run_that_is_carried_on_gets_every_row_from_its_start(
        self,
        bench: Bench,
        client: Client,
        window: Dataset,
        rows: dict[str, Counter[bytes]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        batches = Batches(monkeypatch)
        elsewhere = Bench(open_store(str(tmp_path / "elsewhere")), client, bench.redis.prefix)
        budget = 6
        fast = bench.submit(window, budget, name="fast", head_interval=1)
        with producing(bench, window, budget), working(bench):
            eventually(lambda: bench.position(fast) >= 6)
            slow = elsewhere.submit(window, budget, name="slow", head_interval=1)
            elsewhere.work()
            eventually(lambda: bench.ended(fast))
        assert [bench.head(fast).status, elsewhere.head(slow).status] == ["done", "done"]
        assert Counter(batches.trained(fast, MLP)) == rows[MLP]
        trained = Counter(batches.trained(slow, MLP))
        assert trained <= rows[MLP]
        assert trained.total() == sum(ROWS[slow.start :])
