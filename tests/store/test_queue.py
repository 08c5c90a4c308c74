"""The queue, on each Redis that we have: leases, feeds without gaps, and Redis losing everything."""

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TypeVar

import pytest

from penstock.common.redis import Client
from penstock.store import queue
from penstock.store.order import ReadingOrder
from penstock.store.queue import (
    ChunkQueue,
    Feed,
    FeedSpec,
    Presence,
    RunQueue,
    register_feed,
    registered_feed,
    registered_feeds,
    remove_feed,
)
from services.waiting import eventually

SHORT, LONG = 0.05, 60.0
"""Leases: one that is over soon, and one that is not over before the test is."""
ALL = 10**6
URL, RUNS = "/data/dataset", "/data/runs"

T = TypeVar("T")
MakeQueue = Callable[..., ChunkQueue]
MakeRuns = Callable[..., RunQueue]


@pytest.fixture(autouse=True)
def nothing_is_left(client: Client, prefix: str) -> Iterator[None]:
    yield
    forget_everything(client, prefix)


def forget_everything(client: Client, prefix: str) -> None:
    """What a Redis that restarted empty looks like, to one prefix."""
    for key in client.scan_iter(f"{prefix}:*"):
        client.delete(key)


@pytest.fixture
def chunks(client: Client, prefix: str) -> MakeQueue:
    def make(worker: str = "a", lease: float = LONG, url: str = URL, digest: str = "d") -> ChunkQueue:
        return ChunkQueue(client, prefix, url, digest, worker, lease)

    return make


@pytest.fixture
def runs(client: Client, prefix: str) -> MakeRuns:
    def make(worker: str = "a", lease: float = LONG) -> RunQueue:
        return RunQueue(client, prefix, RUNS, worker, lease)

    return make


def until(call: Callable[[], T], wanted: Callable[[T], bool]) -> list[T]:
    """What calling again and again gave, up to the first answer that is wanted."""
    answers: list[T] = []

    def once() -> bool:
        answers.append(call())
        return wanted(answers[-1])

    eventually(once)
    return answers


def drain(chunks: ChunkQueue) -> list[int]:
    """Claim until there is nothing left."""
    return list(iter(lambda: chunks.claim(ALL), None))


# Chunks to make


def test_the_lowest_chunk_is_claimed_first(chunks: MakeQueue) -> None:
    chunks().reconcile(12, {0, 3})
    assert drain(chunks()) == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert chunks().claim(ALL) is None


def test_chunks_from_the_limit_on_are_not_claimed(chunks: MakeQueue) -> None:
    chunks().reconcile(5, {0})
    assert [chunks().claim(3) for _ in range(3)] == [1, 2, None]
    assert chunks().claim(4) == 3


def test_claims_say_who_makes_what(chunks: MakeQueue) -> None:
    a, b = chunks("a"), chunks("b")
    a.reconcile(3, set())
    assert (a.claim(ALL), b.claim(ALL)) == (0, 1)
    assert a.claims() == {0: "a", 1: "b"}


def test_many_workers_never_claim_the_same_chunk(chunks: MakeQueue) -> None:
    chunks().reconcile(200, set())
    start = threading.Barrier(4)

    def work(worker: str) -> list[int]:
        start.wait()
        return drain(chunks(worker))

    with ThreadPoolExecutor(4) as pool:
        claimed = [index for made in pool.map(work, "abcd") for index in made]
    assert sorted(claimed) == list(range(200))


def test_an_expired_claim_returns_before_higher_ones(chunks: MakeQueue) -> None:
    dead, alive = chunks("dead", SHORT), chunks("alive")
    dead.reconcile(100_000, set(range(1, 99_000)))
    assert dead.claim(ALL) == 0
    claimed = until(lambda: alive.claim(ALL), lambda index: index == 0)
    assert claimed[:-1] == list(range(99_000, 99_000 + len(claimed) - 1))
    assert alive.claims()[0] == "alive"


def test_a_renewed_claim_stays(chunks: MakeQueue) -> None:
    short, other = chunks("a", SHORT), chunks("b")
    short.reconcile(2, set())
    assert (short.claim(ALL), short.claim(ALL)) == (0, 1)
    assert chunks("a", LONG).renew(0)
    claimed = until(lambda: other.claim(ALL), lambda index: index is not None)
    assert claimed[-1] == 1, "0 would have been over before it"
    assert other.claim(ALL) is None


def test_only_the_owner_renews(chunks: MakeQueue) -> None:
    a, b = chunks("a"), chunks("b")
    a.reconcile(2, set())
    assert a.claim(ALL) == 0
    assert a.renew(0)
    assert not b.renew(0)
    assert not a.renew(1), "never claimed"


def test_a_claim_that_went_to_another_is_not_renewed(chunks: MakeQueue) -> None:
    slow, quick = chunks("slow", SHORT), chunks("quick")
    slow.reconcile(1, set())
    slow.claim(ALL)
    eventually(lambda: quick.claim(ALL) == 0)
    assert not slow.renew(0)
    slow.release(0)
    assert quick.claims() == {0: "quick"}, "nor given back by it"
    assert quick.renew(0)


def test_a_released_chunk_is_claimed_at_once(chunks: MakeQueue) -> None:
    a, b = chunks("a"), chunks("b")
    a.reconcile(3, set())
    assert (a.claim(ALL), a.claim(ALL)) == (0, 1)
    a.release(0)
    assert a.claims() == {1: "a"}
    assert b.claim(ALL) == 0


def test_a_chunk_that_is_done_is_gone(chunks: MakeQueue) -> None:
    a, b = chunks("a", SHORT), chunks("b")
    a.reconcile(2, set())
    a.claim(ALL)
    a.done(0)
    assert not a.renew(0)
    a.release(0)
    assert a.claims() == {}
    b.done(1)
    assert b.claim(ALL) is None, "also if it was never claimed"


def test_reconciling_is_idempotent(chunks: MakeQueue) -> None:
    a = chunks("a")
    for _ in range(3):
        a.reconcile(6, {1})
    assert (a.claim(ALL), a.claim(ALL)) == (0, 2)
    for _ in range(3):
        a.reconcile(6, {1})
    assert a.claims() == {0: "a", 2: "a"}, "claims stay"
    assert drain(a) == [3, 4, 5]


def test_reconciling_forgets_what_was_committed_meanwhile(chunks: MakeQueue) -> None:
    a = chunks("a", SHORT)
    a.reconcile(6, set())
    assert (a.claim(ALL), a.claim(ALL)) == (0, 1)
    a.reconcile(6, {0, 3})
    assert a.claims() == {1: "a"}
    found = until(lambda: drain(chunks("b")), lambda indices: 1 in indices)
    assert sorted(index for indices in found for index in indices) == [1, 2, 4, 5]


def test_an_empty_redis_is_filled_from_the_store(chunks: MakeQueue, client: Client, prefix: str) -> None:
    a = chunks("a")
    a.reconcile(6, {0})
    assert a.claim(ALL) == 1
    forget_everything(client, prefix)
    assert not a.renew(1)
    a.release(1)
    assert a.claim(ALL) is None
    a.reconcile(6, {0, 1})
    assert drain(a) == [2, 3, 4, 5]


def test_a_redis_that_went_back_in_time_is_put_right(chunks: MakeQueue) -> None:
    """It still claims and lists what is committed by now."""
    a = chunks("a")
    a.reconcile(6, set())
    assert (a.claim(ALL), a.claim(ALL)) == (0, 1)
    a.reconcile(6, {0, 1, 2})
    assert a.claims() == {}
    assert drain(a) == [3, 4, 5]


def test_whatever_the_queue_holds_it_ends_as_the_store_says(
    chunks: MakeQueue, client: Client, prefix: str
) -> None:
    """Against the definition: to do is what is planned, not committed and not claimed."""
    a, draw, n = chunks("a"), random.Random(0), 400
    todo, claimed, owners = a._todo, a._claimed, a._owners
    for _ in range(40):
        client.delete(todo, claimed, owners)
        density = draw.choice([0.0, 0.01, 0.5, 0.99, 1.0])
        for index in range(n + 50):
            if draw.random() < 0.02:
                client.zadd(claimed, {str(index): 1e15 + draw.random()})
                client.hset(owners, str(index), "b")
            elif draw.random() < density:
                client.zadd(todo, {str(index): index})
        held = {int(index) for index in client.zrange(claimed, 0, -1)}
        missing = {index for index in range(n) if draw.random() < draw.choice([0.02, 0.5, 1.0])}
        a.reconcile(n, set(range(n)) - missing | {n, n + 3})
        assert client.zrange(todo, 0, -1, withscores=True) == [(str(i), i) for i in sorted(missing - held)]
        assert a.claims().keys() == missing & held
        assert {int(index) for index in client.zrange(claimed, 0, -1)} == missing & held


def test_a_queue_that_is_right_costs_little_however_long_it_is(chunks: MakeQueue, client: Client) -> None:
    def calls() -> int:
        stats = client.info("commandstats")
        return sum(s["calls"] for name, s in stats.items() if name.startswith(("cmdstat_z", "cmdstat_h")))

    a, n = chunks("a"), 50_000
    committed = set(range(1000)) | {7000, 30_000}
    a.reconcile(n, committed)
    assert [a.claim(ALL) for _ in range(3)] == [1000, 1001, 1002]
    before = calls()
    a.reconcile(n, committed)
    assert calls() - before < 20
    a.done(1000)  # committed since the listing
    before = calls()
    a.reconcile(n, committed)
    assert calls() - before < 200


def test_one_producer_at_a_time_indexes(chunks: MakeQueue) -> None:
    a, b = chunks("a", SHORT), chunks("b")
    assert a.lease_index()
    assert not b.lease_index()
    assert until(b.lease_index, bool)[-1]
    assert not a.lease_index()


def test_datasets_do_not_meet(chunks: MakeQueue) -> None:
    for other in (chunks(url="/data/other"), chunks(digest="e")):
        chunks().reconcile(1, set())
        assert other.claim(ALL) is None
        assert other.feeds_key != chunks().feeds_key
    assert chunks().claim(ALL) == 0


def test_scripts_are_loaded_again_after_a_restart(chunks: MakeQueue, client: Client) -> None:
    a = chunks()
    a.reconcile(2, set())
    client.script_flush()
    assert a.claim(ALL) == 0


# Feeds


@pytest.fixture
def spec(prefix: str) -> FeedSpec:
    """Two epochs of six chunks, from the start."""
    return FeedSpec(key=f"{prefix}:feed", start=0, sizes=(6,), epochs=2, window_chunks=2, seed=7)


@pytest.fixture
def feed(client: Client, spec: FeedSpec) -> Feed:
    feed = Feed(client, spec)
    feed.open()
    return feed


def in_order(spec: FeedSpec, start: int = 0) -> list[tuple[int, int]]:
    order = ReadingOrder(spec.sizes, spec.epochs, spec.window_chunks, spec.seed)
    return [(position, order.chunk_at(position)) for position in range(start, order.n_positions)]


def read(feed: Feed, position: int = 0) -> list[tuple[int, int]]:
    return feed.read(position, block_ms=1)


def test_positions_are_added_one_after_the_other(feed: Feed) -> None:
    assert read(feed) == []
    for position in range(3):
        assert feed.add(position, 10 + position)
    assert read(feed) == [(0, 10), (1, 11), (2, 12)]
    assert feed.length() == 3


def test_a_gap_is_refused(feed: Feed) -> None:
    assert not feed.add(1, 1)
    assert feed.add(0, 0)
    assert not feed.add(2, 2)
    assert feed.add(1, 1)
    assert read(feed) == [(0, 0), (1, 1)]


def test_a_duplicate_is_refused(feed: Feed) -> None:
    assert feed.add(0, 0)
    assert feed.add(1, 1)
    assert not feed.add(1, 5)
    assert not feed.add(0, 5)
    assert read(feed) == [(0, 0), (1, 1)]


def test_a_feed_starts_where_its_head_is(client: Client, prefix: str) -> None:
    feed = Feed(client, FeedSpec(f"{prefix}:feed", 5, (6,), 2, 2, 7))
    feed.open()
    assert not feed.add(4, 4)
    assert not feed.add(0, 0)
    assert not feed.add(6, 6)
    assert feed.add(5, 50)
    assert read(feed, 5) == [(5, 50)]


def test_opening_again_changes_nothing(feed: Feed) -> None:
    feed.add(0, 0)
    feed.open()
    assert read(feed) == [(0, 0)]
    assert feed.add(1, 1)


def test_opening_again_does_not_set_a_feed_back(client: Client, prefix: str) -> None:
    feed = Feed(client, FeedSpec(f"{prefix}:feed", 5, (6,), 2, 2, 7))
    feed.open()
    feed.add(5, 5)
    feed.trim(6)
    feed.open()
    assert not feed.add(5, 5)
    assert feed.add(6, 6)


def test_nobody_makes_a_feed_by_adding_to_it(client: Client, spec: FeedSpec) -> None:
    feed = Feed(client, spec)
    assert not feed.add(0, 0)
    assert feed.advance(lambda index: True) == 0
    assert read(feed) == []
    assert not client.exists(spec.key)


def test_reading_starts_at_a_position(feed: Feed) -> None:
    feed.advance(lambda index: True)
    assert read(feed, 4) == in_order(feed.spec, 4)
    assert read(feed, 12) == []


def test_a_reader_wakes_when_something_is_added(feed: Feed) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(feed.read, 0, 9000)
        assert feed.add(0, 3)
        assert waiting.result(timeout=8) == [(0, 3)]


def test_advancing_follows_the_reading_order_through_all_epochs(feed: Feed) -> None:
    assert feed.advance(lambda index: True) == 12
    assert read(feed) == in_order(feed.spec)
    assert feed.advance(lambda index: True) == 0


def test_advancing_stops_at_the_first_uncommitted_chunk(feed: Feed) -> None:
    committed = {0, 1, 3, 4}
    assert feed.advance(committed.__contains__) == 2
    assert feed.advance(committed.__contains__) == 0
    committed.add(2)
    assert feed.advance(committed.__contains__) == 3
    committed.add(5)
    assert feed.advance(committed.__contains__) == 7
    assert read(feed) == in_order(feed.spec)


def test_many_may_advance_at_once(feed: Feed, client: Client) -> None:
    start = threading.Barrier(4)

    def advance(_: int) -> int:
        own = Feed(client, feed.spec)
        start.wait()
        return own.advance(lambda index: True)

    with ThreadPoolExecutor(4) as pool:
        fed = sum(pool.map(advance, range(4)))
    fed += feed.advance(lambda index: True)
    assert fed == 12
    assert read(feed) == in_order(feed.spec)


def test_a_feed_does_not_run_far_ahead(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "FEED_AHEAD", 3)
    assert feed.advance(lambda index: True) == 3
    assert feed.advance(lambda index: True) == 0
    feed.trim(2)
    assert feed.advance(lambda index: True) == 2
    assert read(feed, 2) == in_order(feed.spec)[2:5]


def test_trimming_drops_what_is_in_a_head(feed: Feed) -> None:
    feed.advance(lambda index: True)
    feed.trim(5)
    assert read(feed) == in_order(feed.spec, 5)
    feed.trim(12)
    assert feed.length() == 0
    assert not feed.add(0, 0), "the last id outlives the entries"
    assert not feed.add(5, 0)


def test_a_feed_that_went_back_in_time_goes_on(feed: Feed) -> None:
    """Redis forgot positions 2 and up; the worker is at 4."""
    feed.rebuild(0)
    feed.add(0, 0)
    feed.add(1, 1)
    assert read(feed, 4) == []
    assert feed.advance(lambda index: True) == 10
    assert read(feed, 4) == in_order(feed.spec, 4)


def test_rebuilding_starts_again_at_a_position(client: Client, prefix: str) -> None:
    feed = Feed(client, FeedSpec(f"{prefix}:feed", 5, (6,), 2, 2, 7))
    feed.open()
    feed.add(5, 99)  # of another order
    feed.trim(6)
    feed.rebuild(7)
    assert read(feed, 5) == []
    assert not feed.add(6, 6 % 6), "nothing before the position"
    assert feed.advance(lambda index: True) == 5
    assert read(feed, 5) == in_order(feed.spec, 7)


def test_a_deleted_feed_is_gone(feed: Feed, client: Client) -> None:
    feed.delete()
    assert not client.exists(feed.spec.key)
    assert feed.length() == 0


def test_registered_feeds_are_advanced_by_whoever_commits(
    feed: Feed, client: Client, chunks: MakeQueue
) -> None:
    key = chunks().feeds_key
    register_feed(client, key, "run-1", feed.spec)
    register_feed(client, key, "run-1", feed.spec)
    (found,) = registered_feeds(client, key)
    assert found.spec == feed.spec
    assert found.advance(lambda index: index == 0) == 1
    assert read(feed) == [(0, 0)]


def test_a_removed_feed_leaves_nothing(feed: Feed, client: Client, chunks: MakeQueue) -> None:
    key = chunks().feeds_key
    remove_feed(client, key, "run-1")
    register_feed(client, key, "run-1", feed.spec)
    other = FeedSpec(**(asdict(feed.spec) | {"key": f"{feed.spec.key}-other"}))
    register_feed(client, key, "run-2", other)
    remove_feed(client, key, "run-1")
    assert [found.spec for found in registered_feeds(client, key)] == [other]
    assert registered_feed(client, key, "run-1") is None
    assert not client.exists(feed.spec.key)


# Runs


def test_the_run_that_is_least_far_is_leased_first(runs: MakeRuns) -> None:
    a = runs()
    for run, position in (("far", 90), ("near", 10), ("middle", 50)):
        a.add(run, position)
    assert a.pending() == {"near": 10, "middle": 50, "far": 90}
    assert [a.lease() for _ in range(4)] == ["near", "middle", "far", None]


def test_a_run_that_moved_on_is_sorted_anew(runs: MakeRuns) -> None:
    a = runs()
    a.add("first", 1)
    a.add("second", 2)
    a.add("first", 3)
    assert list(a.pending()) == ["second", "first"]
    assert a.lease() == "second"


def test_leases_are_exclusive(runs: MakeRuns) -> None:
    for number in range(20):
        runs().add(f"run-{number}", number)
    start = threading.Barrier(4)

    def work(worker: str) -> list[str]:
        start.wait()
        return list(iter(runs(worker).lease, None))

    with ThreadPoolExecutor(4) as pool:
        leased = [run for found in pool.map(work, "abcd") for run in found]
    assert sorted(leased) == sorted(f"run-{number}" for number in range(20))


def test_a_lease_says_who_holds_it(runs: MakeRuns) -> None:
    a, b = runs("a"), runs("b")
    a.add("run", 0)
    assert a.holder("run") is None
    assert a.lease() == "run"
    assert b.holder("run") == "a"
    assert b.lease() is None


def test_an_expired_lease_is_anyones(runs: MakeRuns) -> None:
    dead, alive = runs("dead", SHORT), runs("alive")
    dead.add("run", 0)
    assert dead.lease() == "run"
    eventually(lambda: alive.lease() == "run")
    assert not dead.renew("run")
    dead.release("run")
    assert alive.holder("run") == "alive"


def test_a_renewed_lease_stays(runs: MakeRuns) -> None:
    short, other = runs("a", SHORT), runs("b")
    short.add("kept", 0)
    short.add("left", 1)
    assert (short.lease(), short.lease()) == ("kept", "left")
    assert runs("a", LONG).renew("kept")
    leased = until(other.lease, lambda run: run is not None)
    assert leased[-1] == "left"
    assert other.holder("kept") == "a"


def test_only_the_holder_renews_and_releases(runs: MakeRuns) -> None:
    a, b = runs("a"), runs("b")
    a.add("run", 0)
    a.lease()
    assert a.renew("run")
    assert not b.renew("run")
    b.release("run")
    assert a.holder("run") == "a"
    a.release("run")
    assert a.holder("run") is None
    assert b.lease() == "run"
    assert not a.renew("run")


def test_a_run_that_ended_is_not_leased(runs: MakeRuns) -> None:
    a = runs()
    a.add("run", 0)
    a.remove("run")
    assert a.pending() == {}
    assert a.lease() is None


def test_feeds_of_lineages_do_not_meet(runs: MakeRuns, prefix: str) -> None:
    keys = {runs().feed_key(run, head) for run in ("a", "b") for head in (0, 1)}
    assert len(keys) == 4
    assert all(key.startswith(f"{prefix}:runs:") for key in keys)


# Presence


def test_everyone_is_who_spoke_lately(client: Client, prefix: str) -> None:
    a, b = Presence(client, prefix, "trainer-a"), Presence(client, prefix, "producer-b")
    assert a.everyone() == {}
    a.tell({"kind": "trainer", "port": 1})
    a.tell({"kind": "trainer", "port": 2})
    b.tell({"kind": "producer"})
    assert a.everyone() == {"trainer-a": {"kind": "trainer", "port": 2}, "producer-b": {"kind": "producer"}}
    b.leave()
    assert list(a.everyone()) == ["trainer-a"]


def test_the_silent_are_forgotten(client: Client, prefix: str) -> None:
    presence = Presence(client, prefix, "trainer-a")
    presence.tell({}, seconds=SHORT)
    eventually(lambda: presence.everyone() == {})


def test_every_key_is_below_the_prefix(
    client: Client, prefix: str, chunks: MakeQueue, runs: MakeRuns, feed: Feed
) -> None:
    """What docs list is what there is."""
    chunks().reconcile(3, set())
    chunks().claim(ALL)
    runs().add("run", 0)
    runs().lease()
    register_feed(client, chunks().feeds_key, "run", feed.spec)
    Presence(client, prefix, "me").tell({})
    found = {}
    for key in client.scan_iter(f"{prefix}:*"):
        parts = key.removeprefix(f"{prefix}:").split(":")
        found[":".join(parts[:1] + parts[2:] if len(parts) > 2 else parts)] = client.type(key)
    assert found == {
        "dataset:todo": "zset",
        "dataset:claimed": "zset",
        "dataset:owners": "hash",
        "dataset:feeds": "hash",
        "runs:pending": "zset",
        "runs:lease:run": "string",
        "feed": "stream",
        "presence:me": "string",
    }
