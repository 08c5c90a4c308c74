"""What a sweep's dictionaries came to: one record each, from their runs' summaries and weights.

Nothing is trained or evaluated here. Weights are read when they are needed and kept while there is room.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from penstock.store.heads import Head, kept_checkpoints
from penstock.store.objects import ObjectStore
from penstock.store.truth import Truth
from penstock.trainer.config import RunConfig
from penstock.trainer.kinds import SAESettings
from penstock.trainer.lineage import load_checkpoint
from penstock.trainer.methods.across import (
    Place,
    convergence,
    found_by_larger,
    mmcs_with_larger,
    seed_agreement,
)
from penstock.trainer.methods.matching import matched_cosine
from penstock.trainer.methods.similarity import duplicates, mmcs, unit_rows
from penstock.trainer.methods.sparsity import dead_after_minibatches, ssll

Record = dict[str, Any]

PENALTIES = ("k", "l0_target", "l0_coefficient", "l1_coefficient")
"""Settings that trade reconstruction for sparsity; a kind's is the first that it has."""
CACHE_BYTES = 2_000_000_000
"""Directions kept in memory."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended, and its summary.json."""

    runs: ObjectStore
    config: RunConfig
    head: Head
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class _Member:
    """One SAE of one of the runs."""

    run: Finished
    settings: SAESettings
    told: Mapping[str, Any]
    """Its entry in the run's summary."""

    @property
    def key(self) -> str:
        return f"{self.run.config.run_id}/{self.settings.name}"


class _Dictionaries:
    """Directions of SAEs [S, D] by key, read from their newest checkpoints."""

    def __init__(self, members: Iterable[_Member]) -> None:
        self._members = {member.key: member for member in members}
        self._held: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, key: str) -> Tensor:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        member = self._members[key]
        found = self._held[key] = directions(member.run, member.run.head, member.settings.name)
        while len(self._held) > 1 and sum(d.nbytes for d in self._held.values()) > CACHE_BYTES:
            self._held.popitem(last=False)
        return found


def directions(run: Finished, head: Head, name: str) -> Tensor:
    """[S, D] float32 unit decoder rows of an SAE as a head has it."""
    files = load_checkpoint(run.runs, run.config.run_id, head, [f"sae/{name}"])
    return unit_rows(safetensors.torch.load(files[f"sae/{name}"])["W_dec"])


def measure(
    runs: Sequence[Finished], truth: Truth | None, progress: Callable[[str], None] = lambda what: None
) -> list[Record]:
    """One record per SAE.

    Args:
        truth: the true features of the dataset that the runs read, if they are known.
        progress: told what is being measured.

    Returns:
        Records of JSON values: what is not known is None. `loss`, `reconstruction_loss`, `l1` and `l0` are of
        the last training window, on scaled rows; those that begin with `held_out_` are not.
    """
    members = [
        _Member(run, settings, told)
        for run in runs
        for settings, told in zip(run.config.settings.saes, run.summary["saes"], strict=True)
    ]
    load = _Dictionaries(members)
    records = []
    for number, member in enumerate(members):
        progress(f"measured {number} of {len(members)} dictionaries")
        records.append(_alone(member, load(member.key), truth))
    progress("comparing dictionaries with each other")
    places = _places(members, records)
    larger, found = mmcs_with_larger(places, load), found_by_larger(places, load)
    seeds = seed_agreement(places, load)
    settled = {key: values for run in runs for key, values in _convergence(run).items()}
    for place, record in zip(places, records, strict=True):
        record["mmcs_with_larger"] = larger.get(place.name)
        record["found_by_larger"] = found.get(place.name)
        record["seed_agreement"] = seeds.get(place.name)
        record["convergence"] = settled.get(place.name)
    _add_ssll(records)
    return records


def penalty_of(settings: SAESettings) -> str | None:
    """Which of an SAE's settings is its penalty."""
    return next((name for name in PENALTIES if getattr(settings, name, None) is not None), None)


def _alone(member: _Member, found: Tensor, truth: Truth | None) -> Record:
    """What is known of an SAE by itself."""
    settings, told, run = member.settings, member.told, member.run
    width = run.config.widths[settings.hook_name]
    files = load_checkpoint(
        run.runs, run.config.run_id, run.head, [f"sae/{settings.name}", f"optimizer/{settings.name}"]
    )
    scale = float(safetensors.torch.load(files[f"sae/{settings.name}"])["scale"])
    since = safetensors.torch.load(files[f"optimizer/{settings.name}"])["rows_since_active"]
    trained, held_out = run.head.metrics[settings.name], told.get("held_out") or {}
    l1_coefficient = getattr(settings, "l1_coefficient", None)
    penalty = penalty_of(settings)
    record: Record = {
        "name": settings.name,
        "run": run.config.run_id,
        "hook_name": settings.hook_name,
        "architecture": settings.architecture,
        "d_in": width,
        "d_sae": settings.d_sae,
        "size_ratio": None,
        "seed": settings.seed,
        "penalty": penalty,
        "l1_coefficient": l1_coefficient,
        "alpha": None if l1_coefficient is None else l1_coefficient * settings.d_sae / (width * scale),
        **({penalty: getattr(settings, penalty)} if penalty else {}),
        "steps": run.head.step,
        "batch_rows": run.config.settings.batch_rows,
        "scale": scale,
        "loss": trained["loss"],
        "reconstruction_loss": trained.get("mse"),
        "l1": trained.get("l1"),
        "l1_penalty": _times(trained.get("l1"), l1_coefficient),
        "l0": trained["l0"],
        "train_explained_variance": trained["explained_variance"],
        "held_out_loss": held_out.get("loss"),
        "held_out_l0": held_out.get("l0"),
        "held_out_dead_features": held_out.get("dead_features"),
        "explained_variance": told.get("explained_variance"),
        "ce_recovered": told.get("ce_recovered"),
        "dead_features": int(trained["dead_features"]),
        "dead_after_rows": settings.dead_after_rows,
        "dead_minibatches": dead_after_minibatches(since, run.config.settings.batch_rows),
        "mmcs": None,
        "matched_cosine": None,
        "duplicates": duplicates(found),
    }
    if truth is not None and truth.features.shape[1] == found.shape[1]:
        wanted = torch.from_numpy(np.ascontiguousarray(truth.features))
        record["size_ratio"] = settings.d_sae / len(wanted)
        record["mmcs"] = mmcs(found, wanted)
        record["matched_cosine"] = matched_cosine(found, wanted)
    return record


def _places(members: Sequence[_Member], records: Sequence[Record]) -> list[Place]:
    """Where each SAE stands, at the penalty as the grid has it: α or λ, whichever takes fewer values."""
    alphas, lambdas = (
        {_short(r[axis]) for r in records if r["l1_coefficient"] is not None}
        for axis in ("alpha", "l1_coefficient")
    )
    by_alpha = len(alphas) < len(lambdas)
    places = []
    for member, record in zip(members, records, strict=True):
        penalty, value = record["penalty"], None
        if penalty is not None:
            axis = "alpha" if penalty == "l1_coefficient" and by_alpha else penalty
            record["penalty"], value = axis, _short(record[axis])
        varied = {"name", "seed", "d_sae", "init_from", *PENALTIES}
        same = json.dumps(member.settings.model_dump(mode="json", exclude=varied), sort_keys=True)
        places.append(Place(member.key, (same, penalty), value, member.settings.d_sae, member.settings.seed))
    return places


def _convergence(run: Finished) -> dict[str, float]:
    """MMCS between the two newest kept checkpoints of each SAE."""
    kept = kept_checkpoints(run.runs, run.config.run_id, run.head)
    if len(kept) < 2:
        return {}
    found = {}
    for sae in run.config.settings.saes:
        steps = [{sae.name: directions(run, head, sae.name)} for head in reversed(kept)]
        found[f"{run.config.run_id}/{sae.name}"] = convergence(steps)[sae.name][-1]
    return found


def _add_ssll(records: list[Record]) -> None:
    """Over the SAEs of one kind on one hook point; null where there is no L1."""
    families: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        record["ssll"] = record["ssll_weighted"] = None
        if record["l1"] is not None and record["reconstruction_loss"] is not None:
            families.setdefault((record["architecture"], record["hook_name"]), []).append(record)
    for family in families.values():
        reconstruction = [record["reconstruction_loss"] for record in family]
        for field, l1 in (("ssll", "l1"), ("ssll_weighted", "l1_penalty")):
            values = ssll(reconstruction, [record[l1] or 0.0 for record in family])
            for record, value in zip(family, values, strict=True):
                record[field] = value


def _times(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


def _short(value: float) -> float:
    """To three digits: what grids call the same, whatever the last bits are."""
    return float(f"{value:.3g}") if math.isfinite(value) else value
