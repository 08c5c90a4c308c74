"""Ratios of sums over many sequences, and how sure they are.

    value = Σ a / Σ b        a mean where b counts rows

Sequences are independent of each other, their positions are not: so the sequence is what is counted, and the
standard error is that of the ratio's linearisation (the delta method; Cochran 1977, "Sampling Techniques",
§ 6.4). Sums only: nothing grows with the number of sequences.

Shapes: B sequences, C positions.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
Estimate = dict[str, float | None]
"""`mean`, and its standard error `error`; null where there is none."""


class Ratio:
    """Σ a / Σ b at each position, over all of them, within the trained positions and beyond them.

    Args:
        trained_context: positions from this one on are beyond.
    """

    def __init__(self, trained_context: int) -> None:
        self.trained_context = trained_context
        self._positions: Array | None = None
        self._count: npt.NDArray[np.int64] | None = None
        self._sequences = 0
        self._total = np.zeros(4)
        self._products = np.zeros((4, 4))

    def add(self, above: Tensor, below: Tensor | None, keep: Tensor) -> None:
        """Add a and b [B, C] where keep [B, C] holds; None stands for b = 1."""
        kept = keep.detach().cpu().numpy()
        one = torch.ones_like(keep, dtype=torch.float64) if below is None else below
        a, b = (np.where(kept, values.detach().double().cpu().numpy(), 0.0) for values in (above, one))
        products = np.stack([a, b, a * a, a * b, b * b]).sum(1)
        if self._positions is None or self._count is None:
            self._positions, self._count = np.zeros_like(products), np.zeros(kept.shape[1], np.int64)
        self._positions += products
        self._count += kept.sum(0)
        t = self.trained_context
        parts = np.stack([a[:, :t].sum(1), b[:, :t].sum(1), a[:, t:].sum(1), b[:, t:].sum(1)], 1)
        self._sequences += len(parts)
        self._total += parts.sum(0)
        self._products += parts.T @ parts

    def by_position(self) -> tuple[Array, Array]:
        """Value and standard error per position; NaN where there is none."""
        if self._positions is None or self._count is None:
            return np.zeros(0), np.zeros(0)
        a, b, aa, ab, bb = self._positions
        n = self._count
        with np.errstate(invalid="ignore", divide="ignore"):
            value = a / b
            squares = np.maximum(aa - 2 * value * ab + value**2 * bb, 0.0)
            error = np.where(n > 1, np.sqrt(n / (n - 1) * squares) / np.abs(b), np.nan)
        return value, error

    def overall(self) -> Estimate:
        """Over all positions."""
        a, b = self._total[0] + self._total[2], self._total[1] + self._total[3]
        return self._mean(a, b, np.array([1.0, 0, 1, 0]), np.array([0.0, 1, 0, 1]))

    def within(self) -> Estimate:
        """Over the positions that were trained on."""
        return self._mean(self._total[0], self._total[1], np.array([1.0, 0, 0, 0]), np.array([0.0, 1, 0, 0]))

    def beyond(self) -> Estimate:
        """Over the positions behind them."""
        return self._mean(self._total[2], self._total[3], np.array([0.0, 0, 1, 0]), np.array([0.0, 0, 0, 1]))

    def beyond_over_within(self) -> Estimate:
        """The one value over the other, with the error of sequences that have both."""
        if not self._total.all():
            return {"mean": None, "error": None}
        a, b, c, d = self._total
        value = c / d / (a / b)
        return self._estimate(value, value * np.array([-1, 1, 1, -1]) / self._total)

    def record(self) -> dict[str, Any]:
        """As JSON; null where there is nothing."""
        value, error = self.by_position()
        return {
            "by_position": {"mean": _listed(value), "error": _listed(error)},
            "overall": self.overall(),
            "within": self.within(),
            "beyond": self.beyond(),
            "beyond_over_within": self.beyond_over_within(),
        }

    def _mean(self, a: float, b: float, da: Array, db: Array) -> Estimate:
        if not b:
            return {"mean": None, "error": None}
        return self._estimate(a / b, (da - a / b * db) / b)

    def _estimate(self, value: float, gradient: Array) -> Estimate:
        """A function of the four totals, with its gradient there."""
        n = self._sequences
        spread = self._products - np.outer(self._total, self._total) / n
        variance = float(gradient @ spread @ gradient) * n / (n - 1) if n > 1 else float("nan")
        return {"mean": finite_or_null(value), "error": finite_or_null(np.sqrt(max(variance, 0.0)))}


def finite_or_null(value: float) -> float | None:
    """A number as JSON has it."""
    return float(value) if np.isfinite(value) else None


def _listed(values: Array) -> list[float | None]:
    return [finite_or_null(value) for value in values]
