"""What an SAE is worth by its rows alone: sparsity, reconstruction, and how often its features fire.

Shapes: N rows, E width of what is reconstructed, S features.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

DENSITY_EDGES = np.linspace(-5.0, 0.0, 51)
"""Edges of the feature-density histogram, log10 of the share of rows a feature is active on."""


def density(fired: Tensor, rows: int) -> dict[str, Any]:
    """Histogram of log10 firing frequency; features never active are counted apart."""
    counts = fired[fired > 0].double().cpu().numpy()
    log_frequency = np.clip(np.log10(counts / rows), DENSITY_EDGES[0], DENSITY_EDGES[-1])
    histogram, _ = np.histogram(log_frequency, DENSITY_EDGES)
    return {
        "log10_edges": DENSITY_EDGES.round(6).tolist(),
        "counts": histogram.tolist(),
        "never_active": int((fired == 0).sum()),
    }


class Spread:
    """How far rows of a hook point lie from their mean."""

    def __init__(self) -> None:
        self.rows = 0
        self._total: Tensor | None = None
        self._squares = 0.0

    def add(self, rows: Tensor) -> None:
        """Add rows [N, E]."""
        exact = rows.double()
        self.rows += len(rows)
        self._total = exact.sum(0) if self._total is None else self._total + exact.sum(0)
        self._squares += float(exact.square().sum())

    def variance(self) -> float:
        """Σ‖x − mean(x)‖² over all rows."""
        assert self._total is not None
        return self._squares - float((self._total / self.rows).square().sum()) * self.rows


class RowSums:
    """Sums over rows of one SAE."""

    def __init__(self, d_sae: int) -> None:
        self._residual = 0.0
        self._active = 0.0
        self._fired = torch.zeros(d_sae, dtype=torch.int64)

    def add(self, target: Tensor, reconstruction: Tensor, acts: Tensor) -> None:
        """Add rows [N, E], what stands for them [N, E], and feature activations [N, S]."""
        active = acts > 0
        self._residual += float((target - reconstruction).double().square().sum())
        self._active += float(active.sum())
        self._fired += active.sum(0).cpu()

    def figures(self, target: Spread) -> dict[str, Any]:
        """Means over rows; `squared_error` is Σ_d (x − x̂)² in the units of the rows."""
        variance = target.variance()
        return {
            "rows": target.rows,
            "l0": self._active / target.rows,
            "squared_error": self._residual / target.rows,
            "explained_variance": 1 - self._residual / variance if variance > 0 else None,
            "dead_features": int((self._fired == 0).sum()),
            "density": density(self._fired, target.rows),
        }
