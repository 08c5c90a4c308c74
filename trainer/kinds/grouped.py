"""Rows sorted by expert, and matrix products in which each expert's rows meet its own weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.trainer.kinds.base import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which rows go to which expert. Nothing here waits for a GPU.

    Attributes:
        order: [B] numbers of the rows, those of the first expert first.
        expert: [B] the expert of each, in that order.
        counts: [E] rows of each expert.
    """

    order: Tensor
    expert: Tensor
    counts: Tensor

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Groups:
        """The groups of rows whose experts are `chosen` [B]."""
        expert, order = torch.sort(chosen, stable=True)
        # bincount would wait for the device
        counts = (chosen[:, None] == torch.arange(experts, device=chosen.device)).sum(dim=0)
        return cls(order, expert, counts)

    def sorted_back(self, values: Tensor) -> Tensor:
        """Values of sorted rows, in the order in which the rows came."""
        return values[torch.argsort(self.order)]

    def product(self, values: Tensor, weights: Tensor) -> Tensor:
        """[B, m] each sorted row [B, n] times the matrix of its expert, of [E, n, m].

        On the CPU in one product per expert. On a GPU, which is not to be waited for, by one grouped kernel,
        in bfloat16; where it does not take the shape, by every expert's product with all rows.
        """
        if values.device.type == "cpu":
            return self.one_by_one(values, weights)
        return (self.by_kernel if fits_kernel(weights) else self.by_masks)(values, weights)

    def one_by_one(self, values: Tensor, weights: Tensor) -> Tensor:
        """`product`, where numbers of rows are at hand."""
        pieces = torch.split(values, self.counts.tolist())
        return torch.cat([piece @ own for piece, own in zip(pieces, weights, strict=True)])

    def by_kernel(self, values: Tensor, weights: Tensor) -> Tensor:
        """`product`, in bfloat16."""
        ends = self.counts.cumsum(0).to(torch.int32)
        product: Tensor = torch.nn.functional.grouped_mm(values.bfloat16(), weights.bfloat16(), offs=ends)
        return product

    def by_masks(self, values: Tensor, weights: Tensor) -> Tensor:
        """`product`, E times as much work."""
        masks = (self.expert == expert for expert in range(len(weights)))
        parts = [(values * mask[:, None]) @ own for mask, own in zip(masks, weights, strict=True)]
        return torch.stack(parts).sum(dim=0)


def fits_kernel(weights: Tensor) -> bool:
    """Whether the grouped kernel takes weights [E, n, m]: its rows begin at multiples of 16 bytes."""
    return hasattr(torch.nn.functional, "grouped_mm") and all(n % 8 == 0 for n in weights.shape[1:])
