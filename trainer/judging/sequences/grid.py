"""Values of kept rows, at the sequences and positions that they belong to.

Shapes: B sequences, C positions, N kept rows.
"""

import torch
from torch import Tensor


def on_grid(values: Tensor, keep: Tensor) -> Tensor:
    """Values [N] of the kept rows where they belong: [B, C] float64 on the CPU, 0 elsewhere."""
    grid = torch.zeros(keep.shape, dtype=torch.float64)
    grid[keep] = values.double().cpu()
    return grid


def padded(predictions: Tensor) -> Tensor:
    """[B, C − 1] -> [B, C]: the last position predicts nothing."""
    return torch.nn.functional.pad(predictions, (0, 1))
