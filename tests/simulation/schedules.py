"""Running schedules by their seeds."""

import logging
import traceback
from functools import cache

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


def _run(seed: int) -> Experiment:
    logging.disable(logging.CRITICAL)
    try:
        with patched_world():
            experiment = Experiment(seed)
            experiment.run()
            return experiment
    finally:
        logging.disable(logging.NOTSET)
