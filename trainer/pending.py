"""Which runs have work left: the store says, the queue is made to agree."""

from penstock.store.objects import ObjectStore
from penstock.store.queue import RunQueue
from penstock.trainer.config import run_ids
from penstock.trainer.lineage import newest_head


def reconcile_runs(runs: ObjectStore, queue: RunQueue) -> None:
    """Make the queue of pending runs say what the store says."""
    unfinished = unfinished_runs(runs)
    for run_id, position in unfinished.items():
        queue.add(run_id, position)
    for run_id in queue.pending():
        if run_id not in unfinished:
            queue.remove(run_id)


def unfinished_runs(runs: ObjectStore) -> dict[str, int]:
    """Run id -> position of its newest head, for runs that have not ended."""
    found = {}
    for run_id in run_ids(runs):
        head = newest_head(runs, run_id)
        if head is None or not head.terminal:
            found[run_id] = 0 if head is None else head.position
    return found
