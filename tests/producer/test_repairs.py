"""Repairs: what is damaged is made again before anything new, and given up only after three mismatches."""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import redis

from penstock.common.redis import Client
from penstock.producer import sink as sink_module
from penstock.producer.work import Task, Work
from penstock.store.arrays import BFLOAT16
from penstock.store.chunks import Chunk
from penstock.store.dataset import Dataset
from penstock.store.layout import ARRAYS, commit_key, index_key
from penstock.store.manifest import Manifest
from penstock.store.queue import ChunkQueue
from penstock.store.retention import Reader, register_reader
from services.producing import CountingSource, Producer
from services.synthetic import CHUNKS, MLP, make_manifest, write_dataset
from services.trees import tree_digests
from services.valkey import fresh_prefix
from services.waiting import eventually

WORKERS_OWN = ("provenance",)


class OtherNumerics(CountingSource):
    """Makes every chunk a little different from what was committed, as another machine may."""

    def __init__(self, manifest: Manifest, on_chunk: Callable[[int], None] = lambda index: None) -> None:
        super().__init__(manifest, on_chunk=on_chunk)

    def chunk(self, index: int) -> Chunk:
        made = super().chunk(index)
        acts = {
            name: (rows.astype(np.float32) * np.float32(1.01)).astype(BFLOAT16)
            for name, rows in made.acts.items()
        }
        return replace(made, acts=acts)


def lose(dataset: Dataset, index: int) -> str:
    """Take an object of a chunk away."""
    key = f"{ARRAYS}/acts/{MLP}/c/{index}/0"
    dataset.store.delete(key)
    return key


def finished(directory: Path) -> tuple[Dataset, dict[str, str]]:
    dataset = write_dataset(directory, indexed=True)
    return dataset, tree_digests(directory, WORKERS_OWN)


def test_a_damaged_chunk_is_made_again_as_it_was(client: Client, tmp_path: Path) -> None:
    dataset, before = finished(tmp_path)
    lose(dataset, 7)
    producer = Producer(client, fresh_prefix(), tmp_path, "p")
    producer.repairs.ask(7)
    producer.run()
    assert producer.source.made == [7]
    assert producer.committed == [], "nothing new"
    assert tree_digests(tmp_path, WORKERS_OWN) == before
    assert not producer.repairs.is_open(7)


def test_repairs_come_before_new_chunks(client: Client, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, indices=range(6))
    lose(dataset, 5)
    prefix = fresh_prefix()
    asking = ChunkQueue(client, prefix, dataset.url, dataset.manifest.digest, "trainer", 20, repairs=True)
    asking.ask(5)

    def on_chunk(index: int) -> None:
        if index == 8:
            lose(dataset, 2)
            asking.ask(2)

    source = CountingSource(dataset.manifest, on_chunk=on_chunk)
    producer = Producer(client, prefix, tmp_path, "p", source)
    producer.run()
    assert source.made == [5, 6, 7, 8, 2, *range(9, CHUNKS)]
    for index in range(CHUNKS):
        dataset.read_chunk(index)


def test_they_ignore_the_budget(client: Client, tmp_path: Path) -> None:
    manifest = make_manifest(retention="window")
    dataset = write_dataset(tmp_path / "dataset", manifest, range(4))
    register_reader(dataset.store, Reader("slow", str(tmp_path / "runs"), 0, 1))
    lose(dataset, 3)
    producer = Producer(client, fresh_prefix(), dataset.url, "p", manifest=manifest, budget=2)
    producer.repairs.ask(3)
    thread = producer.start()
    eventually(lambda: producer.work.waiting.startswith("budget"))
    assert producer.source.made == [3]
    eventually(lambda: not producer.repairs.is_open(3))
    dataset.read_chunk(3)
    producer.stop.set()
    thread.join()


def test_a_chunk_that_nobody_needs_any_more_is_not_mended(client: Client, tmp_path: Path) -> None:
    dataset, _ = finished(tmp_path)
    key = lose(dataset, 3)
    producer = Producer(client, fresh_prefix(), tmp_path, "p")
    producer.retention._unneeded = 4
    producer.repairs.ask(3)
    producer.repairs.ask(4)
    producer.run()
    assert producer.source.made == [4]
    assert not producer.repairs.is_open(3)
    assert not dataset.store.exists(key)


def test_a_chunk_that_was_never_committed_is_written(client: Client, tmp_path: Path) -> None:
    dataset, before = finished(tmp_path)
    dataset.store.delete(commit_key(3))
    dataset.store.delete(index_key(0))
    producer = Producer(client, fresh_prefix(), tmp_path, "p")
    producer.repairs.ask(3)
    producer.run()
    assert 3 in producer.source.made
    assert tree_digests(tmp_path, WORKERS_OWN) == before


@pytest.mark.parametrize(
    "left", [CHUNKS, CHUNKS - 3], ids=["the last thing to do", "with new chunks to make"]
)
def test_only_three_mismatches_quarantine(client: Client, tmp_path: Path, left: int) -> None:
    dataset = write_dataset(tmp_path, indices=range(left))
    key = lose(dataset, 4)
    quarantined: list[bool] = []
    source = OtherNumerics(
        dataset.manifest, lambda index: quarantined.append(dataset.store.exists("quarantine/4.json"))
    )
    producer = Producer(client, fresh_prefix(), tmp_path, "p", source)
    producer.repairs.ask(4)
    producer.run()
    assert sink_module.MISMATCHES == 3
    assert source.made.count(4) == 3
    assert len(source.made) == 3 + CHUNKS - left
    assert dataset.quarantined() == {4}
    record = dataset.store.get_record("quarantine/4.json")
    assert record["index"] == 4
    assert record["reason"] == "3 recomputations by p are not what was committed"
    assert record == dataset.store.get_record("quarantine/4.copy")
    assert not dataset.store.exists(key), "the mismatching bytes were never stored"
    assert not producer.repairs.is_open(4)
    assert quarantined[:3] == [False] * 3


def test_mismatches_of_several_producers_are_not_added_up(client: Client, tmp_path: Path) -> None:
    """Each may be wrong by itself; the fifth producer is right."""
    dataset, before = finished(tmp_path)
    lose(dataset, 4)
    prefix = fresh_prefix()
    asking = ChunkQueue(client, prefix, dataset.url, dataset.manifest.digest, "trainer", 20, repairs=True)
    for number in range(4):
        asking.ask(4)
        producer = Producer(client, prefix, tmp_path, f"p{number}", OtherNumerics(dataset.manifest))
        for _ in range(2):
            task = producer.work.next(producer.stop)
            assert task == Task(4, repair=True)
            producer.sink.put(task, producer.source.chunk(4))
            producer.sink._settle()
        producer.work.release()
        producer.sink.finish()
        producer.writer.close()
    assert dataset.quarantined() == set()
    right = Producer(client, prefix, tmp_path, "right")
    right.run()
    assert right.source.made == [4]
    assert tree_digests(tmp_path, WORKERS_OWN) == before


def test_a_success_in_between_starts_the_count_again(client: Client, tmp_path: Path) -> None:
    dataset, _ = finished(tmp_path)
    producer = Producer(client, fresh_prefix(), tmp_path, "p")
    wrong = OtherNumerics(dataset.manifest)
    for source in (wrong, wrong, producer.source, wrong, wrong):
        lose(dataset, 4)
        producer.repairs.ask(4)
        assert producer.work.next(producer.stop) == Task(4, repair=True)
        producer.sink.put(Task(4, repair=True), source.chunk(4))
        producer.sink._settle()
    producer.sink.finish()
    producer.writer.close()
    assert dataset.quarantined() == set()


def test_a_repair_whose_lease_ended_is_made_by_another(client: Client, tmp_path: Path) -> None:
    """Deaths never quarantine: only completed recomputations count."""
    dataset, before = finished(tmp_path)
    lose(dataset, 4)
    prefix = fresh_prefix()
    for number in range(5):
        dead = Producer(client, prefix, tmp_path, f"dead{number}", lease_seconds=0.05)
        dead.repairs.ask(4)
        eventually(partial(_claimed, dead.work, Task(4, repair=True)))
        dead.sink.finish()
        dead.writer.close()
    living = Producer(client, prefix, tmp_path, "living")
    eventually(lambda: living.repairs.claim(CHUNKS) == 4)
    living.repairs.release(4)
    living.run()
    assert dataset.quarantined() == set()
    assert tree_digests(tmp_path, WORKERS_OWN) == before


def test_what_is_given_back_meanwhile_is_not_overlooked(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer with nothing else to do gives a repair back just while it looks for more to do."""
    dataset, _ = finished(tmp_path)
    lose(dataset, 4)
    producer = Producer(client, fresh_prefix(), tmp_path, "p")
    producer.repairs.ask(4)
    task = producer.work.next(producer.stop)
    assert task == Task(4, repair=True)
    claim = Work._claim
    giving: list[threading.Thread] = []

    def give_back_after_looking(work: Work) -> Task | None:
        found = claim(work)
        if not giving:
            giving.append(threading.Thread(target=producer.work.give_back, args=(task,), daemon=True))
            giving[0].start()
            giving[0].join(0.2)
        return found

    monkeypatch.setattr(Work, "_claim", give_back_after_looking)
    # everything is committed, and it is time to notice
    producer.work._reconciled = float("-inf")
    assert producer.work.next(producer.stop) == task
    producer.sink.finish()
    producer.writer.close()


def test_a_lost_connection_while_giving_back_costs_only_time(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, before = finished(tmp_path)
    lose(dataset, 4)
    prefix = fresh_prefix()
    wrong = Producer(client, prefix, tmp_path, "wrong", OtherNumerics(dataset.manifest), lease_seconds=0.1)
    wrong.repairs.ask(4)
    task = wrong.work.next(wrong.stop)
    assert task is not None

    def gone(index: int) -> None:
        raise redis.ConnectionError("connection lost")

    monkeypatch.setattr(wrong.repairs, "release", gone)
    wrong.sink.put(task, wrong.source.chunk(4))
    wrong.sink.finish()
    wrong.writer.close()
    assert wrong.work.held == set()
    right = Producer(client, prefix, tmp_path, "right")
    eventually(lambda: right.repairs.claim(CHUNKS) == 4)
    right.repairs.release(4)
    right.run()
    assert right.source.made == [4]
    assert tree_digests(tmp_path, WORKERS_OWN) == before


def _claimed(work: Work, wanted: Task) -> bool:
    return work._claim() == wanted
