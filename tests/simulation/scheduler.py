"""Actors that take turns by a seeded random choice, in virtual time.

Every actor is a greenlet: it runs alone until it reaches a point where it gives way (`pause`, `sleep`,
`Event.wait`), and the scheduler then picks who goes on. Nothing else decides anything, so a seed gives
the same schedule every time. Time stands still while anyone can run, and jumps to the next sleeper's
end when nobody can.

    with patched_world(), Scheduler(seed) as world:
        worker = world.process("worker-1")
        worker.spawn(main)
        world.run()

Inside `with Scheduler(...)` the clocks, `uuid.uuid4`, `random`, `threading.Event` and
`threading.Thread` of the code under test are the simulation's (see `simulation.world`). Code that runs
there outside of any actor, such as a test's set-up and its checks, never gives way.
"""

import gc
import heapq
import random
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from greenlet import getcurrent, greenlet

WALL_START = 1_700_000_000.0
"""The wall clock, in Unix seconds, when the virtual clock is at 0."""
STEPS_WITHOUT_TIME = 20_000
"""Turns taken while time stands still that are taken for a busy loop."""
READS_WITHOUT_TURN = 100_000
"""Looks at the clock within one turn that are taken for a busy loop."""

_here = threading.local()
_RealEvent = threading.Event


class Crashed(BaseException):
    """This process is dead: thrown into each of its actors, and by whatever these touch from then on."""


class Stuck(Exception):
    """Nothing goes on, or something goes on for ever."""


def current() -> "Scheduler | None":
    """The simulation that this thread is in."""
    return getattr(_here, "scheduler", None)


def in_turn(*calls: Callable[[], object]) -> Callable[[], None]:
    """What calls each of them, one after the other: a short script for an actor."""

    def run() -> None:
        for call in calls:
            call()

    return run


class Actor:
    """One thread of a simulated process.

    Attributes:
        doing: what it did last; for people.
        result: what its function returned.
        error: what its function raised, `Crashed` excepted.
        done: set when it has ended in any way.
    """

    def __init__(
        self, process: "Process", function: Callable[[], Any], name: str, daemon: bool, hub: greenlet
    ) -> None:
        self.process = process
        self.name = name
        self.daemon = daemon
        self.doing: object = "starting"
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = Event()
        self.waiting = False
        self.turn = 0  # how often it was woken; tells timers of a wait that is over
        self._function = function
        self.greenlet = greenlet(self._run, hub)

    def __str__(self) -> str:
        return f"{self.process.name}/{self.name}"

    def _run(self) -> None:
        try:
            self.result = self._function()
        except Crashed:
            pass
        except BaseException as error:
            self.error = error


class Process:
    """Actors that live and die together.

    It ends when the last actor that is no daemon ends; an error that leaves an actor ends it too. Make
    one with `Scheduler.process`.

    Attributes:
        accepts: errors that may end it; any other fails the simulation.
        wall_offset: seconds by which its wall clock is off.
        crashed: it was killed from outside.
        dead: it is crashed or has ended; nothing that its actors do has an effect.
        requests: requests it has sent to any service.
        crash_at: the number of the request at which it crashes, before it is sent.
    """

    def __init__(self, scheduler: "Scheduler", name: str, accepts: tuple[type[BaseException], ...]) -> None:
        self.name = name
        self.accepts = accepts
        self.actors: list[Actor] = []
        self.wall_offset = 0.0
        self.crashed = False
        self.dead = False
        self.frozen = False
        self.requests = 0
        self.crash_at: int | None = None
        self.parked: list[Actor] = []
        self._scheduler = scheduler
        self._freeze = 0  # number of the last freeze; tells timers of one that is over

    @property
    def ended(self) -> bool:
        """All of its actors are gone."""
        return bool(self.actors) and all(actor.greenlet.dead for actor in self.actors)

    @property
    def error(self) -> BaseException | None:
        """What ended it, if that was an error."""
        return next((actor.error for actor in self.actors if actor.error is not None), None)

    def spawn(self, function: Callable[[], Any], name: str = "main", daemon: bool = False) -> Actor:
        """Start an actor of this process."""
        return self._scheduler.spawn(self, function, name, daemon)

    def crash(self) -> None:
        """SIGKILL: nothing that its actors do from now on has an effect."""
        if not self.dead:
            self.crashed = True
            self._scheduler.note("crash", self)
            self.die()

    def die(self) -> None:
        """Let every actor unwind; the calling one at once."""
        self.dead = True
        self.thaw()
        for actor in self.actors:
            self._scheduler.wake(actor)
        self._scheduler.check()

    def freeze(self, seconds: float | None = None, until: Callable[[], bool] | None = None) -> None:
        """SIGSTOP: for a time, until a condition holds, or until `thaw`, whichever comes first."""
        if self.dead:
            return
        self._freeze += 1
        freeze, scheduler = self._freeze, self._scheduler
        self.frozen = True
        scheduler.note(f"freeze for {seconds} s" if seconds is not None else "freeze", self)

        def end() -> None:
            if self._freeze == freeze:
                self.thaw()

        if seconds is not None:
            scheduler.later(seconds, end)
        if until is not None:
            scheduler.when(until, end)
        actor = scheduler.actor
        if actor is not None and actor.process is self:
            scheduler.pause("frozen")

    def thaw(self) -> None:
        """SIGCONT."""
        if self.frozen:
            self.frozen = False
            self._scheduler.note("thaw", self)
            self._scheduler.unpark(self)


class Scheduler:
    """Runs actors one at a time.

    Args:
        seed: decides everything.
        stickiness: the probability that an actor goes on where it could give way. High values give
            long undisturbed stretches, in which different faults are found than by a fair choice.
        trace: how many of the last events to keep; None for all.

    Attributes:
        random: the source of all chance; for faults, too.
        clock: virtual monotonic seconds.
        trace: (virtual time, process, actor, what), oldest first.
        steps: turns taken so far.
        actor: whose turn it is; None outside of actors.
    """

    def __init__(self, seed: int, stickiness: float = 0.0, trace: int | None = 200) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.stickiness = stickiness
        self.clock = 0.0
        self.trace: deque[tuple[float, str, str, object]] = deque(maxlen=trace)
        self.steps = 0
        self.actor: Actor | None = None
        self.processes: list[Process] = []
        self._draw = self.random.random
        self._hub = getcurrent()
        self._living = 0  # actors that are no daemons
        self._ready: list[Actor] = []
        self._timers: list[tuple[float, int, Callable[[], None] | Actor, int]] = []
        self._timer_number = 0
        self._conditions: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._failure: BaseException | None = None
        self._steps_when_time_moved = 0
        self._reads = 0
        self._deadline = 0.0
        self._outside: Scheduler | None = None
        self._random_state: Any = None
        self._collects = False

    # Who takes part

    def process(self, name: str, accepts: tuple[type[BaseException], ...] = ()) -> Process:
        """A new process. Restarting a program is a new process, too."""
        process = Process(self, name, accepts)
        self.processes.append(process)
        return process

    def spawn(
        self, process: Process, function: Callable[[], Any], name: str = "main", daemon: bool = False
    ) -> Actor:
        """Start an actor; daemons do not keep their process or the simulation going."""
        if process.dead:
            raise Crashed(process.name)
        actor = Actor(process, function, name, daemon, self._hub)
        process.actors.append(actor)
        self._living += not daemon
        self._ready.append(actor)
        return actor

    # What actors call

    def pause(self, what: object = "pause") -> None:
        """Give way: anyone who can run may go next."""
        actor = self.actor
        if actor is None:
            return
        if actor.process.dead:
            raise Crashed(actor.process.name)
        if self.stickiness and self._draw() < self.stickiness and not actor.process.frozen:
            self._count()
            actor.doing = what
            self.trace.append((self.clock, actor.process.name, actor.name, what))
            return
        self._ready.append(actor)
        self._leave(actor, what)

    def sleep(self, seconds: float, what: object = None) -> None:
        """Wait in virtual time. Outside of actors: let that time pass."""
        actor = self.actor
        if actor is None:
            self._move_to(self.clock + max(0.0, seconds))
        elif seconds <= 0.0:
            self.pause(what or "sleep(0)")
        else:
            self._push(seconds, actor, actor.turn)
            self._wait(actor, what or f"sleep({seconds:.3f})")

    def wait(self, waiters: list[Actor], timeout: float | None, what: object) -> None:
        """Wait until woken (see `wake`) or until a timeout; the caller finds out which.

        Args:
            waiters: the actor is in this list while it waits.
        """
        actor = self.actor
        assert actor is not None, "only actors wait"
        if timeout is not None:
            self._push(max(0.0, timeout), actor, actor.turn)
        waiters.append(actor)
        try:
            self._wait(actor, what)
        finally:
            waiters.remove(actor)

    def wake(self, actor: Actor) -> None:
        """End an actor's wait."""
        if actor.waiting:
            actor.waiting = False
            actor.turn += 1
            self._ready.append(actor)

    def request(self, what: object) -> None:
        """A process sends a request: give way first. What it touches next happens at once."""
        self.pause(what)
        actor = self.actor
        if actor is not None:
            process = actor.process
            if process.requests == process.crash_at:
                process.crash()
            process.requests += 1

    def check(self) -> None:
        """Raise `Crashed` if the caller's process is dead."""
        actor = self.actor
        if actor is not None and actor.process.dead:
            raise Crashed(actor.process.name)

    def note(self, what: object, process: Process | None = None) -> None:
        """Add to the trace."""
        actor = self.actor
        by = actor.name if actor is not None and actor.process is process else "*"
        if process is None and actor is not None:
            process, by = actor.process, actor.name
        self.trace.append((self.clock, "*" if process is None else process.name, by, what))

    def fail(self, error: BaseException) -> None:
        """End the simulation with an error, whatever the code under test does about it."""
        if self._failure is None:
            self._failure = error

    # Clocks and chance

    def monotonic(self) -> float:
        """What the code under test sees as `time.monotonic`."""
        self._reads += 1
        if self._reads > READS_WITHOUT_TURN and self.actor is not None:
            self.fail(Stuck(f"{self.actor} only looks at the clock\n{self.picture()}"))
            self.actor.process.dead = True
            raise Crashed(self.actor.process.name)
        return self.clock

    def time(self) -> float:
        """What the code under test sees as `time.time`."""
        wall = WALL_START + self.monotonic()
        return wall if self.actor is None else wall + self.actor.process.wall_offset

    def uuid4(self) -> uuid.UUID:
        """What the code under test sees as `uuid.uuid4`."""
        return uuid.UUID(int=self.random.getrandbits(128), version=4)

    # What steers a schedule

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call something after a time, in nobody's name. It must not wait."""
        self._push(seconds, callback, 0)

    def when(self, condition: Callable[[], bool], callback: Callable[[], None]) -> None:
        """Call something once a condition holds; it is asked after every turn."""
        self._conditions.append((condition, callback))

    def unpark(self, process: Process) -> None:
        """Let the actors of a process that was frozen go on."""
        self._ready += process.parked
        process.parked.clear()

    def run(self, seconds: float = 3600.0, until: Callable[[], bool] | None = None) -> None:
        """Let actors run until all that are no daemons have ended, or until a condition holds.

        Args:
            seconds: the virtual time that this may take.
            until: asked after every turn.

        Raises:
            Stuck: nobody can run, nobody ends, or time is up.
            BaseException: whatever ended an actor, unless its process accepts that.
        """
        self._deadline = self.clock + seconds
        try:
            while self._living and not (until is not None and until()):
                self._count()
                self._turn(self._next())
                if self._failure is not None:
                    raise self._failure
                if self._conditions:
                    self._settle_conditions()
            self._reap()
        except BaseException as error:
            self._explain(error)
            raise

    def picture(self) -> str:
        """What every living actor is doing, one per line."""
        lines = [
            f"  {actor}: {actor.doing}{' (frozen)' if process.frozen else ''}"
            for process in self.processes
            for actor in process.actors
            if not actor.greenlet.dead
        ]
        return "\n".join(lines) or "  nobody is left"

    def story(self) -> str:
        """The trace, one event per line."""
        return "\n".join(f"{at:12.3f}  {who}/{actor}: {what}" for at, who, actor, what in self.trace)

    def __enter__(self) -> "Scheduler":
        self._outside = current()
        self._random_state = random.getstate()
        self._collects = gc.isenabled()
        # a collection would finalise, in some actor's turn, what was left behind outside of the simulation
        gc.disable()
        random.seed(self.seed)
        _here.scheduler = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._explain(error)
        try:
            for process in self.processes:
                process.dead = True
            self._reap()
        finally:
            _here.scheduler = self._outside
            random.setstate(self._random_state)
            if self._collects:
                gc.enable()

    # Inside

    def _leave(self, actor: Actor, what: object) -> None:
        actor.doing = what
        self.trace.append((self.clock, actor.process.name, actor.name, what))
        self._hub.switch()

    def _wait(self, actor: Actor, what: object) -> None:
        if actor.process.dead:
            raise Crashed(actor.process.name)
        actor.waiting = True
        self._leave(actor, what)

    def _count(self) -> None:
        self.steps += 1
        if self.steps - self._steps_when_time_moved > STEPS_WITHOUT_TIME:
            stuck = Stuck(f"busy: {STEPS_WITHOUT_TIME} turns while time stood still\n{self.picture()}")
            self.fail(stuck)
            if self.actor is None:
                raise stuck
            self.actor.process.dead = True
            raise Crashed(self.actor.process.name)

    def _next(self) -> Actor:
        """Whose turn it is, letting time pass while nobody can run."""
        ready = self._ready
        while True:
            while ready:
                place = int(self._draw() * len(ready))
                actor = ready[place]
                last = ready.pop()
                if last is not actor:
                    ready[place] = last
                if actor.process.frozen:
                    actor.process.parked.append(actor)
                elif not actor.greenlet.dead:
                    return actor
            if not self._timers:
                raise Stuck(f"deadlock: nobody can run and nothing is to come\n{self.picture()}")
            if self._timers[0][0] > self._deadline:
                raise Stuck(f"time is up at {self._deadline:.3f} s\n{self.picture()}")
            self._move_to(self._timers[0][0])

    def _turn(self, actor: Actor) -> None:
        self.actor = actor
        self._reads = 0
        if actor.process.dead:
            self._kill(actor)
        else:
            actor.greenlet.switch()
        self.actor = None
        if actor.greenlet.dead:
            self._bury(actor)

    def _kill(self, actor: Actor) -> None:
        with suppress(Crashed):  # it comes back from an actor that had not begun
            actor.greenlet.throw(Crashed(actor.process.name))
        # only code that catches everything gets here, and only if it gives way without asking us
        while not actor.greenlet.dead:
            actor.greenlet.throw(Crashed(actor.process.name))

    def _bury(self, actor: Actor) -> None:
        process = actor.process
        self._living -= not actor.daemon
        actor.done.set()
        if actor.error is not None and not process.dead and not isinstance(actor.error, process.accepts):
            self.fail(actor.error)
        last = not actor.daemon and all(a.daemon or a.greenlet.dead for a in process.actors)
        if not process.dead and (last or actor.error is not None):
            self.note("ends" if process.error is None else f"ends with {process.error!r}", process)
            process.die()

    def _reap(self) -> None:
        """Let the actors of dead processes unwind; whose turn it is makes no difference to them."""
        for process in self.processes:
            for actor in process.actors:
                if process.dead and not actor.greenlet.dead:
                    self._turn(actor)

    def _push(self, seconds: float, target: Callable[[], None] | Actor, turn: int) -> None:
        self._timer_number += 1
        heapq.heappush(self._timers, (self.clock + seconds, self._timer_number, target, turn))

    def _move_to(self, moment: float) -> None:
        """Let time pass, waking whom it wakes."""
        if moment > self.clock:
            self.clock = moment
            self._steps_when_time_moved = self.steps
        while self._timers and self._timers[0][0] <= moment:
            _, _, target, turn = heapq.heappop(self._timers)
            if not isinstance(target, Actor):
                target()
            elif target.turn == turn:
                self.wake(target)

    def _settle_conditions(self) -> None:
        due = [pair for pair in self._conditions if pair[0]()]
        for pair in due:
            self._conditions.remove(pair)
            pair[1]()

    def _explain(self, error: BaseException) -> None:
        if not any(note.startswith("seed ") for note in getattr(error, "__notes__", ())):
            error.add_note(f"seed {self.seed}; the last {len(self.trace)} events:\n{self.story()}")


class Event(_RealEvent):
    """A `threading.Event` whose `wait` takes virtual time."""

    def __init__(self) -> None:
        super().__init__()
        self._waiters: list[Actor] = []

    def set(self) -> None:
        super().set()
        if self._waiters and (scheduler := current()) is not None:
            for actor in self._waiters:
                scheduler.wake(actor)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the event; always gives way."""
        scheduler = current()
        if scheduler is None or scheduler.actor is None:
            return self.is_set()  # nobody else can run
        if self.is_set() or (timeout is not None and timeout <= 0.0):
            scheduler.pause("wait")
        else:
            scheduler.wait(self._waiters, timeout, "wait" if timeout is None else f"wait({timeout:.3f})")
        return self.is_set()


class Lock:
    """A `threading.Lock` for whose release actors wait in virtual time."""

    def __init__(self) -> None:
        self._held = False
        self._waiters: list[Actor] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        scheduler = current()
        end = None if scheduler is None or timeout < 0 else scheduler.clock + timeout
        while self._held:
            if not blocking or (end is not None and scheduler is not None and scheduler.clock >= end):
                return False
            if scheduler is None or scheduler.actor is None:
                raise RuntimeError("an actor holds this lock, and no actor can run now")
            scheduler.wait(self._waiters, None if end is None else end - scheduler.clock, "waits for a lock")
        self._held = True
        return True

    def release(self) -> None:
        if not self._held:
            raise RuntimeError("release unlocked lock")
        self._held = False
        if self._waiters and (scheduler := current()) is not None:
            for actor in self._waiters:
                scheduler.wake(actor)

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Thread:
    """A `threading.Thread` that is an actor of the process that starts it."""

    def __init__(
        self,
        group: None = None,
        target: Callable[..., object] | None = None,
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        if getattr(target, "__module__", "") == "concurrent.futures.thread":
            raise RuntimeError("a thread pool blocks for real: none in a simulation")
        self.name = name or "thread"
        self.daemon = bool(daemon)
        self._target, self._args, self._kwargs = target, args, kwargs or {}
        self._actor: Actor | None = None

    def start(self) -> None:
        scheduler = current()
        if scheduler is None or scheduler.actor is None:
            raise RuntimeError("only actors start threads in a simulation")
        self._actor = scheduler.spawn(scheduler.actor.process, self.run, self.name, self.daemon)

    def run(self) -> None:
        if self._target is not None:
            self._target(*self._args, **self._kwargs)

    def join(self, timeout: float | None = None) -> None:
        if self._actor is not None:
            self._actor.done.wait(timeout)

    def is_alive(self) -> bool:
        return self._actor is not None and not self._actor.done.is_set()


@contextmanager
def outside() -> Iterator[None]:
    """Leave the simulation for a while: the real clocks and chance."""
    scheduler = current()
    _here.scheduler = None
    try:
        yield
    finally:
        _here.scheduler = scheduler
