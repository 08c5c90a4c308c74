"""Leases are renewed while there is progress, and only then. Time is the test's."""

import threading
from collections.abc import Callable, Iterator

import pytest
import redis

from penstock.common import heartbeat
from penstock.common.health import Health
from penstock.common.heartbeat import PROGRESS_WITHIN_SECONDS, Heartbeat
from services.waiting import eventually

LEASE_SECONDS = 0.03


class Clock:
    """Stands in for the `time` module and counts how often it was read."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.reads = 0

    def monotonic(self) -> float:
        self.reads += 1
        return self.now

    def wait_for_reads(self, more: int = 4) -> None:
        """Until the heartbeat has come round `more` times."""
        wanted = self.reads + more
        eventually(lambda: self.reads >= wanted)


class Renewals:
    """Counts, and fails as often as it is told to."""

    def __init__(self) -> None:
        self.count = 0
        self.failures = 0

    def __call__(self) -> None:
        self.count += 1
        if self.failures > 0:
            self.failures -= 1
            raise redis.ConnectionError("gone")

    def wait_for(self, more: int = 3) -> None:
        wanted = self.count + more
        eventually(lambda: self.count >= wanted)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


@pytest.fixture
def renewals() -> Renewals:
    return Renewals()


@pytest.fixture
def beating(clock: Clock, renewals: Callable[[], None]) -> Iterator[Heartbeat]:
    beating = Heartbeat(renewals, LEASE_SECONDS, Health())
    yield beating
    beating.close()


def test_renews_while_the_loop_beats(clock: Clock, renewals: Renewals, beating: Heartbeat) -> None:
    for _ in range(3):
        clock.now += PROGRESS_WITHIN_SECONDS - 1
        beating.beat()
        renewals.wait_for()


def test_stops_renewing_without_progress(clock: Clock, renewals: Renewals, beating: Heartbeat) -> None:
    renewals.wait_for(1)
    clock.now += PROGRESS_WITHIN_SECONDS + 1
    clock.wait_for_reads()  # a renewal may have been on its way
    before = renewals.count
    clock.wait_for_reads(8)
    assert renewals.count == before
    beating.beat()
    renewals.wait_for()


def test_survives_redis_errors(renewals: Renewals, beating: Heartbeat) -> None:
    renewals.failures = 2
    renewals.wait_for(4)
    assert renewals.failures == 0


def test_a_beat_is_told_to_the_health_endpoint(clock: Clock, renewals: Renewals) -> None:
    class Told(Health):
        beats = 0

        def beat(self) -> None:
            self.beats += 1

    health = Told()
    beating = Heartbeat(renewals, 60.0, health)
    beating.beat()
    beating.close()
    assert health.beats == 1


def test_close_ends_the_thread_at_once(renewals: Renewals) -> None:
    beating = Heartbeat(renewals, 3600.0, Health())
    assert any(thread.name == "heartbeat" for thread in threading.enumerate())
    beating.close()
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())
    assert renewals.count == 0
