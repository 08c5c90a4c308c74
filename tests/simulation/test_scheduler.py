"""The simulation itself: turns, time, and what crashing and freezing a process do."""

import gc
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from simulation.scheduler import WALL_START, Crashed, Event, Scheduler, Stuck, current, in_turn, outside
from simulation.world import patched_world


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    with patched_world():
        yield


def turns(seed: int, stickiness: float = 0.0) -> tuple[list[str], list[object]]:
    """Who took which turn, and the trace, when three actors take five turns each."""
    said: list[str] = []
    with Scheduler(seed, stickiness, trace=None) as world:

        def work(name: str) -> Callable[[], None]:
            def run() -> None:
                for _ in range(5):
                    said.append(name)
                    world.pause()
                    time.sleep(random.random())
                said.append(uuid.uuid4().hex)

            return run

        for name in "abc":
            world.process(name).spawn(work(name))
        world.run()
        return said, list(world.trace)


def test_a_seed_gives_one_schedule() -> None:
    assert turns(1) == turns(1)
    assert turns(1, 0.5) == turns(1, 0.5)
    assert len({tuple(turns(seed)[0]) for seed in range(20)}) == 20


def test_time_moves_only_while_nobody_can_run() -> None:
    seen: list[tuple[str, float]] = []
    with Scheduler(0) as world:

        def sleeper() -> None:
            time.sleep(10.0)
            seen.append(("slept", time.monotonic()))

        def worker() -> None:
            for _ in range(100):
                world.pause()
            seen.append(("worked", time.monotonic()))

        world.process("a").spawn(sleeper)
        world.process("b").spawn(worker)
        world.run()
        assert seen == [("worked", 0.0), ("slept", 10.0)]
        assert time.time() == WALL_START + 10.0


def test_outside_of_a_simulation_all_is_real() -> None:
    assert abs(time.time() - WALL_START) > 1e6
    assert type(threading.Event()) is not Event
    assert isinstance(threading.Event(), threading.Event)
    with Scheduler(0):
        assert time.monotonic() == 0.0
        assert isinstance(threading.Event(), threading.Event)
        assert type(threading.Event()) is Event
        with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="pool"):
            pool.submit(time.monotonic)
        with outside():
            assert time.time() != WALL_START
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(time.monotonic).result() > 0.0
    assert time.time() != WALL_START


def test_chance_outside_goes_on_as_if_nothing_had_been() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    with Scheduler(1):
        first = random.random()
    with Scheduler(1):
        assert random.random() == first
    assert random.random() == expected


def test_an_event_wakes_whoever_waits() -> None:
    woken: list[tuple[float, bool]] = []
    with Scheduler(0) as world:
        event = threading.Event()

        def wait(timeout: float | None) -> Callable[[], None]:
            return lambda: woken.append((timeout or 0.0, event.wait(timeout)))

        def set_later() -> None:
            time.sleep(5.0)
            event.set()

        process = world.process("a")
        for timeout in (None, 1.0, 9.0):
            process.spawn(wait(timeout))
        process.spawn(set_later)
        world.run()
        assert sorted(woken) == [(0.0, True), (1.0, False), (9.0, True)]
        assert time.monotonic() == 5.0


def test_a_crash_undoes_nothing_and_lets_nothing_happen() -> None:
    effects: list[str] = []
    with Scheduler(3) as world:

        def request(what: str) -> None:
            world.request(what)
            effects.append(what)
            world.pause()

        def main() -> None:
            try:
                request("first")
                try:
                    time.sleep(100.0)
                except Exception:
                    effects.append("caught")
                effects.append("went on")
            finally:
                request("release")

        def beat() -> None:
            while True:
                time.sleep(1.0)
                effects.append("beat")

        victim, killer = world.process("victim"), world.process("killer")
        victim.spawn(main)
        victim.spawn(beat, "heartbeat", daemon=True)
        killer.spawn(in_turn(partial(time.sleep, 2.5), victim.crash))
        world.run()
        assert effects == ["first", "beat", "beat"]
        assert victim.crashed
        assert victim.ended
        with pytest.raises(Crashed):
            victim.spawn(main)


def test_a_process_can_crash_at_a_given_request() -> None:
    for number in range(4):
        effects: list[int] = []
        with Scheduler(3) as world:

            def main() -> None:
                for what in range(3):
                    world.request(what)
                    effects.append(what)  # noqa: B023

            process = world.process("victim")
            process.crash_at = number
            process.spawn(main)
            world.run()
            assert effects == list(range(min(number, 3)))
            assert process.crashed == (number < 3)


def test_a_frozen_process_does_nothing_and_then_goes_on() -> None:
    seen: list[tuple[str, float]] = []
    with Scheduler(0) as world:
        a, b = world.process("a"), world.process("b")

        def work(name: str) -> Callable[[], None]:
            def run() -> None:
                for _ in range(3):
                    time.sleep(1.0)
                    seen.append((name, time.monotonic()))

            return run

        a.spawn(work("a"))
        b.spawn(work("b"))
        b.spawn(in_turn(partial(time.sleep, 1.5), partial(a.freeze, 10.0)), "freezer")
        world.run()
        assert [at for name, at in seen if name == "a"] == [1.0, 11.5, 12.5]
        assert [at for name, at in seen if name == "b"] == [1.0, 2.0, 3.0]


def test_a_process_may_be_frozen_until_something_happens() -> None:
    with Scheduler(0) as world:
        a, b = world.process("a"), world.process("b")
        done: list[float] = []
        a.spawn(in_turn(partial(a.freeze, until=lambda: b.ended), lambda: done.append(time.monotonic())))
        b.spawn(lambda: time.sleep(7.0))
        world.run()
        assert done == [7.0]


def test_a_frozen_process_can_be_killed() -> None:
    with Scheduler(0) as world:
        a, b = world.process("a"), world.process("b")
        a.spawn(lambda: time.sleep(1.0))
        b.spawn(in_turn(a.freeze, partial(time.sleep, 2.0), a.crash))
        world.run()
        assert a.crashed
        assert a.ended


def test_an_error_ends_the_simulation_unless_it_is_accepted() -> None:
    def fail() -> None:
        raise ValueError("of the code under test")

    with Scheduler(0) as world:
        world.process("a").spawn(fail)
        with pytest.raises(ValueError, match="under test") as failure:
            world.run()
    assert "seed 0" in failure.value.__notes__[0]
    with Scheduler(0) as world:
        process = world.process("a", accepts=(ValueError,))
        process.spawn(fail)
        other = process.spawn(lambda: time.sleep(5.0), "other")
        world.run()
        assert isinstance(process.error, ValueError)
        assert process.ended
        assert other.error is None
        assert world.clock == 0.0, "the process went as a whole"


def test_a_failed_check_is_not_hidden_by_whoever_catches_it() -> None:
    with Scheduler(0) as world:

        def main() -> None:
            try:
                world.fail(AssertionError("an invariant"))
                raise AssertionError("an invariant")
            except Exception:
                pass
            world.pause()

        world.process("a").spawn(main)
        with pytest.raises(AssertionError, match="an invariant"):
            world.run()


def busy_turns() -> None:
    event = Event()
    while True:
        event.wait(0)


def busy_looks() -> None:
    while time.monotonic() < 1.0:
        pass


def for_ever() -> None:
    while True:
        time.sleep(1.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (busy_turns, "busy"),
        (busy_looks, "only looks at the clock"),
        (for_ever, "time is up"),
        (lambda: Event().wait(), "deadlock"),
    ],
)
@pytest.mark.parametrize("stickiness", [0.0, 1.0])
def test_getting_nowhere_is_noticed(function: Callable[[], None], message: str, stickiness: float) -> None:
    with Scheduler(0, stickiness) as world:
        world.process("looper").spawn(function)
        with pytest.raises(Stuck, match=message) as failure:
            world.run(seconds=100.0)
        assert "looper/main" in str(failure.value)


def test_threads_of_a_process_are_actors() -> None:
    seen: list[str] = []
    with Scheduler(0) as world:

        def main() -> None:
            stop = threading.Event()

            def beat() -> None:
                while not stop.wait(1.0):
                    seen.append("beat")

            thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
            thread.start()
            time.sleep(3.5)
            stop.set()
            thread.join()
            assert not thread.is_alive()

        world.process("a").spawn(main)
        world.run()
        assert seen == ["beat"] * 3


def test_a_lock_held_over_a_turn_is_waited_for() -> None:
    seen: list[str] = []
    with Scheduler(0) as world:
        lock = threading.Lock()

        def hold(name: str) -> None:
            with lock:
                seen.append(f"{name} in")
                time.sleep(1.0)
                assert not lock.acquire(timeout=0.5)
                seen.append(f"{name} out")

        process = world.process("a")
        for name in "ab":
            process.spawn(partial(hold, name), name)
        world.run()
        assert [entry[2:] for entry in seen] == ["in", "out"] * 2
        assert world.clock == 3.0
        assert not lock.locked()


def test_whoever_dies_with_a_lock_gives_it_up() -> None:
    with Scheduler(0) as world:
        lock = threading.Lock()

        def hold() -> None:
            with lock:
                time.sleep(100.0)

        a, b = world.process("a"), world.process("b")
        a.spawn(hold)
        b.spawn(in_turn(partial(time.sleep, 5.0), a.crash, lock.acquire))
        world.run()
        assert world.clock == 5.0


def test_a_run_may_be_stopped_and_taken_up_again() -> None:
    with Scheduler(0) as world:
        process = world.process("a")
        process.spawn(lambda: time.sleep(10.0))
        world.process("b").spawn(in_turn(*[partial(time.sleep, 1.0)] * 10))
        world.run(until=lambda: world.clock >= 3.0)
        assert world.clock == 3.0
        assert not process.ended
        world.run()
        assert process.ended


def test_garbage_from_outside_is_not_finalised_in_an_actors_turn() -> None:
    finalised_in: list[Scheduler | None] = []

    class Left:
        def __init__(self) -> None:
            self.itself = self  # only a collection finds it

        def __del__(self) -> None:
            finalised_in.append(current())

    def allocate() -> None:
        for _ in range(100_000):
            cycle: list[object] = []
            cycle.append(cycle)

    Left()
    with Scheduler(0) as world:
        world.process("one").spawn(allocate)
        world.run()
    gc.collect()
    assert finalised_in == [None]
