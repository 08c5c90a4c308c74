"""Trying again: bounded in number and time, with pauses that differ, and never unseen."""

import itertools
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.retries import (
    ATTEMPTS,
    FIRST_PAUSE,
    LAST_ATTEMPT_AFTER,
    LONGEST_PAUSE,
    OBJECTS,
    ONCE,
    REDIS,
    Bounds,
    retrying,
)


class Passing(Exception):
    """Passes by itself."""


class Service:
    """Fails as often as told; `clock` is all the time there is."""

    def __init__(self, failures: int, takes: float = 0.0) -> None:
        self.failures = failures
        self.takes = takes
        self.clock = 0.0
        self.pauses: list[float] = []
        self.started: list[float] = []
        self.told: list[BaseException] = []

    def call(self) -> str:
        self.started.append(self.clock)
        self.clock += self.takes
        if len(self.started) <= self.failures:
            raise Passing(f"failure {len(self.started)}")
        return "done"

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.clock += seconds

    def try_it(self, bounds: Bounds = OBJECTS) -> str:
        policy = retrying(lambda e: isinstance(e, Passing), self.told.append, self.sleep, bounds)
        return policy(self.call)


@pytest.fixture
def on_its_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Service], Service]:
    """Let the process's clock be a service's own."""

    def use(service: Service) -> Service:
        monkeypatch.setattr(time, "monotonic", lambda: service.clock)
        return service

    return use


def test_the_figures_of_the_protocol() -> None:
    assert (ATTEMPTS, LAST_ATTEMPT_AFTER, LONGEST_PAUSE) == (6, 60.0, 5.0)
    assert Bounds(6, 60.0, 5.0) == OBJECTS


def test_redis_is_given_up_sooner() -> None:
    assert REDIS.attempts < OBJECTS.attempts
    assert REDIS.last_attempt_after < OBJECTS.last_attempt_after
    assert REDIS.longest_pause < OBJECTS.longest_pause


@pytest.mark.parametrize("bounds", [OBJECTS, REDIS, ONCE])
def test_what_passes_within_the_bounds_is_not_seen(bounds: Bounds) -> None:
    service = Service(failures=bounds.attempts - 1)
    assert service.try_it(bounds) == "done"
    assert len(service.started) == bounds.attempts


@pytest.mark.parametrize("bounds", [OBJECTS, REDIS, ONCE])
def test_attempts_are_bounded_and_the_last_error_is_raised(bounds: Bounds) -> None:
    service = Service(failures=1000)
    with pytest.raises(Passing, match=f"^failure {bounds.attempts}$"):
        service.try_it(bounds)


def test_every_retry_is_told_and_nothing_else() -> None:
    service = Service(failures=2)
    service.try_it()
    assert [str(error) for error in service.told] == ["failure 1", "failure 2"]
    service = Service(failures=1000)
    with pytest.raises(Passing):
        service.try_it()
    assert len(service.told) == ATTEMPTS - 1, "the last failure is raised, not told"


def test_what_does_not_pass_is_raised_at_once() -> None:
    calls, told = itertools.count(1), list[BaseException]()

    def refuse() -> None:
        raise PermissionError(f"call {next(calls)}")

    with pytest.raises(PermissionError, match="call 1"):
        retrying(lambda e: isinstance(e, Passing), told.append)(refuse)
    assert told == []


@given(
    takes=st.floats(0, 100), attempts=st.integers(1, 50), after=st.floats(0, 200), longest=st.floats(0, 30)
)
def test_no_attempt_begins_after_its_time(takes: float, attempts: int, after: float, longest: float) -> None:
    service = Service(failures=10_000, takes=takes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: service.clock)
        with pytest.raises(Passing):
            service.try_it(Bounds(attempts, after, longest))
    assert len(service.started) <= attempts
    assert service.started[-1] <= after + 1e-6
    assert all(0 <= pause <= longest for pause in service.pauses)


def test_slow_failures_are_given_up_by_time(on_its_clock: Callable[[Service], Service]) -> None:
    service = on_its_clock(Service(failures=1000, takes=31.0))
    with pytest.raises(Passing):
        service.try_it()
    assert len(service.started) == 2


def test_simulated_pauses_count_although_no_clock_runs() -> None:
    service = Service(failures=10_000)
    with pytest.raises(Passing):
        service.try_it(Bounds(attempts=10_000))
    assert LAST_ATTEMPT_AFTER - LONGEST_PAUSE <= service.clock <= LAST_ATTEMPT_AFTER


def test_pauses_grow_and_differ() -> None:
    def pauses() -> Iterator[list[float]]:
        for _ in range(200):
            service = Service(failures=ATTEMPTS - 1)
            service.try_it()
            yield service.pauses

    columns = list(zip(*pauses(), strict=True))
    for number, column in enumerate(columns):
        bound = min(LONGEST_PAUSE, FIRST_PAUSE * 2**number)
        assert max(column) <= bound
        assert max(column) > 0.9 * bound, "the whole range is used"
        assert FIRST_PAUSE / 2 <= min(column) < FIRST_PAUSE / 2 + 0.1 * bound
        assert len(set(column)) == len(column)


def test_pauses_are_real_unless_told_otherwise() -> None:
    service = Service(failures=1)
    began = time.monotonic()
    policy = retrying(lambda e: isinstance(e, Passing), service.told.append, bounds=OBJECTS)
    policy.wait = lambda state: 0.05
    assert policy(service.call) == "done"
    assert time.monotonic() - began >= 0.05
