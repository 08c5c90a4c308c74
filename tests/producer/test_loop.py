"""The produce loop: producers share the chunks of one dataset, and nothing that dies changes its bytes."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from penstock.common.errors import Unavailable
from penstock.common.health import Health
from penstock.common.heartbeat import Heartbeat
from penstock.common.redis import Client
from penstock.producer import work as work_module
from penstock.producer.work import Task
from penstock.store.chunks import Chunk
from penstock.store.dataset import open_dataset
from penstock.store.objects import open_store
from penstock.store.queue import ChunkQueue, Feed, FeedSpec, register_feed
from penstock.store.writer import DatasetWriter
from services.producing import CountingSource, Producer, run_together
from services.synthetic import CHUNKS, SyntheticSource, make_manifest
from services.trees import tree_digests
from services.valkey import fresh_prefix
from services.waiting import eventually

WORKERS_OWN = ("provenance",)
"""Below the dataset, but not part of it."""


class FailingQueue(ChunkQueue):
    """Every call fails until it was tried a second time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.failures = 0
        self._failed: set[tuple[str, object]] = set()

    def _fail_once(self, name: str, argument: object = None) -> None:
        if (name, argument) not in self._failed:
            self._failed.add((name, argument))
            self.failures += 1
            raise redis.ConnectionError("connection lost")
        self._failed.discard((name, argument))

    def claim(self, limit: int) -> int | None:
        self._fail_once("claim")
        return super().claim(limit)

    def reconcile(self, planned: int, committed: set[int]) -> None:
        self._fail_once("reconcile")
        super().reconcile(planned, committed)

    def done(self, index: int) -> None:
        self._fail_once("done", index)
        super().done(index)


@pytest.fixture(scope="module")
def reference(client: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The dataset as one undisturbed producer makes it."""
    url = tmp_path_factory.mktemp("reference") / "dataset"
    producer = Producer(client, fresh_prefix(), url, "only")
    producer.run()
    assert producer.source.made == producer.committed == list(range(CHUNKS))
    return tree_digests(url, WORKERS_OWN)


@pytest.mark.parametrize("count", [2, 3])
def test_producers_share_the_chunks(
    client: Client, tmp_path: Path, reference: dict[str, str], count: int
) -> None:
    prefix = fresh_prefix()
    manifest = make_manifest()
    producers = [
        Producer(client, prefix, tmp_path / "dataset", f"p{i}", CountingSource(manifest, 0.02))
        for i in range(count)
    ]
    run_together(producers)
    assert sorted(index for p in producers for index in p.source.made) == list(range(CHUNKS))
    assert sorted(index for p in producers for index in p.committed) == list(range(CHUNKS))
    assert all(len(p.committed) >= 2 for p in producers)
    assert tree_digests(tmp_path / "dataset", WORKERS_OWN) == reference
    assert producers[0].queue.claims() == {}


def test_who_made_a_chunk_is_recorded_beside_it(client: Client, tmp_path: Path) -> None:
    before = time.time()
    producer = Producer(client, fresh_prefix(), tmp_path / "dataset", "someone")
    producer.run()
    for index in range(CHUNKS):
        record = producer.writer.store.get_record(f"provenance/{index}-someone.json")
        assert (record["index"], record["worker"]) == (index, "someone")
        assert before <= record["time"] <= time.time()


def test_a_dead_producers_chunk_is_made_after_its_lease(
    client: Client, tmp_path: Path, reference: dict[str, str]
) -> None:
    prefix, lease = fresh_prefix(), 1.0
    dead = Producer(client, prefix, tmp_path / "dataset", "dead", lease_seconds=lease)
    claimed_at = time.monotonic()
    assert dead.work.next(dead.stop) == Task(0)
    made_at: dict[int, float] = {}
    source = CountingSource(make_manifest(), on_chunk=lambda i: made_at.update({i: time.monotonic()}))
    living = Producer(client, prefix, tmp_path / "dataset", "living", source, lease_seconds=lease)
    living.run()
    assert source.made == [*range(1, CHUNKS), 0]
    assert made_at[0] - claimed_at >= lease
    assert tree_digests(tmp_path / "dataset", WORKERS_OWN) == reference


def test_a_slow_producers_chunk_stays_its_own_while_it_renews(client: Client, tmp_path: Path) -> None:
    prefix, lease = fresh_prefix(), 0.3
    url = tmp_path / "dataset"
    slow_source = CountingSource(make_manifest(), seconds=5 * lease)
    slow = Producer(client, prefix, url, "slow", slow_source, lease_seconds=lease)
    heartbeat = Heartbeat(slow.work.renew, lease, Health())
    thread = threading.Thread(target=slow.run, daemon=True)
    thread.start()
    eventually(lambda: slow.work.held)
    quick = Producer(client, prefix, url, "quick", lease_seconds=lease)
    quick.run()
    thread.join()
    heartbeat.close()
    assert 0 in slow.committed
    assert 0 not in quick.source.made


def test_a_chunk_given_back_is_made_at_once(client: Client, tmp_path: Path) -> None:
    prefix = fresh_prefix()
    leaving = Producer(client, prefix, tmp_path / "dataset", "leaving")
    assert leaving.work.next(leaving.stop) == Task(0)
    leaving.work.release()
    staying = Producer(client, prefix, tmp_path / "dataset", "staying")
    assert staying.work.next(staying.stop) == Task(0)


def test_a_committed_chunk_that_the_queue_still_offers_is_not_made_again(
    client: Client, tmp_path: Path
) -> None:
    """As after Redis came back older than it was."""
    manifest = make_manifest()
    prefix, url = fresh_prefix(), tmp_path / "dataset"

    def commit_elsewhere(index: int) -> None:
        if index == 0:
            writer = DatasetWriter(open_store(str(url)), manifest)
            for other in (1, 5):
                writer.write(other, SyntheticSource(manifest).chunk(other))
            writer.close()

    source = CountingSource(manifest, on_chunk=commit_elsewhere)
    producer = Producer(client, prefix, url, "p", source)
    producer.run()
    assert source.made == [i for i in range(CHUNKS) if i not in (1, 5)]
    assert len(open_dataset(str(url)).committed()) == CHUNKS


def test_a_finished_dataset_is_left_alone(client: Client, tmp_path: Path) -> None:
    url = tmp_path / "dataset"
    Producer(client, fresh_prefix(), url, "first").run()
    before = tree_digests(url)
    again = Producer(client, fresh_prefix(), url, "second")
    again.run()
    assert again.source.made == []
    assert tree_digests(url) == before


def test_lost_redis_connections_are_survived(
    client: Client, tmp_path: Path, reference: dict[str, str]
) -> None:
    manifest = make_manifest()
    url = tmp_path / "dataset"

    def commit_elsewhere(index: int) -> None:
        if index == 0:
            writer = DatasetWriter(open_store(str(url)), manifest)
            writer.write(7, SyntheticSource(manifest).chunk(7))
            writer.close()

    source = CountingSource(manifest, on_chunk=commit_elsewhere)
    producer = Producer(client, fresh_prefix(), url, "p", source, queue=FailingQueue)
    producer.run()
    assert isinstance(producer.queue, FailingQueue)
    assert producer.queue.failures > CHUNKS
    assert sorted(source.made) == [i for i in range(CHUNKS) if i != 7]
    assert tree_digests(url, WORKERS_OWN) == reference


def test_redis_gone_for_good_ends_the_producer(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_module, "REDIS_PATIENCE_SECONDS", 0.1)
    gone: Client = redis.Redis(
        unix_socket_path=str(tmp_path / "none.sock"), protocol=2, retry=Retry(NoBackoff(), 0)
    )
    producer = Producer(gone, fresh_prefix(), tmp_path / "dataset", "p")
    with pytest.raises(Unavailable, match="redis has not answered for"):
        producer.run()


def test_what_goes_wrong_while_storing_reaches_the_loop(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = Producer(client, fresh_prefix(), tmp_path / "dataset", "p")

    def full(index: int, chunk: Chunk, worker: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(producer.writer, "write", full)
    with pytest.raises(OSError, match="no space left"):
        producer.run()
    assert open_dataset(str(tmp_path / "dataset")).committed() == set()


def test_a_stop_finishes_the_chunk_in_hand(client: Client, tmp_path: Path) -> None:
    producer = Producer(client, fresh_prefix(), tmp_path / "dataset", "p")
    producer.source = CountingSource(
        make_manifest(), on_chunk=lambda index: producer.stop.set() if index == 3 else None
    )
    producer.run()
    assert open_dataset(str(tmp_path / "dataset")).committed() == {0, 1, 2, 3}


def test_commits_are_announced_in_reading_order(client: Client, tmp_path: Path) -> None:
    """To every run that reads the dataset; chunk 2 comes last here, and holds up what follows it."""
    prefix = fresh_prefix()
    url = tmp_path / "dataset"
    feeds = []
    for number, start in enumerate((0, 4)):
        spec = FeedSpec(f"{prefix}:feed{number}", start, (CHUNKS,), 2, 4, number)
        feeds.append(Feed(client, spec))
        feeds[-1].open()
    slow = Producer(client, prefix, url, "slow")
    for number, feed in enumerate(feeds):
        register_feed(client, slow.queue.feeds_key, f"run{number}", feed.spec)
    manifest = slow.manifest
    for index in (0, 1, 2):
        assert slow.work.next(slow.stop) == Task(index)
    for index in (0, 1):
        slow.sink.put(Task(index), SyntheticSource(manifest).chunk(index))
    slow.sink._settle()
    other = Producer(client, prefix, url, "other")
    thread = threading.Thread(target=other.run, daemon=True)
    thread.start()
    eventually(lambda: len(other.committed) == CHUNKS - 3)
    assert [chunk for _, chunk in feeds[0].read(0, 10)] == [0, 1]
    slow.sink.put(Task(2), SyntheticSource(manifest).chunk(2))
    slow.sink.finish()
    thread.join()
    for feed in feeds:
        order = feed.spec.order
        expected = [(p, order.chunk_at(p)) for p in range(feed.spec.start, 2 * CHUNKS)]
        assert feed.read(0, 10) == expected
