"""What code under test takes from the world around it: clocks, chance, events, locks and threads.

`patched_world` replaces these where they are looked up by attribute (`time.monotonic()`, `uuid.uuid4()`).
In a thread that is in no simulation everything is as it was, so one `with` around ten thousand schedules
will do.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from simulation.scheduler import Event, Lock, Scheduler, Thread, current

_REAL_SLEEP = time.sleep


def _unless_simulated(real: Callable[[], Any], simulated: Callable[[Scheduler], Any]) -> Callable[[], Any]:
    def choose() -> Any:
        scheduler = current()
        return real() if scheduler is None else simulated(scheduler)

    return choose


def _sleep(seconds: float) -> None:
    scheduler = current()
    if scheduler is None:
        _REAL_SLEEP(seconds)
    else:
        scheduler.sleep(seconds)


class _Chosen(type):
    """Makes instances of a real class, or of its stand-in; `isinstance` knows both."""

    real: type
    stand_in: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "stand_in" not in cls.__dict__:  # somebody's class that derives from ours
            return super().__call__(*args, **kwargs)
        return (cls.real if current() is None else cls.stand_in)(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, (cls.real, cls.stand_in))


def _chosen(real_class: type, stand_in_class: type) -> type:
    # derives from the real class: code that derives from what it finds here must go on working
    return _Chosen(real_class.__name__, (real_class,), {"real": real_class, "stand_in": stand_in_class})


_PATCHES: list[tuple[Any, str, Any]] = [
    (time, "time", _unless_simulated(time.time, Scheduler.time)),
    (time, "monotonic", _unless_simulated(time.monotonic, Scheduler.monotonic)),
    (time, "perf_counter", _unless_simulated(time.perf_counter, Scheduler.monotonic)),
    (time, "sleep", _sleep),
    (threading, "Lock", _unless_simulated(threading.Lock, lambda _: Lock())),
    (uuid, "uuid4", _unless_simulated(uuid.uuid4, Scheduler.uuid4)),
]


@contextmanager
def patched_world() -> Iterator[None]:
    """Code in a simulation sees the simulation's clocks, chance, events, locks and threads.

    Patched: `time.time`, `time.monotonic`, `time.perf_counter`, `time.sleep`, `uuid.uuid4`,
    `threading.Event`, `threading.Lock` and `threading.Thread`. The module-level functions of `random` are
    seeded by the scheduler itself. Thread pools do not work in a simulation; using one is an error.
    """
    patches = [
        *_PATCHES,
        (threading, "Event", _chosen(threading.Event, Event)),
        (threading, "Thread", _chosen(threading.Thread, Thread)),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in patches]
    for module, name, new in patches:
        setattr(module, name, new)
    try:
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)
