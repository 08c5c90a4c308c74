"""Repairs in the queue, reconciling in one step, and runs that are left out: on each Redis that we have."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock.common.redis import Client
from penstock.store.queue import ChunkQueue, RunQueue, repairs_wanted
from services.waiting import eventually

URL, DIGEST = "/data/dataset", "d"
ALL = 10**6
MakeQueue = Callable[..., ChunkQueue]


@pytest.fixture(autouse=True)
def nothing_is_left(client: Client, prefix: str) -> Iterator[None]:
    yield
    for key in client.scan_iter(f"{prefix}:*"):
        client.delete(key)


@pytest.fixture
def chunks(client: Client, prefix: str) -> MakeQueue:
    def make(worker: str = "a", repairs: bool = False, lease: float = 60.0, url: str = URL) -> ChunkQueue:
        return ChunkQueue(client, prefix, url, DIGEST, worker, lease, repairs)

    return make


class TestRepairs:
    def test_they_and_new_chunks_do_not_meet(self, chunks: MakeQueue) -> None:
        new, repairs = chunks(), chunks(repairs=True)
        new.reconcile(3, set())
        repairs.ask(7)
        assert repairs.claim(ALL) == 7
        assert repairs.claim(ALL) is None
        assert [new.claim(ALL) for _ in range(4)] == [0, 1, 2, None]
        new.reconcile(3, {0, 1, 2})
        assert repairs.claims() == {7: "a"}
        assert new.claims() == {}
        assert new.feeds_key == repairs.feeds_key, "feeds are those of the dataset"

    def test_asking_twice_is_once(self, chunks: MakeQueue) -> None:
        repairs, other = chunks(repairs=True), chunks("b", repairs=True)
        repairs.ask(7)
        other.ask(7)
        assert repairs.claim(ALL) == 7
        other.ask(7)
        assert other.claim(ALL) is None, "it is being made"
        repairs.done(7)
        other.ask(7)
        assert other.claim(ALL) == 7, "it was damaged again"

    def test_the_lowest_comes_first(self, chunks: MakeQueue) -> None:
        repairs = chunks(repairs=True)
        for index in (20, 3, 100):
            repairs.ask(index)
        assert [repairs.claim(ALL) for _ in range(3)] == [3, 20, 100]

    def test_a_repair_is_open_until_it_is_done(self, chunks: MakeQueue) -> None:
        repairs = chunks(repairs=True)
        assert not repairs.is_open(7)
        repairs.ask(7)
        assert repairs.is_open(7)
        assert not repairs.is_open(8)
        repairs.claim(ALL)
        assert repairs.is_open(7)
        repairs.release(7)
        assert repairs.is_open(7)
        repairs.done(7)
        assert not repairs.is_open(7)

    def test_whether_any_is_wanted_can_be_asked(self, chunks: MakeQueue, client: Client, prefix: str) -> None:
        def wanted() -> bool:
            return repairs_wanted(client, prefix, URL, DIGEST)

        chunks().reconcile(3, set())
        chunks(repairs=True, url="/data/other").ask(1)
        assert not wanted()
        repairs = chunks(repairs=True)
        repairs.ask(7)
        assert wanted()
        repairs.claim(ALL)
        assert wanted(), "whoever makes it may die"
        repairs.done(7)
        assert not wanted()

    def test_one_whose_maker_died_returns(self, chunks: MakeQueue) -> None:
        dead = chunks("dead", repairs=True, lease=0.05)
        dead.ask(7)
        assert dead.claim(ALL) == 7
        eventually(lambda: chunks("b", repairs=True).claim(ALL) == 7)


class TestReconciling:
    def test_nobody_claims_twice_while_others_reconcile(self, chunks: MakeQueue) -> None:
        start = threading.Barrier(4)

        def work(worker: str) -> list[int]:
            queue = chunks(worker)
            start.wait()
            claimed: list[int] = []
            while True:
                queue.reconcile(40, set())
                index = queue.claim(ALL)
                if index is None:
                    return claimed
                claimed.append(index)

        with ThreadPoolExecutor(4) as pool:
            claimed = [index for part in pool.map(work, "abcd") for index in part]
        assert sorted(claimed) == list(range(40))

    def test_a_claim_of_what_is_committed_is_forgotten_with_its_owner(self, chunks: MakeQueue) -> None:
        queue = chunks()
        queue.reconcile(3, set())
        assert [queue.claim(ALL) for _ in range(2)] == [0, 1]
        queue.reconcile(3, {0})
        assert queue.claims() == {1: "a"}
        assert queue.claim(ALL) == 2

    def test_nothing_left_is_fine(self, chunks: MakeQueue) -> None:
        queue = chunks()
        queue.reconcile(3, set())
        queue.claim(ALL)
        queue.reconcile(3, {0, 1, 2})
        assert queue.claim(ALL) is None
        assert queue.claims() == {}

    def test_many_chunks(self, chunks: MakeQueue) -> None:
        """More than the arguments that Lua could unpack at once."""
        queue = chunks()
        queue.reconcile(20_000, set(range(0, 20_000, 2)))
        assert [queue.claim(ALL) for _ in range(3)] == [1, 3, 5]


def test_a_run_that_is_left_out_is_not_leased(client: Client, prefix: str) -> None:
    queue = RunQueue(client, prefix, "/data/runs", "a", 60)
    for position, run in enumerate(("first", "second", "third")):
        queue.add(run, position)
    assert queue.lease(["first"]) == "second"
    assert queue.lease(["first", "third"]) is None
    assert queue.holder("first") is None
    assert queue.lease() == "first"
    assert queue.lease(iter(["other"])) == "third"
