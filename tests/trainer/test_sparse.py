"""Sparse products give what dense ones give, values and gradients."""

import pytest
import torch
from torch import Tensor

from penstock.trainer import sparse
from penstock.trainer.sparse import Few, Places, PreActs

B, D, S = 11, 7, 23


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven() -> Places:
    """Rows with no place at all, with one, and with many."""
    chosen = drawn(B, S, seed=5) > torch.linspace(-1, 3, B, dtype=torch.float64)[:, None]
    chosen[3] = False
    start = torch.zeros(B + 1, dtype=torch.int64)
    start[1:] = chosen.sum(dim=1).cumsum(0)
    return Places(start, chosen.nonzero()[:, 1], (B, S))


def even() -> Places:
    return Places.of_rows(drawn(B, S, seed=6).topk(4, sorted=False).indices, S)


PLACES = pytest.mark.parametrize("places", [even(), uneven()], ids=["even", "uneven"])


def dense(values: Tensor, places: Places) -> Tensor:
    full = torch.zeros(places.shape, dtype=values.dtype)
    for n, (row, column) in enumerate(zip(places.row.tolist(), places.column.tolist(), strict=True)):
        full[row, column] = values[n]
    return full


@PLACES
def test_matrices_are_where_their_places_are(places: Places) -> None:
    values = drawn(len(places.column))
    assert torch.equal(places.matrix(values).to_dense(), dense(values, places))
    assert torch.equal(places.transposed(values).to_dense(), dense(values, places).T)
    assert places.active(values).tolist() == (dense(values, places) > 0).sum(dim=0).tolist()


@PLACES
def test_a_product_with_the_decoder(places: Places) -> None:
    values, W_dec = drawn(len(places.column)).requires_grad_(), drawn(S, D, seed=1).requires_grad_()
    product = sparse.decoded(values, W_dec, places)
    torch.testing.assert_close(product, dense(values.detach(), places) @ W_dec.detach())
    assert torch.autograd.gradcheck(lambda v, w: sparse.decoded(v, w, places), (values, W_dec))


@PLACES
def test_pre_activations_where_they_are_wanted(places: Places) -> None:
    x, W_enc, bias = drawn(B, D), drawn(D, S, seed=1).requires_grad_(), drawn(S, seed=2).requires_grad_()

    def values(weights: Tensor, bias: Tensor) -> Tensor:
        pre_acts = (x @ weights + bias).detach()
        return sparse.picked(x, weights, bias, pre_acts, places)

    full = x @ W_enc.detach() + bias.detach()
    assert torch.equal(values(W_enc, bias), full[places.row, places.column])
    assert torch.autograd.gradcheck(values, (W_enc, bias))


def kept(pre_acts: PreActs, way: str) -> Few:
    features = torch.arange(S) % 3 > 0
    return {
        "rows": lambda: pre_acts.top_of_rows(4),
        "batch": lambda: pre_acts.top_of_batch(4),
        "some features": lambda: pre_acts.only(features).top_of_rows(15),
        "a part": lambda: pre_acts.top_of_batch(4).split([2, 0, 9, S - 11])[2],
    }[way]()


@pytest.mark.parametrize("way", ["rows", "batch", "some features", "a part"])
def test_sparse_and_dense_activations_do_the_same(way: str) -> None:
    x, found = drawn(B, D), []
    for sparse_too in (True, False):
        weights = [drawn(D, S, seed=1), drawn(S, seed=2), drawn(S, D, seed=3)]
        W_enc, bias, W_dec = (tensor.requires_grad_() for tensor in weights)
        acts = kept(PreActs.of(x, W_enc, bias, sparse_too), way)
        product = acts.decode(W_dec[2:11] if way == "a part" else W_dec)
        (product * drawn(B, D, seed=4)).sum().backward()  # type: ignore[no-untyped-call]
        assert acts.active().sum() > 0
        assert acts.smallest() > 0
        found.append([product.detach(), acts.active(), acts.smallest(), W_enc.grad, bias.grad, W_dec.grad])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_nothing_kept_has_no_smallest() -> None:
    nothing = PreActs.of(torch.zeros(B, D), torch.zeros(D, S), -torch.ones(S))
    for acts in (nothing.top_of_rows(2), nothing.top_of_batch(2)):
        assert acts.smallest() == float("inf")
        assert acts.active().sum() == 0
