"""The training loop: window → rows → batches → steps → head.

It ends when the run is done, is to stop, is handed over, diverged, or was taken over by someone else
(`Fenced`). Only committed heads count: whatever happens in between is redone by the next worker,
identically.
"""

import threading
import time
from typing import Any, Literal, Protocol

from penstock.common.errors import Diverged
from penstock.store.heads import Head
from penstock.store.loader import LoadedWindow
from penstock.trainer.group import Group
from penstock.trainer.lineage import Lineage

Outcome = Literal["done", "stopped", "handed over"]


class Loader(Protocol):
    """Hands out windows one after the other."""

    def get(self, timeout: float) -> LoadedWindow | None: ...
    def close(self) -> None: ...


class Observer(Protocol):
    """Sees the training without taking part in it."""

    def stepped(self, group: Group, seconds: float) -> None: ...
    def waited(self, group: Group, seconds: float) -> None: ...
    def window_ended(self, group: Group, seconds: float) -> None: ...
    def committed(self, group: Group, head: Head, seconds: float) -> None: ...

    def should_hand_over(self, group: Group) -> bool:
        """While waiting at a window boundary: does another run need this worker more?"""
        ...


def train(
    group: Group, lineage: Lineage, loader: Loader, observer: Observer, stop: threading.Event
) -> Outcome:
    """Train a run from the lineage's head until it ends or the worker must leave it."""
    settings = group.config.settings
    last_window = group.config.order.n_windows - 1
    history: list[dict[str, Any]] = []
    while True:
        started = time.monotonic()
        loaded = _next_window(group, loader, observer, stop)
        waited = time.monotonic() - started
        if loaded is None:
            if history:
                _commit(group, lineage, history, observer, "running")
            return "stopped" if stop.is_set() else "handed over"
        group.begin_window(loaded)
        for batch in loaded.batches(settings.batch_rows, group.device):
            step_started = time.monotonic()
            group.train_step(batch)
            observer.stepped(group, time.monotonic() - step_started)
            if stop.is_set():
                return "stopped"
        bad = group.end_window(loaded)
        if bad is not None:
            raise _diverged(group, lineage, bad, loaded)
        seconds = time.monotonic() - started - waited
        observer.window_ended(group, seconds)
        history.append(group.history_point(seconds, waited, time.time()))
        if loaded.window.number == last_window:
            _commit(group, lineage, history, observer, "done")
            return "done"
        if (loaded.window.number + 1) % settings.head_interval == 0:
            _commit(group, lineage, history, observer, "running")
            history = []


def _next_window(
    group: Group, loader: Loader, observer: Observer, stop: threading.Event
) -> LoadedWindow | None:
    """The next window; None if the worker is to stop or hand the run over while it waits."""
    while not stop.is_set():
        started = time.monotonic()
        loaded = loader.get(timeout=0.5)
        observer.waited(group, time.monotonic() - started)
        if loaded is not None:
            return loaded
        if observer.should_hand_over(group):
            return None
    return None


def _commit(
    group: Group,
    lineage: Lineage,
    history: list[dict[str, Any]],
    observer: Observer,
    status: Literal["running", "done"],
) -> None:
    started = time.monotonic()
    head = lineage.commit(
        position=group.position,
        step=group.step,
        rows=group.rows,
        checkpoint=group.checkpoint(),
        history=history,
        metrics={name: dict(figures) for name, figures in group.figures.items()},
        status=status,
    )
    observer.committed(group, head, time.monotonic() - started)


def _diverged(group: Group, lineage: Lineage, bad: tuple[str, int], loaded: LoadedWindow) -> Diverged:
    """End the run at its last good head, naming what went wrong."""
    name, step = bad
    chunks = ", ".join(map(group.config.name_of, loaded.chunks))
    reason = (
        f"loss or weights of {name} are not finite at step {step}, in the window of {chunks}; "
        f"lower its lr, or look at these chunks. Head {lineage.head.n} is the last good one"
    )
    lineage.end("failed", reason)
    return Diverged(f"run {lineage.run_id}: {reason}")
