"""Which runs have work left: the store says, the queue is made to agree."""

from dataclasses import dataclass

from penstock.common.errors import DataError, OtherFormat, PenstockError
from penstock.common.logs import LOGGER
from penstock.store.heads import newest_head
from penstock.store.objects import ObjectStore
from penstock.store.queue import RunQueue
from penstock.trainer.config import run_ids


@dataclass(frozen=True)
class Unfinished:
    """Runs that have not ended.

    Attributes:
        positions: run id -> position of its newest head.
        damaged: run id -> why its newest head cannot be read: it is damaged, or of another format.
    """

    positions: dict[str, int]
    damaged: dict[str, PenstockError]


def reconcile_runs(runs: ObjectStore, queue: RunQueue) -> None:
    """Make the queue of pending runs say what the store says."""
    unfinished = unfinished_runs(runs)
    for run_id, position in unfinished.positions.items():
        queue.add(run_id, position)
    for run_id in queue.pending():
        if run_id not in unfinished.positions:
            queue.remove(run_id)
    for error in unfinished.damaged.values():
        LOGGER.error("%s", error)


def unfinished_runs(runs: ObjectStore) -> Unfinished:
    """All runs below a runs URL that have not ended."""
    found = Unfinished({}, {})
    for run_id in run_ids(runs):
        try:
            head = newest_head(runs, run_id)
        except (DataError, OtherFormat) as error:
            found.damaged[run_id] = error
            continue
        if head is None or not head.terminal:
            found.positions[run_id] = 0 if head is None else head.position
    return found
