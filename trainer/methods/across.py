"""Dictionaries compared with each other, where nothing else is known to compare them with."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from penstock.trainer.methods.similarity import mmcs


@dataclass(frozen=True)
class Place:
    """Where a dictionary stands in a grid.

    Attributes:
        name: unique.
        group: what must be equal for two to be compared at all: kind, hook point and so on.
        penalty: at which it was trained, as the grid has it.
        size: its number of features.
        seed: of its initial weights.
    """

    name: str
    group: Hashable
    penalty: Hashable
    size: int
    seed: int


Load = Callable[[str], Tensor]
"""Name -> [S, D] directions."""


def mmcs_with_larger(places: Sequence[Place], load: Load) -> dict[str, float]:
    """For each dictionary the mean MMCS(larger, it) over all larger ones at the same penalty and seed.

    A feature that is real is found again by a larger dictionary; one that a dictionary of the wrong size or
    penalty made up is not. The largest ones have none to be compared with and are left out.
    """
    found = {}
    for place in places:
        larger = [p for p in places if _like(p, place) and p.seed == place.seed and p.size > place.size]
        if larger:
            own = load(place.name)
            found[place.name] = sum(mmcs(load(p.name), own) for p in larger) / len(larger)
    return found


def seed_agreement(places: Sequence[Place], load: Load) -> dict[str, float]:
    """For each dictionary the mean MMCS(other, it) over those that differ in the seed only."""
    found = {}
    for place in places:
        others = [p for p in places if _like(p, place) and p.size == place.size and p.seed != place.seed]
        if others:
            own = load(place.name)
            found[place.name] = sum(mmcs(load(p.name), own) for p in others) / len(others)
    return found


def convergence(checkpoints: Sequence[Mapping[str, Tensor]]) -> dict[str, list[float]]:
    """MMCS(later, earlier) of each dictionary between checkpoints that follow each other.

    Near 1, features have settled. A loss that is flat does not say so.

    Args:
        checkpoints: name -> directions, oldest first.
    """
    names = checkpoints[-1].keys() if checkpoints else ()
    pairs = list(pairwise(checkpoints))
    return {name: [mmcs(later[name], earlier[name]) for earlier, later in pairs] for name in names}


def _like(a: Place, b: Place) -> bool:
    return a.group == b.group and a.penalty == b.penalty
