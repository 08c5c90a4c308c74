"""Damaged chunks: producers are asked to make them again, and no row is trained on that was not committed."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from penstock.common.errors import DamagedObject, Detached, ObjectMissing
from penstock.common.redis import Client
from penstock.store.chunks import Chunk
from penstock.store.dataset import Dataset
from penstock.store.joined import JoinedDataset
from penstock.store.layout import ARRAYS, commit_key
from penstock.store.queue import ChunkQueue, Presence, repairs_wanted
from penstock.store.retention import detach_reader
from penstock.trainer import mending
from penstock.trainer.config import RunConfig
from penstock.trainer.mending import Mender, Stopped
from services.producing import CountingSource, Producer, mended_by
from services.runs import Bench, digests
from services.synthetic import CHUNKS, MLP, RESID, ROWS, make_manifest, write_dataset
from services.training import Batches, stored_rows
from services.valkey import fresh_prefix
from services.waiting import eventually


class Patient:
    """A mender with everything around it."""

    def __init__(self, client: Client, directory: Path) -> None:
        self.dataset = write_dataset(directory, make_manifest([5] * 4))
        self.stop = threading.Event()
        prefix = fresh_prefix()
        self.repairs = ChunkQueue(
            client, prefix, self.dataset.url, self.dataset.manifest.digest, "trainer", 20, repairs=True
        )
        self.producer = Presence(client, prefix, "producer")
        self.mender = Mender(
            JoinedDataset([self.dataset]),
            "run-1",
            [self.repairs],
            Presence(client, prefix, "trainer"),
            self.stop,
        )
        self.error = ObjectMissing("chunk 2 is gone")

    def mend(self) -> None:
        self.mender.mend(2, self.error)

    def mend_in_background(self) -> threading.Thread:
        thread = threading.Thread(target=self.mend, daemon=True)
        thread.start()
        eventually(lambda: self.repairs.is_open(2))
        return thread


@pytest.fixture
def patient(client: Client, tmp_path: Path) -> Patient:
    return Patient(client, tmp_path / "dataset")


class TestMender:
    def test_it_asks_and_waits_until_the_repair_is_done(self, patient: Patient) -> None:
        waiting = patient.mend_in_background()
        assert patient.repairs.claim(4) == 2
        waiting.join(0.1)
        assert waiting.is_alive(), "it is being made"
        patient.repairs.done(2)
        waiting.join(10)
        assert not waiting.is_alive()

    def test_a_stop_ends_the_waiting(self, patient: Patient) -> None:
        patient.stop.set()
        with pytest.raises(Stopped):
            patient.mend()

    def test_without_a_producer_it_gives_up_and_says_what_to_do(
        self, patient: Patient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mending, "ALONE_SECONDS", 0.1)
        with pytest.raises(ObjectMissing, match=r"chunk 2 is gone; no producer .* `penstock repair CONFIG`"):
            patient.mend()
        assert patient.repairs.is_open(2), "a producer that comes later finds it"

    def test_as_long_as_a_producer_is_there_it_waits(
        self, patient: Patient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mending, "ALONE_SECONDS", 0.1)
        patient.producer.tell({"kind": "producer", "dataset": patient.dataset.url}, 10)
        waiting = patient.mend_in_background()
        waiting.join(0.4)
        assert waiting.is_alive()
        patient.repairs.done(2)
        waiting.join(10)

    @pytest.mark.parametrize(
        "word",
        [{"kind": "producer", "dataset": "/other"}, {"kind": "trainer"}, {"kind": "trainer", "port": 1}],
    )
    def test_others_are_no_producers_of_it(
        self, patient: Patient, monkeypatch: pytest.MonkeyPatch, word: dict[str, object]
    ) -> None:
        monkeypatch.setattr(mending, "ALONE_SECONDS", 0.05)
        patient.producer.tell(word, 10)
        with pytest.raises(ObjectMissing, match="no producer is there"):
            patient.mend()

    def test_what_is_still_unreadable_after_some_repairs_is_an_error(self, patient: Patient) -> None:
        for _ in range(mending.TRIES):
            waiting = patient.mend_in_background()
            patient.repairs.done(2)
            waiting.join(10)
        with pytest.raises(DamagedObject, match=f"made again {mending.TRIES} times and still cannot be read"):
            patient.mender.mend(2, DamagedObject("chunk 2 is damaged"))
        assert not patient.repairs.is_open(2)
        other = threading.Thread(target=patient.mender.mend, args=(3, patient.error), daemon=True)
        other.start()
        eventually(lambda: patient.repairs.is_open(3))
        patient.repairs.done(3)
        other.join(10)

    def test_a_detached_run_is_told_so_at_once(self, patient: Patient) -> None:
        detach_reader(patient.dataset.store, "run-1", "it made no progress")
        with pytest.raises(
            Detached, match=r"run-1 was detached .*\(it made no progress\) and chunk 2 is gone"
        ):
            patient.mend()
        assert not patient.repairs.is_open(2)

    def test_without_redis_it_waits_and_gives_up(
        self, patient: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gone: Client = redis.Redis(
            unix_socket_path=str(tmp_path / "none.sock"), protocol=2, retry=Retry(NoBackoff(), 0)
        )
        queue = ChunkQueue(gone, "p", "u", "d", "trainer", 20, repairs=True)
        mender = Mender(
            JoinedDataset([patient.dataset]), "run-1", [queue], Presence(gone, "p", "trainer"), patient.stop
        )
        monkeypatch.setattr(mending, "ALONE_SECONDS", 0.1)
        with pytest.raises(ObjectMissing, match="no producer is there"):
            mender.mend(2, patient.error)


class OtherNumerics(CountingSource):
    """Makes chunks that are not those committed."""

    def chunk(self, index: int) -> Chunk:
        made = super().chunk(index)
        return replace(made, acts={name: rows[::-1].copy() for name, rows in made.acts.items()})


def acts_key(index: int) -> str:
    return f"{ARRAYS}/acts/{MLP}/c/{index}/0"


class TestWholeRuns:
    def test_a_damaged_dataset_gives_the_same_weights(
        self, bench: Bench, tmp_path: Path, reference: Callable[..., dict[str, str]]
    ) -> None:
        """Objects missing, flipped and of another chunk, and a damaged commit, all over the dataset."""
        dataset = write_dataset(tmp_path / "dataset")
        before = {key: dataset.store.get(key) for key, _ in dataset.store.list("")}
        config = bench.submit(dataset)
        store = dataset.store
        store.delete(acts_key(4))
        flipped = bytearray(store.get(acts_key(0)))
        flipped[100] ^= 1
        store.put(acts_key(0), bytes(flipped))
        store.put(acts_key(9), store.get(acts_key(10)))
        store.put(commit_key(7), store.get(commit_key(7))[:-9])
        store.put(f"{ARRAYS}/sequence/c/15", b"")
        with mended_by(bench, dataset) as made:
            bench.work()
        assert sorted(made) == [0, 4, 7, 9, 15]
        assert digests(bench.head(config)) == reference()
        assert [head.kind for head in bench.heads(config)].count("takeover") == 1, "nobody gave the run up"
        assert {key: store.get(key) for key in before} == before

    @pytest.mark.parametrize("epochs", [1, 2])
    def test_a_quarantined_chunk_is_left_out(
        self, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
    ) -> None:
        dataset = write_dataset(tmp_path / "dataset")
        stored = {hook: stored_rows(dataset, hook, set(range(CHUNKS)) - {4}) for hook in (RESID, MLP)}
        batches = Batches(monkeypatch)
        config = bench.submit(dataset, epochs=epochs)
        dataset.store.delete(acts_key(4))
        with mended_by(bench, dataset, lambda: OtherNumerics(dataset.manifest)) as made:
            bench.work()
        assert made == [4, 4, 4]
        assert dataset.quarantined() == {4}
        head = bench.head(config)
        assert head.status == "done"
        assert head.rows == config.total_rows() - epochs * ROWS[4]
        assert head.position == epochs * CHUNKS
        for hook, rows in stored.items():
            trained = batches.so_far(config, hook)
            for epoch in range(epochs):
                per_epoch = sum(ROWS) - ROWS[4]
                part = trained[epoch * per_epoch : (epoch + 1) * per_epoch]
                assert sorted(part) == sorted(rows.elements())
        again = bench.submit(dataset, name="later", epochs=epochs)
        bench.work()
        assert bench.head(again).rows == head.rows, "a later run leaves it out without trying"

    def test_what_was_in_quarantine_from_the_start_gives_the_same_weights(
        self, bench: Bench, client: Client, tmp_path: Path
    ) -> None:
        """Replaying a dataset gives what streaming gave, quarantine included."""
        first = write_dataset(tmp_path / "first")
        streamed = bench.submit(first)
        first.store.delete(acts_key(1))
        with mended_by(bench, first, lambda: OtherNumerics(first.manifest)):
            bench.work()
        replayed = bench.submit(first, name="replayed")
        bench.work()
        assert first.quarantined() == {1}
        assert digests(bench.head(replayed)) == digests(bench.head(streamed))

    @pytest.mark.parametrize("chunk", [0, 4, CHUNKS - 1])
    def test_a_window_that_is_all_in_quarantine_is_passed_over(
        self, bench: Bench, tmp_path: Path, chunk: int
    ) -> None:
        dataset = write_dataset(tmp_path / "dataset")
        dataset.store.create_guarded(f"quarantine/{chunk}.json", {"index": chunk})
        config = bench.submit(dataset, window_chunks=1, head_interval=1)
        bench.work()
        assert bench.head(config).status == "done"
        assert bench.head(config).rows == sum(ROWS) - ROWS[chunk]

    def test_a_detached_run_whose_chunk_is_gone_has_failed(
        self, bench: Bench, tmp_path: Path, dataset: Dataset
    ) -> None:
        gone = write_dataset(tmp_path / "dataset")
        config = bench.submit(gone, head_interval=1)
        other = bench.submit(dataset, name="other")
        detach_reader(gone.store, config.run_id, "by command")
        gone.store.delete(acts_key(7))
        bench.work()
        *_, good, last = bench.heads(config)
        assert (last.status, last.position) == ("failed", 6)
        assert last.checkpoint == good.checkpoint
        assert last.reason == (
            f"run {config.run_id} was detached from {gone.url} (by command) and chunk 7 is gone"
        )
        assert bench.head(other).status == "done"
        assert list(bench.client.scan_iter(f"{bench.redis.prefix}:*")) == []

    def test_a_detached_run_goes_on_while_its_chunks_are_there(
        self, bench: Bench, tmp_path: Path, reference: Callable[..., dict[str, str]]
    ) -> None:
        dataset = write_dataset(tmp_path / "dataset")
        config = bench.submit(dataset)
        detach_reader(dataset.store, config.run_id, "by command")
        bench.work()
        assert digests(bench.head(config)) == reference()

    def test_the_worker_asks_again_when_redis_forgets(
        self, bench: Bench, tmp_path: Path, reference: Callable[..., dict[str, str]]
    ) -> None:
        dataset = write_dataset(tmp_path / "dataset")
        config: RunConfig = bench.submit(dataset)
        dataset.store.delete(acts_key(4))
        working = threading.Thread(target=bench.work, daemon=True)
        working.start()
        wanted = (bench.client, bench.redis.prefix, dataset.url, dataset.manifest.digest)
        for _ in range(2):
            eventually(lambda: repairs_wanted(*wanted))
            for key in list(bench.client.scan_iter(f"{bench.redis.prefix}:*")):
                bench.client.delete(key)
        eventually(lambda: repairs_wanted(*wanted))
        Producer(bench.client, bench.redis.prefix, dataset.url, "producer").run()
        working.join(30)
        assert digests(bench.head(config)) == reference()
