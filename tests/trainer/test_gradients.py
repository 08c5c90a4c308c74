"""Gradients of every kind's loss, in float64, against finite differences of its formula.

The formulas are written out here once more. Where a gradient is cut on purpose, `fixed` stands for the
weights that it is cut off from: differences are taken with `fixed` held. Straight-through parts have no
finite differences; they are checked against their own formula, and against what they estimate.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.trainer.kinds.base import Schedule
from penstock.trainer.sae import SAE, build
from penstock.trainer.straight_through import jump_relu, mean_l0
from services.dictionaries import settings_of

D, S, B, K = 5, 14, 8, 3
LATER = Schedule(500, 1000)
Weights = dict[str, Tensor]
Loss = Callable[[Weights, Weights, Tensor], Tensor]

COMMON: dict[str, Any] = {"d_sae": S}
THRESHOLD, BANDWIDTH = 0.25, 0.4
DEAD = torch.arange(S) % 3 == 0


def directions(w: Weights) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(w["W_dec"], dim=1, keepdim=True)
    return w["W_dec"] / norms


def product(w: Weights, x: Tensor) -> Tensor:
    return (x - w["b_dec"]) @ w["W_enc"]


def squared(difference: Tensor) -> Tensor:
    return (difference**2).sum() / B


def standard(w: Weights, fixed: Weights, x: Tensor) -> Tensor:
    acts = (product(w, x) + w["b_enc"]).relu()
    return squared(x - acts @ directions(w) - w["b_dec"]) + 0.7 * acts.sum() / B


def lp(w: Weights, fixed: Weights, x: Tensor) -> Tensor:
    acts = (product(w, x) + w["b_enc"]).relu()
    return squared(x - acts @ directions(w) - w["b_dec"]) + 0.7 * ((acts + 0.01) ** 0.5).sum() / B


def free(w: Weights, fixed: Weights, x: Tensor) -> Tensor:
    acts: Tensor = (product(w, x) + w["b_enc"]).relu()
    weighted = acts * torch.linalg.vector_norm(w["W_dec"], dim=1)
    penalty: Tensor = weighted.sum() / B
    return squared(x - acts @ w["W_dec"] - w["b_dec"]) + 0.7 * penalty


def tied(w: Weights, fixed: Weights, x: Tensor) -> Tensor:
    return standard(w | {"W_enc": directions(w).T}, fixed, x)


def kept_by_row(pre: Tensor) -> Tensor:
    return pre.relu() * (pre >= pre.sort(dim=1, descending=True).values[:, K - 1 : K])


def kept_by_batch(pre: Tensor) -> Tensor:
    return pre.relu() * (pre >= pre.flatten().sort(descending=True).values[K * B - 1])


def with_auxk(keep: Callable[[Tensor], Tensor]) -> Loss:
    def error(w: Weights, x: Tensor) -> Tensor:
        return x - keep(product(w, x) + w["b_enc"]) @ directions(w) - w["b_dec"]

    def loss(w: Weights, fixed: Weights, x: Tensor) -> Tensor:
        pre = (product(w, x) + w["b_enc"])[:, DEAD]
        dead = pre.relu() * (pre >= pre.sort(dim=1, descending=True).values[:, D // 2 - 1 : D // 2])
        return squared(error(w, x)) + squared(error(fixed, x) - dead @ directions(w)[DEAD]) / 32

    return loss


def gated(w: Weights, fixed: Weights, x: Tensor) -> Tensor:
    gate = product(w, x) + w["b_gate"]
    acts = (gate > 0) * (product(w, x) * w["r_mag"].exp() + w["b_mag"]).relu()
    by_gate = x - gate.relu() @ directions(fixed) - fixed["b_dec"]
    return squared(x - acts @ directions(w) - w["b_dec"]) + 0.7 * gate.relu().sum() / B + squared(by_gate)


def jumprelu(w: Weights, fixed: Weights, x: Tensor) -> Tensor:
    pre = product(w, x) + w["b_enc"]
    acts = pre * (pre > fixed["threshold"])
    l0 = (pre > fixed["threshold"]).sum() / B
    return squared(x - acts @ directions(w) - w["b_dec"]) + 2.0 * (l0 / K - 1) ** 2


CASES: dict[str, tuple[str, dict[str, Any], Loss, bool]] = {
    "standard": ("standard", {"l1_coefficient": 0.7}, standard, False),
    "standard, Lp": (
        "standard",
        {"l1_coefficient": 0.7, "penalty_power": 0.5, "penalty_epsilon": 0.01},
        lp,
        False,
    ),
    "standard, free": ("standard", {"l1_coefficient": 0.7, "decoder_norm": "free"}, free, False),
    "standard, tied": ("standard", {"l1_coefficient": 0.7, "tied": True}, tied, False),
    "topk": ("topk", {"k": K}, with_auxk(kept_by_row), True),
    "batchtopk": ("batchtopk", {"k": K}, with_auxk(kept_by_batch), True),
    "gated": ("gated", {"l1_coefficient": 0.7}, gated, False),
    "jumprelu": (
        "jumprelu",
        {"l0_target": K, "l0_coefficient": 2.0, "bandwidth": BANDWIDTH},
        jumprelu,
        False,
    ),
}
"""Name -> kind, settings, formula, and whether some features are dead."""


def made(kind: str, changes: dict[str, Any]) -> SAE:
    """In float64, every parameter away from its start."""
    sae = build(D, settings_of(kind, **(COMMON | changes))).double()
    sae.initialise(1, torch.linspace(-0.5, 0.5, D))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.W_dec.mul_(torch.linspace(0.5, 2, S, dtype=torch.float64)[:, None])
        if kind == "jumprelu":
            sae.get_parameter("threshold").fill_(THRESHOLD)
    return sae


def rows() -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_finite_differences_of_the_formula(name: str) -> None:
    kind, changes, formula, some_dead = CASES[name]
    sae, x = made(kind, changes), rows()
    result = sae.training_pass(x, x, LATER, DEAD if some_dead else None)
    result.loss.backward()  # type: ignore[no-untyped-call]
    weights = {key: parameter.detach().clone() for key, parameter in sae.named_parameters()}
    assert float(result.loss.detach()) == pytest.approx(float(formula(weights, weights, x)))
    for key, parameter in sae.named_parameters():
        if key == "threshold":
            continue
        assert parameter.grad is not None
        assert parameter.grad.any(), "nothing to compare"
        difference = torch.empty_like(parameter)
        for at in range(parameter.numel()):
            step = torch.zeros_like(parameter)
            step.view(-1)[at] = 1e-6
            up, down = (formula(weights | {key: weights[key] + sign * step}, weights, x) for sign in (1, -1))
            difference.view(-1)[at] = (up - down) / 2e-6
        torch.testing.assert_close(parameter.grad, difference, rtol=1e-6, atol=1e-7, msg=key)


class TestThresholds:
    def test_jumprelus_gradient_is_its_formula(self) -> None:
        """−θ/ε K((z−θ)/ε) of what an activation costs, and −1/ε K((z−θ)/ε) of what being active costs."""
        sae, x = made("jumprelu", CASES["jumprelu"][1]), rows()
        sae.training_pass(x, x, LATER, None).loss.backward()  # type: ignore[no-untyped-call]
        threshold = sae.get_parameter("threshold")
        pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
        again = sae(x).detach()
        expected = torch.zeros(S, dtype=torch.float64)
        l0 = float((pre > THRESHOLD).sum()) / B
        for i in range(B):
            for s in range(S):
                if abs(float(pre[i, s]) - THRESHOLD) >= BANDWIDTH / 2:
                    continue
                cost = float(2 * (again[i] - x[i]) @ sae.directions()[s].detach()) / B
                price = 2.0 * 2 * (l0 / K - 1) / K / B
                expected[s] -= THRESHOLD / BANDWIDTH * cost + price / BANDWIDTH
        assert (expected != 0).sum() > S / 2
        torch.testing.assert_close(threshold.grad, expected)

    def test_they_estimate_the_gradient_of_the_mean(self) -> None:
        """With normal pre-activations z, ∂/∂θ of P(z > θ) is −φ(θ), and of E[z·[z > θ]] it is −θ·φ(θ)."""
        shares = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        pre = math.sqrt(2) * torch.erfinv(2 * shares - 1)[:, None]
        for at in (0.5, 1.5):
            threshold = torch.tensor([at], dtype=torch.float64, requires_grad=True)
            density = math.exp(-at * at / 2) / math.sqrt(2 * math.pi)
            (counted,) = torch.autograd.grad(mean_l0(pre, threshold, 0.05), threshold)
            (active,) = torch.autograd.grad(jump_relu(pre, threshold, 0.05).mean(), threshold)
            assert float(counted) == pytest.approx(-density, rel=0.002)
            assert float(active) == pytest.approx(-at * density, rel=0.002)

    def test_half_precision_is_summed_in_single(self) -> None:
        """On CUDA, autocast gives pre-activations of bfloat16, where 3,000 ones summed make 256."""
        pre = torch.full((3000, 1), 0.5, dtype=torch.bfloat16, requires_grad=True)
        threshold = torch.tensor([0.5], requires_grad=True)
        count = mean_l0(pre, threshold, 1.0)
        acts = jump_relu(pre, threshold, 1.0)
        assert (count.dtype, acts.dtype) == (torch.float32, torch.bfloat16)
        assert float(torch.autograd.grad(count, threshold)[0]) == pytest.approx(-1.0)
        ones = torch.ones_like(acts)
        by_threshold, by_pre = torch.autograd.grad(acts, (threshold, pre), ones)
        assert float(by_threshold) == pytest.approx(-1500.0)
        assert by_pre.dtype == torch.bfloat16
