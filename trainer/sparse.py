"""Products with activations of which few are not zero, done for those alone.

With K of S features per row, the decoder's product and every gradient need K/S of the dense arithmetic. The
activations' places are a CSR pattern; PyTorch's own sparse products work on it. On CUDA, where dense products
are cheap, activations stay dense.

Shapes: B rows, D d_in, S features, N places in all.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where activations [B, S] may differ from zero, row by row.

    Attributes:
        start: [B + 1] int64, where each row's places begin.
        column: [N] int64.
        shape: (B, S).
    """

    start: Tensor
    column: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of_rows(indices: Tensor, n_columns: int) -> "Places":
        """K places in each row: indices [B, K]."""
        rows, k = indices.shape
        start = torch.arange(0, rows * k + 1, k, device=indices.device)
        return Places(start, indices.flatten(), (rows, n_columns))

    @cached_property
    def row(self) -> Tensor:
        """[N] row of each place."""
        rows = torch.arange(self.shape[0], device=self.start.device)
        return rows.repeat_interleave(self.start.diff(), output_size=len(self.column))

    @cached_property
    def by_column(self) -> tuple[Tensor, Tensor]:
        """[N] places in order of their columns, and [S + 1] where each column's begin."""
        counts = torch.bincount(self.column, minlength=self.shape[1])
        start = torch.zeros(self.shape[1] + 1, dtype=torch.int64, device=self.column.device)
        torch.cumsum(counts, 0, out=start[1:])
        return torch.argsort(self.column, stable=True), start

    def matrix(self, values: Tensor) -> Tensor:
        """Sparse [B, S] of values [N]."""
        return _csr(self.start, self.column, values, self.shape)

    def transposed(self, values: Tensor) -> Tensor:
        """Sparse [S, B] of values [N]."""
        order, start = self.by_column
        return _csr(start, self.row[order], values[order], (self.shape[1], self.shape[0]))

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """[N] ⟨left[row], right[column]⟩ at each place, of left [B, D] and right [S, D]."""
        nothing = self.matrix(torch.zeros(len(self.column), dtype=left.dtype))
        product: Tensor = torch.sparse.sampled_addmm(nothing, left, right.T, beta=0.0)
        return product.values()

    def active(self, values: Tensor) -> Tensor:
        """[S] int32 how many values of each column are positive."""
        counts = torch.zeros(self.shape[1], dtype=torch.int32, device=values.device)
        return counts.index_add_(0, self.column, (values > 0).int())


def serves(x: Tensor) -> bool:
    """Whether sparse products are what to use for rows like these."""
    return x.device.type == "cpu"


def picked(x: Tensor, W_enc: Tensor, bias: Tensor, pre_acts: Tensor, places: Places) -> Tensor:
    """[N] pre-activations at places, with gradients for W_enc and bias.

    Args:
        pre_acts: [B, S] x W_enc + bias, without gradient.
    """
    values: Tensor = _Picked.apply(x, W_enc, bias, pre_acts, places)  # type: ignore[no-untyped-call]
    return values


def decoded(values: Tensor, W_dec: Tensor, places: Places) -> Tensor:
    """[B, D] product of the activations with values [N] at places, and W_dec [S, D]."""
    product: Tensor = _Decoded.apply(values, W_dec, places)  # type: ignore[no-untyped-call]
    return product


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, bias: Tensor, pre_acts: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(x)
        ctx.places = places
        return pre_acts[places.row, places.column]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        for_W_enc = (ctx.places.transposed(grad) @ x).T
        for_bias = torch.zeros(ctx.places.shape[1], dtype=grad.dtype)
        for_bias.index_add_(0, ctx.places.column, grad)
        return None, for_W_enc, for_bias, None, None


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.places = places
        return places.matrix(values) @ W_dec

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values, W_dec), (grad,) = ctx.saved_tensors, grads
        return ctx.places.products(grad, W_dec), ctx.places.transposed(values) @ grad, None


def _csr(start: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(start, column, values, size=shape, check_invariants=False)


with warnings.catch_warnings():
    # said once per process, of an interface that is used here only where tests compare it with dense products
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    _csr(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0), (1, 1))
