"""Dictionaries compared with each other, where nothing else is known to compare them with."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

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
    """For each dictionary the mean MMCS(it, larger) over all larger ones at the same penalty and seed.

    The larger ones stand for the truth: what it shows is how much of them a dictionary holds. One that is too
    small leaves out what they have, and one that is too large has features that they do not share. The
    largest ones have none to be compared with and are left out.
    """
    return {name: fmean(mmcs(own, other) for other in larger) for name, own, larger in _below(places, load)}


def found_by_larger(places: Sequence[Place], load: Load) -> dict[str, float]:
    """For each dictionary the mean MMCS(larger, it), over the same ones: how much of it they find again.

    A feature that is real is found again; one that a dictionary of the wrong size or penalty made up is not.
    A dictionary that is too small keeps the most common features, which all find.
    """
    return {name: fmean(mmcs(other, own) for other in larger) for name, own, larger in _below(places, load)}


def seed_agreement(places: Sequence[Place], load: Load) -> dict[str, float]:
    """For each dictionary the mean MMCS(other, it) over those that differ in the seed only."""
    found = {}
    for place in places:
        others = [p for p in places if _like(p, place) and p.size == place.size and p.seed != place.seed]
        if others:
            own = load(place.name)
            found[place.name] = fmean(mmcs(load(p.name), own) for p in others)
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


def _below(places: Sequence[Place], load: Load) -> Iterator[tuple[str, Tensor, Iterator[Tensor]]]:
    """Each dictionary that has larger ones beside it, with these."""
    for place in places:
        larger = [p for p in places if _like(p, place) and p.seed == place.seed and p.size > place.size]
        if larger:
            yield place.name, load(place.name), (load(p.name) for p in larger)


def _like(a: Place, b: Place) -> bool:
    return a.group == b.group and a.penalty == b.penalty
