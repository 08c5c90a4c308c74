"""Matryoshka dictionaries: nested losses, prefixes, and the same inference as BatchTopK."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from penstock.trainer.kinds.base import Schedule
from penstock.trainer.kinds.matryoshka import MatryoshkaSettings
from penstock.trainer.sae import SAE, build
from services.dictionaries import settings_of

D, S, B = 6, 32, 40
START = Schedule(0, 100)


def settings(**changes: Any) -> MatryoshkaSettings:
    made = settings_of("matryoshka", **({"d_sae": S, "k": 3} | changes))
    assert isinstance(made, MatryoshkaSettings)
    return made


def made(**changes: Any) -> SAE:
    sae = build(D, settings(**changes))
    sae.initialise(1, torch.linspace(-1, 1, D))
    return sae.double()


def rows() -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(
    ("prefixes", "sizes"),
    [
        (None, [1, 3, 7, 15, 32]),
        ([0.25, 0.5], [8, 16, 32]),
        ([0.5, 1.0], [16, 32]),
        ([4, 12, 20], [4, 12, 20, 32]),
        ([0.125, 9], [4, 9, 32]),
    ],
    ids=str,
)
def test_prefixes_are_shares_or_numbers_of_features(prefixes: list[float] | None, sizes: list[int]) -> None:
    assert settings(**({} if prefixes is None else {"prefixes": prefixes})).prefix_sizes == sizes


@pytest.mark.parametrize("prefixes", [[], [0.5, 0.25], [0.5, 16], [40], [0.0, 0.5], [0.01, 0.5]], ids=str)
def test_prefixes_that_are_not_nested_are_refused(prefixes: list[float]) -> None:
    with pytest.raises(ValidationError, match="prefixes"):
        settings(prefixes=prefixes)


def test_the_loss_is_the_mean_over_the_prefixes() -> None:
    sae, x = made(prefixes=[8, 20]), rows()
    result = sae.training_pass(x, x, START, None)
    pre_acts = sae.pre_acts(x)
    smallest = pre_acts.flatten().sort(descending=True).values[3 * B - 1]
    acts = torch.relu(pre_acts) * (pre_acts >= smallest)
    losses = []
    for size in (8, 20, 32):
        again = acts[:, :size] @ sae.directions()[:size] + sae.b_dec
        losses.append((x - again).square().sum(dim=1).mean())
    torch.testing.assert_close(result.components["mse"], losses[2])
    torch.testing.assert_close(result.loss, sum(losses, torch.zeros(())) / 3)
    torch.testing.assert_close(result.components["nested"], result.loss)
    assert len({loss.item() for loss in losses}) == 3


def test_one_prefix_is_batchtopk() -> None:
    """The whole dictionary alone: the same loss and the same gradients."""
    sae, x = made(prefixes=[1.0]), rows()
    plain = build(D, settings_of("batchtopk", d_sae=S, k=3)).double()
    plain.load_state_dict(sae.state_dict())
    dead = torch.arange(S) % 3 == 0
    for module in (sae, plain):
        module.training_pass(x, x, START, dead).loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(sae.get_parameter(name).grad, parameter.grad)
    assert torch.equal(sae.get_buffer("threshold"), plain.get_buffer("threshold"))
    assert torch.equal(sae.encode(x), plain.encode(x))


def test_later_features_do_not_pull_on_earlier_ones_error() -> None:
    """A feature of the first prefix learns from every prefix, one of the last from the last alone."""
    sae, x = made(prefixes=[8]), rows()
    result = sae.training_pass(x, x, START, None)
    whole = torch.autograd.grad(result.components["mse"], sae.W_dec, retain_graph=True)[0]
    nested = torch.autograd.grad(result.loss, sae.W_dec)[0]
    torch.testing.assert_close(nested[8:], whole[8:] / 2)
    assert not torch.allclose(nested[:8], whole[:8] / 2)
