"""Running schedules by their seeds."""

import logging
import traceback

from simulation.experiment import Experiment
from simulation.planted import planted
from simulation.world import patched_world


def run_schedule(seed: int) -> Experiment:
    """Run one schedule; the same seed gives the same one.

    Raises:
        Broken: an invariant does not hold.
        Stuck: something waits for ever.
    """
    logging.disable(logging.CRITICAL)
    try:
        with patched_world():
            experiment = Experiment(seed)
            experiment.run()
            return experiment
    finally:
        logging.disable(logging.NOTSET)


def try_schedule(job: tuple[int, str | None]) -> tuple[int, str | None]:
    """Run one schedule with a planted bug or none; its seed, and the traceback of what it broke."""
    seed, bug = job
    try:
        with planted(bug):
            run_schedule(seed)
    except BaseException:
        return seed, traceback.format_exc()
    return seed, None
