"""Features that are not in use, and what two losses say together about a grid of penalties and sizes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MINIBATCHES = 10
"""Minibatches without activity after which the report counts a feature as dead."""


def dead_after_rows(rows_since_active: Tensor, rows: int) -> int:
    """Features not active for at least so many rows: OpenAI's window, ten million by default."""
    return int((rows_since_active >= rows).sum())


def dead_after_minibatches(rows_since_active: Tensor, batch_rows: int, minibatches: int = MINIBATCHES) -> int:
    """Features not active in the last N minibatches: the report's window."""
    return dead_after_rows(rows_since_active, minibatches * batch_rows)


def ssll(reconstruction: Sequence[float], l1: Sequence[float]) -> list[float]:
    """Sum of scaled log losses over a grid: z(log L_rec) + z(log L_L1), one per dictionary.

    z takes away the mean over the grid and divides by the standard deviation. A loss of 0, or one that is
    not finite, has no logarithm: it is left out of both and adds nothing, so that nothing is NaN.
    """
    return [a + b for a, b in zip(_scaled_logs(reconstruction), _scaled_logs(l1), strict=True)]


def _scaled_logs(losses: Sequence[float]) -> list[float]:
    logs = torch.tensor([math.log(x) if 0 < x < math.inf else math.nan for x in losses], dtype=torch.float64)
    known = logs[~logs.isnan()]
    spread = float(known.std(correction=0)) if len(known) else 0.0
    if spread == 0:
        return [0.0] * len(losses)
    return [float(z) for z in ((logs - known.mean()) / spread).nan_to_num(0.0)]


def basin(penalties: Sequence[float], losses: Sequence[float], flat: float = 0.5) -> tuple[int, int] | None:
    """Where a loss is sticky: the longest stretch of penalties over which its logarithm hardly changes.

    A step counts as flat if |Δ log loss| ≤ `flat` · Δ log penalty. Undefined logarithms end a stretch.

    Args:
        penalties: rising, above 0.
        losses: of one size of dictionary, at each.

    Returns:
        Indices of its first and last penalty, or None where no step is flat.
    """
    best: tuple[int, int] | None = None
    start = 0
    for i in range(1, len(losses)):
        pair = losses[i - 1], losses[i]
        defined = all(0 < x < math.inf for x in pair)
        step = abs(math.log(pair[1] / pair[0])) if defined else math.inf
        if step > flat * math.log(penalties[i] / penalties[i - 1]):
            start = i
        elif best is None or i - start > best[1] - best[0]:
            best = start, i
    return best
