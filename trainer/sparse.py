"""Products with activations of which few are not zero, done for those alone.

With K of S features per row, the decoder's product and every gradient need K/S of the dense arithmetic. The
activations' places are a CSR pattern; PyTorch's own sparse products work on it. On CUDA, where dense products
are cheap, activations stay dense.

Shapes: B rows, D d_in, S features, N places in all.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
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

    @staticmethod
    def of_flat(indices: Tensor, n_rows: int, n_columns: int) -> "Places":
        """Places by their numbers in the flattened matrix: [N], in any order."""
        flat = indices.sort().values
        start = torch.zeros(n_rows + 1, dtype=torch.int64, device=flat.device)
        rows = torch.div(flat, n_columns, rounding_mode="floor")
        torch.cumsum(torch.bincount(rows, minlength=n_rows), 0, out=start[1:])
        return Places(start, flat - rows * n_columns, (n_rows, n_columns))

    def within(self, inside: Tensor, begin: int, end: int) -> "Places":
        """Of columns [begin, end) alone, where `inside` [N] bool says which places these are."""
        start = torch.zeros_like(self.start)
        torch.cumsum(torch.bincount(self.row[inside], minlength=self.shape[0]), 0, out=start[1:])
        return Places(start, self.column[inside] - begin, (self.shape[0], end - begin))

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


@dataclass(frozen=True)
class PreActs:
    """Pre-activations [B, S] of which only few will be used.

    Attributes:
        values: x W_enc + bias; with gradients where activations stay dense.
        x, W_enc, bias: what they come from.
        sparse: whether the activations kept of them are sparse tensors, and gradients go through these alone.
    """

    values: Tensor
    x: Tensor
    W_enc: Tensor
    bias: Tensor
    sparse: bool

    @staticmethod
    def of(x: Tensor, W_enc: Tensor, bias: Tensor, sparse: bool | None = None) -> "PreActs":
        """On CPUs sparse, unless told."""
        sparse = x.device.type == "cpu" if sparse is None else sparse
        with torch.set_grad_enabled(torch.is_grad_enabled() and not sparse):
            return PreActs(torch.addmm(bias, x, W_enc), x, W_enc, bias, sparse)

    def only(self, features: Tensor) -> "PreActs":
        """Those of some features [S] bool; the others lose against every number."""
        return replace(self, values=self.values.masked_fill(~features, float("-inf")))

    def top_of_rows(self, k: int) -> "Few":
        """ReLU of each row's k largest."""
        indices = self.values.detach().topk(k, dim=-1, sorted=False).indices
        return self._keep(lambda: Places.of_rows(indices, self.values.shape[1]), indices)

    def top_of_batch(self, k: int) -> "Few":
        """ReLU of the B·k largest, whatever rows they are in."""
        rows, columns = self.values.shape
        flat = self.values.detach().flatten().topk(min(k, columns) * rows, sorted=False).indices
        return self._keep(lambda: Places.of_flat(flat, rows, columns), flat)

    def _keep(self, places: Callable[[], Places], indices: Tensor) -> "Few":
        if self.sparse:
            found = places()
            return _Sparse(torch.relu(picked(self.x, self.W_enc, self.bias, self.values, found)), found)
        values = self.values if indices.dim() == 2 else self.values.flatten()
        top = torch.relu(values.gather(-1, indices))
        return _Dense(torch.zeros_like(values).scatter_(-1, indices, top).view_as(self.values))


class Few(ABC):
    """Activations [B, S] ≥ 0 of which few are not zero."""

    @abstractmethod
    def decode(self, W_dec: Tensor) -> Tensor:
        """[B, D] product with W_dec [S, D]."""

    @abstractmethod
    def active(self) -> Tensor:
        """[S] int32 on how many rows each feature is active."""

    @abstractmethod
    def split(self, widths: list[int]) -> list["Few"]:
        """Those of the first features, of those that follow, and so on: [B, width] each."""

    @abstractmethod
    def smallest(self) -> Tensor:
        """The smallest positive one, infinity if there is none: scalar, without gradient."""


@dataclass(frozen=True)
class _Dense(Few):
    values: Tensor

    def decode(self, W_dec: Tensor) -> Tensor:
        return self.values @ W_dec

    def active(self) -> Tensor:
        return (self.values > 0).sum(dim=0, dtype=torch.int32)

    def split(self, widths: list[int]) -> list[Few]:
        return [_Dense(part) for part in torch.split(self.values, widths, dim=1)]

    def smallest(self) -> Tensor:
        return _smallest(self.values)


@dataclass(frozen=True)
class _Sparse(Few):
    values: Tensor
    places: Places

    def decode(self, W_dec: Tensor) -> Tensor:
        return decoded(self.values, W_dec, self.places)

    def active(self) -> Tensor:
        return self.places.active(self.values)

    def split(self, widths: list[int]) -> list[Few]:
        parts: list[Few] = []
        for begin, end in pairwise(accumulate(widths, initial=0)):
            inside = (self.places.column >= begin) & (self.places.column < end)
            parts.append(_Sparse(self.values[inside], self.places.within(inside, begin, end)))
        return parts

    def smallest(self) -> Tensor:
        return _smallest(self.values)


def _smallest(values: Tensor) -> Tensor:
    there = values.detach().flatten()
    there = there.masked_fill(there <= 0, float("inf"))
    # the infinity added is for batches that have no rows
    return torch.cat([there, there.new_full((1,), float("inf"))]).min()


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
