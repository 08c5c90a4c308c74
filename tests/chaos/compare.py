"""Whether what a disturbed experiment left behind is what an undisturbed one does."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from penstock.common.errors import PenstockError
from penstock.deploy.heal import faults
from penstock.store.heads import Head, chain, head_numbers, newest_head, read_head
from penstock.store.objects import ObjectStore, open_store
from penstock.trainer.config import RunConfig, load_run_config, run_ids
from penstock.trainer.lineage import load_checkpoint, load_history

COMPARED = ("activations.zarr/", "commits/", "index/", "manifest.")
"""What of a dataset must be the same. Provenance and readers say who was at it, and when."""


@dataclass(frozen=True)
class Facts:
    """What must not depend on any fault: SHA-256 per object of the dataset and per final checkpoint file."""

    dataset: dict[str, str]
    weights: dict[str, str]


@dataclass
class Verdict:
    """What is wrong with an experiment. `takeovers` is only counted."""

    dataset: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    rows_lost: int = 0
    rows_repeated: int = 0
    takeovers: int = 0

    @property
    def clean(self) -> bool:
        return not (self.dataset or self.weights or self.faults or self.rows_lost or self.rows_repeated)

    def lines(self) -> list[str]:
        """What differs, one line each, a few of each kind."""
        found = []
        for what, differences in (
            ("dataset", self.dataset),
            ("weights", self.weights),
            ("fault", self.faults),
        ):
            found += [f"{what}: {line}" for line in differences[:10]]
            found += [f"{what}: and {len(differences) - 10} more"] if len(differences) > 10 else []
        return found


def gather(dataset_url: str, runs_url: str) -> Facts:
    """The facts of a finished experiment."""
    runs = open_store(runs_url)
    weights: dict[str, str] = {}
    for run_id in run_ids(runs):
        weights |= _weights(runs, run_id)
    return Facts(_dataset(open_store(dataset_url)), weights)


def judge(reference: Facts, dataset_url: str, runs_url: str) -> Verdict:
    """Compare a finished experiment with an undisturbed one, and check it in itself."""
    verdict, runs = Verdict(), open_store(runs_url)
    here = gather(dataset_url, runs_url)
    verdict.dataset = differences(reference.dataset, here.dataset)
    verdict.weights = differences(reference.weights, here.weights)
    for url in [dataset_url, *(f"{runs_url}/{run_id}" for run_id in run_ids(runs))]:
        verdict.faults += [str(fault) for fault in faults(url)[1]]
    for run_id in run_ids(runs):
        try:
            _judge_run(runs, run_id, verdict)
        except PenstockError as error:
            verdict.faults.append(f"run {run_id}: {error}")
    return verdict


def differences(there: dict[str, str], here: dict[str, str]) -> list[str]:
    """'name is missing', 'is extra' or 'differs', for each name that does not agree."""
    found = []
    for name in sorted(there.keys() | here.keys()):
        if name not in here:
            found.append(f"{name} is missing")
        elif name not in there:
            found.append(f"{name} is extra")
        elif there[name] != here[name]:
            found.append(f"{name} differs")
    return found


def rows_along(config: RunConfig, points: list[dict[str, Any]]) -> tuple[int, int]:
    """(lost, repeated) rows of a lineage's history.

    Every planned window must be there once, with its planned rows. What is no window at all counts as
    repeated, and so does a window that comes again.
    """
    planned = {config.order.window(number).stop: config.window_rows(number) for number in config.windows}
    trained: Counter[int] = Counter()
    lost = repeated = before = 0
    for point in points:
        position, rows = int(point["position"]), int(point["rows"]) - before
        before = int(point["rows"])
        trained[position] += 1
        excess = rows - (planned.get(position, 0) if trained[position] == 1 else 0)
        repeated += max(0, excess)
        lost += max(0, -excess)
    lost += sum(rows for stop, rows in planned.items() if not trained[stop])
    return lost, repeated


def chain_faults(heads: list[Head]) -> list[str]:
    """Whether all heads there are (by number) form one chain, without gaps, that never goes back."""
    found = []
    for number, head in enumerate(heads):
        if head.n != number:
            return [f"head {number} is missing"]
        if head.parent != (number - 1 if number else None):
            found.append(f"head {number} continues head {head.parent}: {head.reason}")
        elif number and head.position < heads[number - 1].position:
            found.append(f"head {number} goes back to position {head.position}")
    return found


def _judge_run(runs: ObjectStore, run_id: str, verdict: Verdict) -> None:
    config, newest = load_run_config(runs, run_id), newest_head(runs, run_id)
    heads = [read_head(runs, run_id, n) for n in sorted(head_numbers(runs, run_id))]
    problems = chain_faults(heads)
    if newest is None or newest.status != "done":
        problems.append("it is not done" if newest is None else f"it is {newest.status}: {newest.reason}")
    elif newest.position != config.order.n_positions or newest.rows != config.total_rows():
        problems.append(f"it ended at position {newest.position} with {newest.rows} rows")
    verdict.faults += [f"run {run_id}: {problem}" for problem in problems]
    lost, repeated = rows_along(config, load_history(runs, run_id, newest))
    verdict.rows_lost += lost
    verdict.rows_repeated += repeated
    lineage = chain(runs, run_id, newest)
    verdict.takeovers += sum(head.kind == "takeover" and head.n > 0 for head in lineage)


def _dataset(store: ObjectStore) -> dict[str, str]:
    keys = sorted(key for key, _ in store.list("") if key.startswith(COMPARED))
    return {key: hashlib.sha256(store.get(key)).hexdigest() for key in keys}


def _weights(runs: ObjectStore, run_id: str) -> dict[str, str]:
    """Of the files themselves, which are checked against their head on the way."""
    newest = newest_head(runs, run_id)
    if newest is None:
        return {}
    try:
        files = load_checkpoint(runs, run_id, newest)
    except PenstockError as error:
        return {f"{run_id}: {error}": ""}
    return {f"{run_id}/{name}": hashlib.sha256(data).hexdigest() for name, data in files.items()}
