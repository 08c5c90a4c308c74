"""How far two passes over the same tokens are apart, and sums of such figures over many sequences.

Every prediction belongs to the position of the token that it is made from: position p of a sequence predicts
token p + 1, so the last position predicts nothing that could be compared.

Shapes: B sequences, C positions, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

BLOCK_VALUES = 1 << 22
"""Logits of one pass that are looked at in float64 at once."""


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """−ln p(next token) [B, C − 1] in nats, float64."""
    wanted = tokens[:, 1:].to(logits.device)
    found = [
        torch.logsumexp(scores.double(), -1) - scores.gather(-1, right[..., None])[..., 0].double()
        for scores, right in zip(_blocks(logits[:, :-1], logits), _blocks(wanted, logits), strict=True)
    ]
    return torch.cat(found, 1)


def divergence(clean: Tensor, spliced: Tensor) -> Tensor:
    """KL(clean ‖ spliced) of next-token distributions [B, C] in nats, float64; never negative."""
    found = []
    for ours, theirs in zip(_blocks(clean, clean), _blocks(spliced, clean), strict=True):
        p, q = log_softmax(ours.double(), -1), log_softmax(theirs.double(), -1)
        # rounding alone could take it below zero
        found.append((p.exp() * (p - q)).sum(-1).clamp(min=0.0))
    return torch.cat(found, 1)


def _blocks(values: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """Values [B, positions, …] by positions, so few that float64 copies of logits [B, C, V] stay small."""
    sequences, _, vocabulary = logits.shape
    return torch.split(values, max(1, BLOCK_VALUES // (sequences * vocabulary)), 1)


@dataclass
class Moments:
    """Mean and spread of a figure per cell, over sequences that are independent of each other.

    Each sequence gives at most one value per cell (a position, for example).
    """

    count: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    total: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    squares: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add(self, values: Tensor, keep: Tensor) -> None:
        """Add values [B, cells] where keep [B, cells] holds."""
        kept = keep.cpu().numpy()
        found = np.where(kept, values.detach().double().cpu().numpy(), 0.0)
        if not len(self.count):
            cells = found.shape[1]
            self.count, self.total, self.squares = np.zeros(cells, np.int64), np.zeros(cells), np.zeros(cells)
        self.count += kept.sum(0)
        self.total += found.sum(0)
        self.squares += (found**2).sum(0)

    def mean(self) -> npt.NDArray[np.float64]:
        """Mean per cell; NaN where there was nothing."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.total / self.count)

    def error(self) -> npt.NDArray[np.float64]:
        """Standard error of the mean per cell: the standard deviation over √count; NaN below two values."""
        with np.errstate(invalid="ignore", divide="ignore"):
            variance = (self.squares - self.total**2 / self.count) / (self.count - 1)
            return np.asarray(np.sqrt(np.maximum(variance, 0.0) / self.count))

    def overall(self) -> float:
        """Mean over everything that was added."""
        return float(self.total.sum() / self.count.sum()) if self.count.sum() else float("nan")

    def record(self) -> dict[str, Any]:
        """As JSON: mean, standard error and count per cell; null where there is nothing."""
        return {
            "mean": [_or_null(value) for value in self.mean()],
            "error": [_or_null(value) for value in self.error()],
            "count": self.count.tolist(),
        }


def _or_null(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
