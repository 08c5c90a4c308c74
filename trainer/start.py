"""What a training takes from its first window: the input scale, and where b_dec starts."""

import math

import torch
from torch import Tensor

_BLOCK = 8192
MEDIAN_ROWS = 16_384
"""Rows that a geometric median is taken of, at most."""
_MEDIAN_STEPS = 50


def mean_and_scale(rows: Tensor) -> tuple[Tensor, float]:
    """[D] float64 mean of rows [R, D], and the factor that gives them a mean squared norm of D."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    squared = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in torch.split(rows, _BLOCK):
        exact = block.double()
        total += exact.sum(dim=0)
        # by column first: the bits of one full sum depend on the number of threads
        squared += exact.square().sum(dim=0)
    n = max(1, len(rows))
    mean_square = float(squared.sum()) / n
    return total / n, math.sqrt(rows.shape[1] / mean_square) if mean_square > 0 else 1.0


def geometric_median(rows: Tensor) -> Tensor:
    """[D] float32: the point with the least summed distance to rows [R, D] (Weiszfeld 1937)."""
    points = rows[:MEDIAN_ROWS].double()
    median = points.mean(dim=0)
    for _ in range(_MEDIAN_STEPS):
        weights = 1 / torch.linalg.vector_norm(points - median, dim=1).clamp(min=1e-9)
        median = (points * weights[:, None]).sum(dim=0) / weights.sum()
    return median.float()
