"""How often and how strongly each feature is active, and where most: sums over rows in bounded memory.

Shapes: N rows, S features, k places that are kept of each.
"""

import math

import torch
from torch import Tensor

from penstock.common.permutation import permutation

PER_OCTAVE = 2
"""Bins of a histogram between an activation and its double."""
LOWEST, HIGHEST = -24, 24
"""Octaves: activations below 2^LOWEST and above 2^HIGHEST fall into the outermost bins."""
BINS = PER_OCTAVE * (HIGHEST - LOWEST)

BANDS = {"frequent": (0.0, 0.1), "medium": (0.4, 0.6), "rare": (0.9, 1.0)}
"""Parts of the features that were ever active, the most frequent first, that some are drawn from."""


class Activity:
    """Sums over rows of one dictionary.

    Attributes:
        rows: how many were added.
        fired: [S] rows on which each feature was active.
        total: [S] sum of its activations.
        histogram: [S, BINS] rows by the logarithm of the activation, where it was active.
        values: [S, k] its strongest activations, descending; −inf where there were fewer.
        places: [S, k] where they were, as numbered by the caller.
    """

    def __init__(self, n_features: int, k: int, device: torch.device) -> None:
        self.rows = 0
        self.fired = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.total = torch.zeros(n_features, dtype=torch.float64, device=device)
        self.histogram = torch.zeros((n_features, BINS), dtype=torch.int64, device=device)
        self.values = torch.full((n_features, k), -math.inf, device=device)
        self.places = torch.full((n_features, k), -1, dtype=torch.int64, device=device)

    def add(self, acts: Tensor, first: int) -> None:
        """Add feature activations [N, S] of the places first, first + 1, …"""
        self.rows += len(acts)
        active = acts > 0
        self.fired += active.sum(0)
        self.total += acts.clamp(min=0).sum(0, dtype=torch.float64)
        octave = torch.log2(acts[active].double())
        bins = ((octave - LOWEST) * PER_OCTAVE).floor().long().clamp(0, BINS - 1)
        cells = active.nonzero()[:, 1] * BINS + bins
        self.histogram.view(-1).scatter_add_(0, cells, torch.ones_like(cells))
        by_feature = torch.where(active, acts, -math.inf).T
        values, rows = by_feature.topk(min(self.values.shape[1], len(acts)), dim=1)
        together = torch.cat([self.values, values], 1)
        # of equal activations those added earlier stay
        kept, order = together.sort(dim=1, descending=True, stable=True)
        k = self.values.shape[1]
        self.values = kept[:, :k]
        self.places = torch.cat([self.places, rows + first], 1).gather(1, order[:, :k])

    def histogram_of(self, feature: int) -> tuple[list[float], list[int]]:
        """Edges (one more than counts) and counts, from the first bin that holds anything to the last."""
        counts = self.histogram[feature].cpu()
        held = counts.nonzero()[:, 0].tolist()
        if not held:
            return [], []
        first, last = held[0], held[-1]
        edges = [2.0 ** (LOWEST + bin_ / PER_OCTAVE) for bin_ in range(first, last + 2)]
        return edges, counts[first : last + 1].tolist()


def draw(fired: Tensor, of_each: int, seed: int, name: str) -> list[tuple[int, str]]:
    """Some features with the band they were drawn from; of each band by falling frequency.

    Args:
        fired: [S] rows on which each was active.
        name: the dictionary's, so that not all draw alike.
    """
    counts = fired.tolist()
    alive = sorted((f for f, count in enumerate(counts) if count), key=lambda f: (-counts[f], f))
    drawn: dict[int, str] = {}
    for band, (start, stop) in BANDS.items():
        members = alive[math.floor(start * len(alive)) : math.ceil(stop * len(alive))]
        free = [members[i] for i in permutation(len(members), seed, "contexts", name, band)]
        chosen = [feature for feature in free if feature not in drawn][:of_each]
        drawn |= dict.fromkeys(sorted(chosen, key=alive.index), band)
    return list(drawn.items())
