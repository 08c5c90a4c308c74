"""Back-pressure: producers stay within the budget, say for whom they wait, and leave nothing behind."""

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import StoreError
from penstock.common.redis import Client
from penstock.producer.work import Task
from penstock.store.arrays import dataset_arrays
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.layout import ARRAYS, commit_key, config_key
from penstock.store.local import LocalStore
from penstock.store.queue import ChunkQueue
from penstock.store.retention import Reader, newest_floor, register_reader
from penstock.store.writer import DatasetWriter
from services.producing import CountingSource, Producer, run_together
from services.synthetic import CHUNKS, SyntheticSource, make_manifest, write_dataset
from services.trees import tree_digests
from services.valkey import fresh_prefix
from services.waiting import eventually
from services.windows import commit_heads

MANIFEST = make_manifest(retention="window")
BUDGET = 4


class Reading:
    """A run that reads the dataset, as far as its records say."""

    def __init__(self, dataset: Dataset, runs: Path, run: str) -> None:
        self.run = run
        self._runs = LocalStore(str(runs))
        start = register_reader(dataset.store, Reader(run, self._runs.url, 0, 1))
        self._runs.create_guarded(config_key(run), {"format_version": 1, "start": start})

    def train(self, *positions: int) -> None:
        commit_heads(self._runs, self.run, *positions)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path / "dataset", MANIFEST, [])


def producer_of(client: Client, dataset: Dataset, prefix: str, name: str = "p", **changes: Any) -> Producer:
    return Producer(client, prefix, dataset.url, name, manifest=MANIFEST, budget=BUDGET, **changes)


def stored(dataset: Dataset) -> set[int]:
    """Chunks of which any object is there."""
    keys = {key for key, _ in dataset.store.list(f"{ARRAYS}/")}
    specs = dataset_arrays(dataset.manifest)
    return {i for i in range(CHUNKS) if any(spec.key(ARRAYS, i) in keys for spec in specs)}


def test_the_budget_blocks_and_the_producer_says_for_whom(
    client: Client, dataset: Dataset, tmp_path: Path
) -> None:
    producer = producer_of(client, dataset, fresh_prefix())
    thread = producer.start()
    eventually(lambda: "a run to be submitted" in producer.work.waiting)
    eventually(lambda: dataset.committed() == set(range(BUDGET)))
    run = Reading(dataset, tmp_path / "runs", "run-a")
    eventually(lambda: "run run-a, which still needs chunk 0" in producer.work.waiting)
    assert producer.work.waiting.startswith("budget: ")
    run.train(2, 3)
    eventually(lambda: "run run-a, which still needs chunk 2" in producer.work.waiting)
    eventually(lambda: dataset.committed() == set(range(2 + BUDGET)))
    assert stored(dataset) == set(range(2, 2 + BUDGET))
    for position in range(4, CHUNKS - 1, 2):
        eventually(partial(dataset.store.exists, commit_key(position - 1)))
        run.train(position)
    thread.join(30)
    assert not thread.is_alive(), "what is left fits into the budget: it is complete"
    assert dataset.committed() == set(range(CHUNKS))
    assert producer.source.made == list(range(CHUNKS))
    assert stored(dataset) == set(range(CHUNKS - BUDGET, CHUNKS))


def test_several_producers_stay_within_it_together(client: Client, dataset: Dataset, tmp_path: Path) -> None:
    run = Reading(dataset, tmp_path / "runs", "run-a")
    prefix = fresh_prefix()
    most: list[int] = []
    over: list[int] = []

    def look(index: int) -> None:
        most.append(len(stored(dataset)))
        if index >= newest_floor(dataset.store)[1] + BUDGET:
            over.append(index)

    producers = [
        producer_of(client, dataset, prefix, f"p{i}", source=CountingSource(MANIFEST, 0.01, look))
        for i in range(3)
    ]

    def train() -> None:
        for position in range(1, CHUNKS + 1):
            eventually(partial(dataset.store.exists, commit_key(position - 1)))
            run.train(position)

    training = threading.Thread(target=train, daemon=True)
    training.start()
    run_together(producers)
    training.join()
    assert over == []
    assert max(most) <= BUDGET
    assert sorted(index for p in producers for index in p.source.made) == list(range(CHUNKS))


def test_a_slow_producer_leaves_no_objects_of_a_chunk_that_is_gone(
    client: Client, dataset: Dataset, tmp_path: Path
) -> None:
    """Its lease ended; another made the chunk, it was read and deleted, and now the slow one is ready."""
    run = Reading(dataset, tmp_path / "runs", "run-a")
    prefix = fresh_prefix()
    slow = producer_of(client, dataset, prefix, "slow")
    task = slow.work.next(slow.stop)
    assert task == Task(0)
    slow.queue.release(0)
    quick = producer_of(client, dataset, prefix, "quick")
    thread = quick.start()
    eventually(lambda: dataset.committed() >= set(range(BUDGET)))
    run.train(1, 2)
    eventually(lambda: 0 not in stored(dataset))
    commit = dataset.commit(0)
    slow.sink.put(task, slow.source.chunk(0))
    slow.sink.finish()
    assert slow.committed == []
    assert 0 not in stored(dataset)
    assert dataset.commit(0) == commit
    quick.stop.set()
    thread.join()
    slow.writer.close()


def test_a_chunk_that_a_reader_still_needs_is_not_cleaned_up(
    client: Client, dataset: Dataset, tmp_path: Path
) -> None:
    """The floor was raised over it while that reader registered; the reader counts."""
    writer = DatasetWriter(dataset.store, MANIFEST)
    for index in range(BUDGET):
        writer.write(index, SyntheticSource(MANIFEST).chunk(index))
    writer.close()
    Reading(dataset, tmp_path / "runs", "late")
    dataset.store.create_guarded("floor/0.json", {"format_version": 1, "n": 0, "floor": 2})
    slow = producer_of(client, dataset, fresh_prefix(), "slow")
    slow.sink.put(Task(1), slow.source.chunk(1))
    slow.sink.finish()
    slow.writer.close()
    assert stored(dataset) == set(range(BUDGET))
    dataset.read_chunk(1)


def test_a_chunk_that_nobody_will_read_is_made_and_goes(
    client: Client, dataset: Dataset, tmp_path: Path
) -> None:
    """A run began behind it, at the next window: the dataset is complete with its commit."""
    run = Reading(dataset, tmp_path / "runs", "run-a")
    run.train(1, 2)
    producer = producer_of(client, dataset, fresh_prefix())
    thread = producer.start()
    eventually(lambda: dataset.committed() == set(range(1 + BUDGET)))
    assert stored(dataset) == set(range(1, 1 + BUDGET))
    producer.stop.set()
    thread.join()


def test_a_damaged_reader_deletes_nothing_and_ends_nobody(
    client: Client, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm = "readers/run-a.json"
    run = Reading(dataset, tmp_path / "runs", "run-a")
    producer = producer_of(client, dataset, fresh_prefix())
    thread = producer.start()
    eventually(lambda: dataset.committed() == set(range(BUDGET)))
    whole = dataset.store.get(harm)
    dataset.store.put(harm, whole[:-3])
    run.train(2, 4)
    eventually(lambda: "nothing can be deleted" in caplog.text)
    assert stored(dataset) == set(range(BUDGET))
    assert thread.is_alive()
    dataset.store.put(harm, whole)
    eventually(lambda: stored(dataset) == set(range(2, 2 + BUDGET)))
    producer.stop.set()
    thread.join()


class FullDisk(LocalStore):
    """Takes no more after a number of creates."""

    def __init__(self, path: str, room: int) -> None:
        super().__init__(path)
        self.room = room
        self._lock = threading.Lock()

    def _create(self, key: str, data: bytes) -> bool:
        with self._lock:
            self.room -= 1
            if self.room < 0:
                raise StoreError(f"{self.root / key}: cannot be written: No space left on device")
        return super()._create(key, data)


@pytest.mark.parametrize("room", [0, 1, 4, 5, 6, 20])
def test_a_full_disk_ends_the_producer_and_nothing_is_lost(client: Client, tmp_path: Path, room: int) -> None:
    expected = tree_digests(Path(write_dataset(tmp_path / "expected", indexed=True).url), ("provenance",))
    url = tmp_path / "dataset"
    write_dataset(url, indices=[])
    store = FullDisk(str(url), 1000)
    prefix = fresh_prefix()
    producer = Producer(client, prefix, url, "p", store=store)
    store.room = room
    with pytest.raises(StoreError, match="No space left on device"):
        producer.run()
    assert len(open_dataset(str(url)).committed()) == room // 6, "five objects and a commit each"
    for index in open_dataset(str(url)).committed():
        open_dataset(str(url)).read_chunk(index)
    producer.work.release()
    Producer(client, prefix, url, "q").run()
    assert tree_digests(url, ("provenance",)) == expected


def test_reconciling_leaves_claims_alone_and_forgets_what_is_committed(
    client: Client, dataset: Dataset
) -> None:
    """In one step: no chunk can be claimed twice while producers start together."""
    prefix = fresh_prefix()
    queues = [
        ChunkQueue(client, prefix, dataset.url, MANIFEST.digest, f"p{number}", 20) for number in range(3)
    ]
    claimed: list[int] = []

    def claim(queue: ChunkQueue) -> None:
        while True:
            queue.reconcile(CHUNKS, set())
            index = queue.claim(CHUNKS)
            if index is None:
                return
            claimed.append(index)

    threads = [threading.Thread(target=claim, args=(queue,), daemon=True) for queue in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(CHUNKS))
