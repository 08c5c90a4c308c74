"""Running schedules by their seeds."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

from penstock.producer import work
from penstock.trainer import supply, worker
from simulation.experiment import Experiment
from simulation.planted import planted
from simulation.world import patched_world


def run_schedule(seed: int) -> Experiment:
    """Run one schedule; the same seed gives the same one.

    Raises:
        Broken: an invariant does not hold.
        Stuck: something waits for ever.
    """
    _warm_up()
    return _run(seed)


def try_schedule(job: tuple[int, str | None]) -> tuple[int, str | None]:
    """Run one schedule with a planted bug or none; its seed, and what it broke, in full."""
    seed, bug = job
    _warm_up()
    try:
        with planted(bug):
            _run(seed)
    except BaseException as error:
        return seed, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return seed, None


@cache
def _warm_up() -> None:
    """What is imported and cached once per process must not make the first schedule another one."""
    _run(0)


@contextmanager
def _patient() -> Iterator[None]:
    """Waiting processes look less often: what they see is the same, and schedules are shorter."""
    with (
        patch.object(work, "POLL_SECONDS", 2.0),
        patch.object(worker, "IDLE_SECONDS", 2.0),
        patch.object(supply, "BLOCK_MS", 2000),
    ):
        yield


def _run(seed: int) -> Experiment:
    logging.disable(logging.CRITICAL)
    try:
        with patched_world(), _patient():
            experiment = Experiment(seed)
            experiment.run()
            return experiment
    finally:
        logging.disable(logging.NOTSET)
