"""Step functions of a threshold that have a gradient (Rajamanoharan et al. 2024, "Jumping ahead").

A step has none, but its mean over rows does: it depends on how many pre-activations z lie near the threshold
θ. A rectangle K of width ε around θ estimates that density from the rows of a batch:

    ∂/∂θ of z·[z > θ] ≈ −(θ/ε) · K((z − θ)/ε),   ∂/∂z = [z > θ]
    ∂/∂θ of   [z > θ] ≈ −(1/ε) · K((z − θ)/ε),   ∂/∂z = 0
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def jump_relu(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """[B, S] pre-activations where they are above their feature's threshold, 0 elsewhere.

    Args:
        threshold: [S], not negative.
        bandwidth: ε.
    """
    acts: Tensor = _JumpReLU.apply(pre_acts, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return acts


def mean_l0(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Scalar: how many pre-activations [B, S] of a row are above their threshold, on average.

    Args:
        threshold, bandwidth: as for `jump_relu`.
    """
    count: Tensor = _MeanL0.apply(pre_acts, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return count


def _near(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """[B, S] bool: K((z − θ)/ε)."""
    return (pre_acts - threshold).abs() < bandwidth / 2


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return pre_acts * (pre_acts > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_acts, threshold = ctx.saved_tensors
        near = _near(pre_acts, threshold, ctx.bandwidth)
        counted = (gradient * near).sum(dim=0, dtype=threshold.dtype)
        return gradient * (pre_acts > threshold), -threshold / ctx.bandwidth * counted, None


class _MeanL0(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).sum(dim=1).to(threshold.dtype).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        pre_acts, threshold = ctx.saved_tensors
        near = _near(pre_acts, threshold, ctx.bandwidth).sum(dim=0, dtype=threshold.dtype)
        return None, -gradient / (ctx.bandwidth * len(pre_acts)) * near, None
