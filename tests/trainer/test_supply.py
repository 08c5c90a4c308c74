"""Where a worker learns of its next chunk: the feed, and the store whenever the feed is silent or wrong."""

import threading
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from penstock.common import metrics
from penstock.common.redis import Client
from penstock.store.dataset import Dataset
from penstock.store.joined import JoinedDataset
from penstock.store.layout import commit_key
from penstock.store.local import LocalStore
from penstock.store.queue import ChunkQueue, Feed, FeedSpec, Presence
from penstock.trainer import supply
from penstock.trainer.mending import Mender, Stopped
from penstock.trainer.supply import Supply
from services.synthetic import make_manifest
from services.valkey import fresh_prefix

CHUNKS, EPOCHS = 6, 2


class Desk:
    """A supply with everything around it."""

    def __init__(self, client: Client, directory: Path, start: int = 0) -> None:
        self.store = LocalStore(str(directory))
        self.spec = FeedSpec(f"{fresh_prefix()}:feed", start, (CHUNKS,), EPOCHS, 2, seed=3)
        self.feed = Feed(client, self.spec)
        self.feed.open()
        self.stop = threading.Event()
        self.beats = 0
        self.registered = 0
        self.supply = self.supply_of(self.feed, client)

    def supply_of(self, feed: Feed, client: Client) -> Supply:
        data = JoinedDataset([Dataset(self.store, make_manifest([1] * CHUNKS))])
        queue = ChunkQueue(client, fresh_prefix(), data.url, "digest", "trainer", 20, repairs=True)
        mender = Mender(data, "run", [queue], Presence(client, fresh_prefix(), "trainer"), self.stop)
        return Supply(feed, data, mender, self._register, self.stop, self._beat)

    def _register(self) -> None:
        self.registered += 1

    def _beat(self) -> None:
        self.beats += 1

    def commit(self, *chunks: int) -> None:
        for chunk in chunks:
            self.store.create(commit_key(chunk), b"")

    def fed(self) -> list[tuple[int, int]]:
        return self.feed.read(0, 1)

    def expected(self, *positions: int) -> list[tuple[int, int]]:
        return [(p, self.spec.order.chunk_at(p)) for p in positions]

    def await_position(self, position: int) -> None:
        self.supply.await_chunk(position, self.spec.order.chunk_at(position))


@pytest.fixture
def desk(client: Client, tmp_path: Path) -> Desk:
    return Desk(client, tmp_path / "dataset")


def test_what_is_fed_is_taken_without_asking_the_store(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for position in range(CHUNKS * EPOCHS):
        assert desk.feed.add(position, desk.spec.order.chunk_at(position))
    monkeypatch.setattr(desk.store, "exists", lambda key: pytest.fail("the store was asked"))
    for position in range(CHUNKS * EPOCHS):
        desk.await_position(position)
        assert desk.supply.waiting_for is None
    assert desk.beats >= 1


def test_a_later_start_skips_what_is_behind(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for position in range(5):
        desk.feed.add(position, desk.spec.order.chunk_at(position))
    monkeypatch.setattr(desk.store, "exists", lambda key: pytest.fail("the store was asked"))
    desk.await_position(3)
    desk.await_position(4)


def test_a_silent_feed_is_fed_from_the_store(desk: Desk) -> None:
    desk.commit(0, 1, 3)
    desk.await_position(0)
    assert desk.fed() == desk.expected(0, 1), "chunk 3 must wait for chunk 2"
    desk.commit(2)
    desk.await_position(1)
    desk.await_position(2)
    assert desk.fed() == desk.expected(0, 1, 2, 3)


def test_it_waits_until_the_chunk_is_committed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply, "BLOCK_MS", 5)
    timer = threading.Timer(0.2, desk.commit, [0])
    started = time.monotonic()
    timer.start()
    desk.await_position(0)
    assert time.monotonic() - started >= 0.19
    assert desk.beats >= 2, "polls that are answered are progress"
    timer.join()


def test_an_announcement_wakes_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply, "BLOCK_MS", 9_000)
    monkeypatch.setattr(desk.store, "exists", lambda key: pytest.fail("the store was asked"))
    timer = threading.Timer(0.1, desk.feed.add, [0, 0])
    started = time.monotonic()
    timer.start()
    desk.await_position(0)
    assert time.monotonic() - started < 5
    timer.join()


@pytest.mark.parametrize("wrong", [(0, 4), (3, 3)], ids=["another chunk", "a gap"])
def test_a_feed_that_does_not_match_is_rebuilt(desk: Desk, client: Client, wrong: tuple[int, int]) -> None:
    """Redis went back in time, or someone wrote what he should not have."""
    position, chunk = wrong
    desk.commit(0, 1)
    client.delete(desk.spec.key)
    client.xadd(desk.spec.key, {"chunk": chunk}, id=f"{position + 1}-0")
    before = _rebuilds()
    desk.await_position(0)
    assert _rebuilds() == before + 1
    assert desk.fed() == desk.expected(0, 1)


def test_a_feed_whose_chunk_is_not_committed_waits_for_the_store(desk: Desk, client: Client) -> None:
    client.delete(desk.spec.key)
    client.xadd(desk.spec.key, {"chunk": 5}, id="1-0")
    waiting = threading.Thread(target=desk.await_position, args=(0,), daemon=True)
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    assert desk.supply.waiting_for == "chunk 0"
    desk.commit(0)
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_stream_that_vanished_is_made_again_where_the_lineage_began(client: Client, tmp_path: Path) -> None:
    desk = Desk(client, tmp_path / "dataset", start=4)
    desk.commit(*range(CHUNKS))
    client.delete(desk.spec.key)
    desk.await_position(7)
    assert desk.fed() == desk.expected(*range(4, CHUNKS * EPOCHS))
    assert desk.spec.order.chunk_at(7) != 1, "the second epoch has an order of its own"


def test_without_redis_the_store_is_asked(tmp_path: Path, client: Client) -> None:
    desk = Desk(client, tmp_path / "dataset")
    gone: Client = redis.Redis(
        unix_socket_path=str(tmp_path / "none.sock"), protocol=2, retry=Retry(NoBackoff(), 0)
    )
    alone = desk.supply_of(Feed(gone, desk.spec), gone)
    desk.commit(0, 1)
    alone.await_chunk(0, 0)
    alone.await_chunk(1, 1)
    assert desk.beats == 2


@pytest.mark.parametrize("when", ["before", "while waiting"])
def test_a_stop_ends_the_waiting(desk: Desk, when: str) -> None:
    if when == "before":
        desk.stop.set()
    else:
        threading.Timer(0.05, desk.stop.set).start()
    with pytest.raises(Stopped):
        desk.await_position(0)


def _rebuilds() -> float:
    return metrics.REGISTRY.get_sample_value("penstock_queue_rebuilds_total") or 0.0
