"""Watching training: which rows were trained on, and workers in the background."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from penstock.common import metrics
from penstock.store.dataset import Dataset
from penstock.trainer.config import RunConfig
from penstock.trainer.group import Group
from penstock.trainer.lineage import Lineage
from penstock.trainer.observer import RunObserver
from services.runs import Bench


class Batches:
    """Spies on training: the bytes of every row of every step, by run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, dict[int, dict[str, list[bytes]]]] = {}
        self.redone = 0
        train_step = Group.train_step

        def spying(group: Group, batch: dict[str, torch.Tensor]) -> None:
            steps = self.rows.setdefault(group.config.run_id, {})
            rows = {hook: as_bytes(acts.view(torch.int16).numpy()) for hook, acts in batch.items()}
            if group.step in steps:
                self.redone += 1
                assert steps[group.step] == rows, "a step was redone with other rows"
            steps[group.step] = rows
            train_step(group, batch)

        monkeypatch.setattr(Group, "train_step", spying)

    def trained(self, config: RunConfig, hook: str) -> list[bytes]:
        """Rows in the order they were trained on, in as many steps as were planned."""
        assert sorted(self.rows[config.run_id]) == list(range(config.total_steps()))
        return self.so_far(config, hook)

    def so_far(self, config: RunConfig, hook: str) -> list[bytes]:
        """Rows in the order they were trained on, however many steps that were."""
        steps = self.rows[config.run_id]
        assert sorted(steps) == list(range(len(steps)))
        return [row for step in sorted(steps) for row in steps[step][hook]]


def as_bytes(rows: "np.ndarray[Any, np.dtype[Any]]") -> list[bytes]:
    return [row.tobytes() for row in rows]


def stored_rows(dataset: Dataset, hook: str, chunks: range | set[int] | None = None) -> Counter[bytes]:
    """The rows of some chunks, all of them by default."""
    return Counter(
        row
        for index in (range(dataset.n_chunks) if chunks is None else chunks)
        for row in as_bytes(dataset.read_chunk(index, [hook]).acts[hook].view(np.int16))
    )


def sample(name: str, **labels: str) -> float:
    """The value of a metric."""
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


@contextmanager
def working(bench: Bench) -> Iterator[threading.Event]:
    """A worker in a thread, asked to stop at the end of the block at the latest."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            bench.work(stop)
        except BaseException as error:
            failures.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        yield stop
    finally:
        stop.set()
        worker.join()
    assert failures == []


class Killed(BaseException):
    """Ends a worker in the middle of what it is doing."""


@contextmanager
def interrupted(how: str, after: int, stop: threading.Event) -> Iterator[None]:
    """For one worker's life: something happens to it after a number of steps or head creations."""
    left = after
    with pytest.MonkeyPatch.context() as patch:
        stepped, create, put = RunObserver.stepped, Lineage._create, Lineage._store_history

        def count_step(observer: RunObserver, group: Group, seconds: float) -> None:
            nonlocal left
            stepped(observer, group, seconds)
            left -= 1
            if left == 0:
                if how == "stop":
                    stop.set()
                else:
                    raise Killed

        def count_create(lineage: Lineage, head: Any) -> None:
            nonlocal left
            left -= 1
            if left <= 0 and how == "killed before a head":
                raise Killed
            create(lineage, head)
            if left <= 0:
                raise Killed

        def count_history(lineage: Lineage, *arguments: Any) -> str | None:
            nonlocal left
            left -= 1
            if left <= 0:
                raise Killed
            return put(lineage, *arguments)

        if how in ("stop", "killed in a step"):
            patch.setattr(RunObserver, "stepped", count_step)
        elif how == "killed while storing":
            patch.setattr(Lineage, "_store_history", count_history)
        else:
            patch.setattr(Lineage, "_create", count_create)
        yield
