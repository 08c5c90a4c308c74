"""Switch dictionaries: routing, what experts see, load, and what the router looks for."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from penstock.trainer.kinds.base import Schedule
from penstock.trainer.kinds.grouped import Groups, fits_kernel
from penstock.trainer.kinds.switch import Switch, router_cosines
from penstock.trainer.sae import SAE, build
from penstock.trainer.step import SAETraining
from services.dictionaries import settings_of

D, S, E, B = 6, 20, 4, 50
START = Schedule(0, 100)


def made(**changes: Any) -> Any:
    sae = build(D, settings_of("switch", **({"d_sae": S, "k": 2, "experts": E} | changes)))
    sae.initialise(3, torch.linspace(-1, 1, D))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae.double()


def rows(n: int = B) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def by_hand(sae: SAE, x: Tensor, k: int, always_on_k: int = 0) -> Tensor:
    """[S] feature activations of one row, as the formula has them."""
    size, first = S // E, int(always_on_k > 0)
    told = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    centred = x - told["b_dec"]
    logits = centred @ told["W_router"] + told["b_router"]
    p = torch.softmax(logits, 0)
    pre = centred @ told["W_enc"] + told["b_enc"]
    acts = torch.zeros(S, dtype=torch.float64)

    def keep(expert: int, k: int, factor: float) -> None:
        own = range(expert * size, (expert + 1) * size)
        for feature in sorted(own, key=lambda f: -float(pre[f]))[:k]:
            acts[feature] = factor * max(0.0, float(pre[feature]))

    chosen = int(p.argmax())
    keep(chosen + first, k, float(p[chosen]))
    if always_on_k:
        keep(0, always_on_k, 1.0)
    return acts


@pytest.mark.parametrize("always_on_k", [0, 3])
def test_a_row_is_seen_by_its_expert_alone(always_on_k: int) -> None:
    sae, x = made(always_on_k=always_on_k), rows()
    acts = sae.encode(x)
    expected = torch.stack([by_hand(sae, row, 2, always_on_k) for row in x])
    torch.testing.assert_close(acts, expected)
    experts = (acts.view(B, E, S // E) > 0).any(dim=2)[:, int(always_on_k > 0) :]
    assert experts.sum(dim=1).max() == 1
    assert experts.any(dim=0).sum() > 1, "all rows went to one expert: the test is void"


def test_loads_are_shares_of_rows_and_the_balance_is_zero_when_even() -> None:
    sae, x = made(balance_coefficient=0.25), rows()
    result = sae.training_pass(x, x, START, None)
    p = torch.softmax((x - sae.b_dec) @ sae.W_router + sae.b_router, 1)
    load = torch.bincount(p.argmax(1), minlength=E).double() / B
    parts = result.components
    assert (float(parts["max_load"]), float(parts["min_load"])) == pytest.approx(
        (float(load.max()), float(load.min()))
    )
    balance = E * (load * p.mean(0)).sum() - 1
    torch.testing.assert_close(parts["balance"], balance)
    torch.testing.assert_close(result.loss, parts["mse"] + 0.25 * D * balance)
    with torch.no_grad():
        sae.W_router.zero_()
        sae.b_router.zero_()
    # every probability is 1/E, whoever is chosen
    assert sae.training_pass(x, x, START, None).components["balance"].item() == pytest.approx(0, abs=1e-12)


def test_the_balance_loss_evens_the_load_out() -> None:
    """A router that sends nearly every row to one expert, with and without it."""
    loads = {}
    for coefficient in (0.0, 0.2):
        settings = settings_of(
            "switch", d_sae=S, k=2, experts=E, balance_coefficient=coefficient, lr=1e-2, lr_warmup_steps=1
        )
        training = SAETraining(D, settings, torch.device("cpu"))
        x = rows(256).bfloat16()
        training.initialise(x)
        with torch.no_grad():
            training.sae.get_parameter("b_router")[0] = 4.0
        training.begin_window(x, 0)
        for step in range(150):
            training.step(x, Schedule(step, 1000))
        training.begin_window(x, 0)
        training.step(x, Schedule(150, 1000))
        figures, _ = training.end_window()
        loads[coefficient] = figures["max_load"]
    assert loads[0.0] > 0.6, loads
    assert loads[0.2] < 0.4, loads


def test_the_auxiliary_loss_is_by_dead_features_of_the_rows_own_expert() -> None:
    sae, x = made(aux_k=2, aux_coefficient=0.5), rows()
    dead = torch.arange(S) % 2 == 0
    result = sae.training_pass(x, x, START, dead)
    size, total = S // E, 0.0
    directions = sae.directions().detach()
    chosen = ((x - sae.b_dec) @ sae.W_router + sae.b_router).argmax(1)
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    for i in range(B):
        error = (x[i] - sae(x[i : i + 1])[0]).detach()
        own = [f for f in range(int(chosen[i]) * size, (int(chosen[i]) + 1) * size) if dead[f]]
        for feature in sorted(own, key=lambda f: -float(pre[i, f]))[:2]:
            error = error - pre[i, feature].clamp(min=0) * directions[feature]
        total += float(error.square().sum())
    assert result.components["aux"].item() == pytest.approx(total / B)


def test_router_directions_beside_a_dense_dictionary() -> None:
    sae = made()
    dense = build(D, settings_of("topk", d_sae=3))
    dense.initialise(0, None)
    dense.double()
    with torch.no_grad():
        dense.W_enc[:, 1] = -5 * sae.W_router[:, 2]
        dense.W_enc[:, 2] = 0.1 * sae.W_router[:, 0]
    assert isinstance(sae, Switch)
    cosines = router_cosines(sae, dense)
    assert cosines.shape == (E, 3)
    assert float(cosines[2, 1]) == pytest.approx(-1)
    assert float(cosines[0, 2]) == pytest.approx(1)
    assert cosines.abs().max() <= 1 + 1e-9
    torch.testing.assert_close(sae.router_directions().norm(dim=1), torch.ones(E, dtype=torch.float64))


class TestGroups:
    chosen = torch.tensor([2, 0, 2, 3, 0, 2, 2, 0])  # nothing for expert 1

    def test_rows_are_sorted_by_expert_and_back(self) -> None:
        groups = Groups.of(self.chosen, 4)
        assert groups.counts.tolist() == [3, 0, 4, 1]
        assert groups.order.tolist() == [1, 4, 7, 0, 2, 5, 6, 3]
        values = torch.arange(8.0)
        assert torch.equal(groups.sorted_back(values[groups.order]), values)

    @pytest.mark.parametrize(
        ("way", "tolerance"), [("one_by_one", 0), ("by_masks", 1e-6), ("by_kernel", 2e-2)]
    )
    def test_every_way_gives_the_same_products_and_gradients(self, way: str, tolerance: float) -> None:
        groups = Groups.of(self.chosen, 4)
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(8, 16, generator=generator, requires_grad=True)
        weights = torch.randn(4, 16, 24, generator=generator, requires_grad=True)
        expected = torch.stack([v @ weights[e] for v, e in zip(values, groups.expert, strict=True)])
        product = getattr(groups, way)(values, weights)
        assert product.shape == (8, 24)
        rtol, atol = max(tolerance, 1e-5), 10 * max(tolerance, 1e-6)
        torch.testing.assert_close(product.float(), expected, rtol=rtol, atol=atol)
        along = torch.randn(8, 24, generator=generator)
        found = torch.autograd.grad((product.float() * along).sum(), (values, weights))
        right = torch.autograd.grad((expected * along).sum(), (values, weights))
        for mine, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)

    def test_what_the_kernel_takes(self) -> None:
        assert fits_kernel(torch.zeros(4, 16, 24))
        assert not fits_kernel(torch.zeros(4, 12, 24))
        assert not fits_kernel(torch.zeros(4, 16, 20))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_sae": 21}, "d_sae of 21 is not a multiple of experts"),
        ({"k": 6}, "an expert has 5 features only"),
        ({"always_on_k": 6}, "an expert has 5 features only"),
        ({"experts": 1}, "greater than or equal to 2"),
    ],
    ids=str,
)
def test_experts_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        settings_of("switch", **({"d_sae": S, "k": 2, "experts": E} | changes))
