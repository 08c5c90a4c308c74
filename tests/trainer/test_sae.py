"""The modules: what they compute, what their losses pull on, and that nothing is lost in storing them."""

import math

import pytest
import safetensors.torch
import torch
from torch import Tensor

from penstock.trainer.kinds import SAESettings, StandardSettings, TopKSettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.sae import SAE, build

START = Schedule(0, 100)
D, S, B = 6, 20, 9


def standard_settings(**changes: float) -> StandardSettings:
    base = {"d_sae": S, "l1_coefficient": 0.7, "l1_warmup_steps": 0}
    return StandardSettings.model_validate(
        {"name": "a", "architecture": "standard", "hook_name": "h"} | base | changes
    )


def topk_settings(**changes: float) -> TopKSettings:
    base = {"d_sae": S, "k": 4}
    return TopKSettings.model_validate(
        {"name": "a", "architecture": "topk", "hook_name": "h"} | base | changes
    )


KINDS = [standard_settings(), topk_settings()]


def made(settings: SAESettings, seed: int = 1) -> SAE:
    """An SAE in float64 with every parameter away from its start, decoder rows of all lengths."""
    sae = build(D, settings)
    sae.initialise(seed, torch.linspace(-1, 1, D))
    sae.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.1, 5, settings.d_sae, dtype=torch.float64)[:, None])
        sae.W_enc.add_(0.3 * torch.randn(sae.W_enc.shape, generator=generator, dtype=torch.float64))
        sae.b_enc.add_(0.3 * torch.randn(sae.b_enc.shape, generator=generator, dtype=torch.float64))
    return sae


def rows(seed: int = 2) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def number(scalar: Tensor) -> float:
    return float(scalar.detach())


def unit(matrix: Tensor) -> Tensor:
    return torch.stack([row / math.sqrt(number((row * row).sum())) for row in matrix])


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.architecture)
def test_decoder_directions_have_unit_norm_in_the_forward_pass(settings: SAESettings) -> None:
    sae, x = made(settings), rows()
    acts = sae.encode(x)
    expected = acts @ unit(sae.W_dec.detach()) + sae.b_dec
    torch.testing.assert_close(sae.directions().norm(dim=1), torch.ones(S, dtype=torch.float64))
    torch.testing.assert_close(sae.decode(acts), expected)
    torch.testing.assert_close(sae(x), expected)
    torch.testing.assert_close(sae.training_pass(x, x, START, None).reconstruction, expected)


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.architecture)
def test_losses_are_summed_over_dims_and_averaged_over_rows(settings: SAESettings) -> None:
    sae, x = made(settings), rows()
    result = sae.training_pass(x, x, START, None)
    errors = [number(((x[i] - sae(x[i : i + 1])[0]) ** 2).sum()) for i in range(B)]
    assert number(result.components["mse"]) == pytest.approx(sum(errors) / B)
    acts = sae.encode(x)
    assert result.active.tolist() == [int((acts[:, s] > 0).sum()) for s in range(S)]


def test_the_initial_encoder_is_the_decoders_transpose() -> None:
    sae = build(D, topk_settings())
    mean = torch.arange(D, dtype=torch.float32)
    sae.initialise(3, mean)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(S))
    assert torch.equal(sae.b_dec, mean)
    assert not sae.b_enc.any()
    again, other = build(D, topk_settings()), build(D, topk_settings())
    again.initialise(3, mean)
    other.initialise(4, None)
    assert torch.equal(again.W_dec, sae.W_dec)
    assert not torch.equal(other.W_dec, sae.W_dec)
    assert not other.b_dec.any()


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.architecture)
def test_gradients_are_those_of_the_formula(settings: SAESettings) -> None:
    """Also of b_dec, which takes part in encoding and decoding."""
    x = rows()
    mine, plain = made(settings), made(settings)
    mine.training_pass(x, x, START, None).loss.backward()  # type: ignore[no-untyped-call]
    pre = (x - plain.b_dec) @ plain.W_enc + plain.b_enc
    if isinstance(settings, TopKSettings):
        kept = torch.zeros_like(pre).scatter(1, pre.topk(settings.k, dim=1).indices, 1.0)
        acts, penalty = pre.clamp(min=0) * kept, torch.zeros(())
    else:
        acts = pre.clamp(min=0)
        penalty = 0.7 * acts.sum() / B
    again = acts @ (plain.W_dec / plain.W_dec.norm(dim=1, keepdim=True)) + plain.b_dec
    (((x - again) ** 2).sum() / B + penalty).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(mine.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-6)


class TestStandard:
    def test_l1_undershoots_by_half_of_lambda(self) -> None:
        """Unit-norm decoder, target 2, λ = 1: the best activation is 1.5."""
        sae = build(4, standard_settings(d_sae=1, l1_coefficient=1.0))
        direction = torch.tensor([[0.5, -0.5, 0.5, 0.5]])
        x = (2.0 * direction).repeat(3, 1)
        with torch.no_grad():
            sae.W_enc.zero_()
            sae.W_dec.copy_(7 * direction)
            sae.b_enc.fill_(0.3)
        for _ in range(3):
            sae.zero_grad()
            sae.training_pass(x, x, START, None).loss.backward()  # type: ignore[no-untyped-call]
            assert sae.b_enc.grad is not None
            with torch.no_grad():
                sae.b_enc.sub_(0.5 * sae.b_enc.grad)
        assert sae.encode(x)[:, 0].tolist() == [1.5, 1.5, 1.5]
        assert number(sae.training_pass(x, x, START, None).loss) == 0.25 + 1.5

    def test_the_penalty_is_summed_over_features(self) -> None:
        sae, x = made(standard_settings()), rows()
        result = sae.training_pass(x, x, START, None)
        l1 = number(sae.encode(x).sum()) / B
        assert number(result.components["l1"]) == pytest.approx(l1)
        assert number(result.loss) == pytest.approx(number(result.components["mse"]) + 0.7 * l1)

    def test_lambda_rises_over_its_warm_up(self) -> None:
        sae, x = made(standard_settings(l1_warmup_steps=4)), rows()
        shares = []
        for step in (0, 1, 3, 4, 50):
            result = sae.training_pass(x, x, Schedule(step, 100), None)
            penalty = number(result.loss) - number(result.components["mse"])
            shares.append(penalty / (0.7 * number(result.components["l1"])))
        assert shares == pytest.approx([0.25, 0.5, 1, 1, 1])

    def test_encoding_is_relu_of_the_centred_input(self) -> None:
        sae, x = made(standard_settings()), rows()
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        torch.testing.assert_close(sae.encode(x), pre.clamp(min=0))
        assert (pre < 0).any()


class TestTopK:
    def test_exactly_the_k_largest_are_kept(self) -> None:
        sae, x = made(topk_settings()), rows()
        with torch.no_grad():
            sae.b_enc.add_(50)
        acts = sae.encode(x)
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        for i in range(B):
            kept = acts[i].nonzero()[:, 0].tolist()
            assert len(kept) == 4
            assert set(kept) == set(pre[i].argsort(descending=True)[:4].tolist())
            torch.testing.assert_close(acts[i, kept], pre[i, kept])
        assert sae.training_pass(x, x, START, None).active.sum() == 4 * B

    def test_negative_ones_are_not_kept(self) -> None:
        sae, x = made(topk_settings()), rows()
        with torch.no_grad():
            sae.b_enc.sub_(50)
        assert not sae.encode(x).any()

    def test_k_up_to_the_whole_dictionary(self) -> None:
        sae, x = made(topk_settings(k=S)), rows()
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        torch.testing.assert_close(sae.encode(x), pre.relu())

    def test_without_dead_features_there_is_no_auxiliary_loss(self) -> None:
        result = made(topk_settings()).training_pass(rows(), rows(), START, None)
        assert set(result.components) == {"mse"}
        assert number(result.loss) == number(result.components["mse"])

    def test_the_auxiliary_loss_is_the_errors_reconstruction_by_dead_features(self) -> None:
        sae, x = made(topk_settings(aux_k=3, aux_coefficient=0.5)), rows()
        dead = torch.zeros(S, dtype=torch.bool)
        dead[5:13] = True
        result = sae.training_pass(x, x, START, dead)
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        total = 0.0
        for i in range(B):
            error = x[i] - sae(x[i : i + 1])[0]
            strongest = sorted(range(5, 13), key=lambda s: -number(pre[i, s]))[:3]
            for s in strongest:
                error = error - pre[i, s].clamp(min=0) * unit(sae.W_dec)[s]
            total += number((error**2).sum())
        aux = number(result.components["aux"])
        assert aux == pytest.approx(total / B)
        assert number(result.loss) == pytest.approx(number(result.components["mse"]) + 0.5 * aux)

    @pytest.mark.parametrize("dead_ones", [[0], [5, 11], list(range(10, 20))])
    def test_the_auxiliary_gradient_reaches_dead_features_only(self, dead_ones: list[int]) -> None:
        sae, x = made(topk_settings(aux_k=4, aux_coefficient=1.0)), rows()
        dead = torch.zeros(S, dtype=torch.bool)
        dead[dead_ones] = True
        with torch.no_grad():
            sae.b_enc[dead] += 1  # dead, but some of them positive
        aux = sae.training_pass(x, x, START, dead).components["aux"]
        aux.backward()  # type: ignore[no-untyped-call]
        for parameter, features in ((sae.W_enc, 1), (sae.W_dec, 0), (sae.b_enc, 0)):
            assert parameter.grad is not None
            moved = parameter.grad.abs().movedim(features, 0).reshape(S, -1).sum(dim=1)
            assert not moved[~dead].any()
            assert moved[dead].any()

    def test_an_overflowing_auxiliary_loss_is_left_out(self) -> None:
        """Two live features cancel out; the dead one, just as strong, would reconstruct the error."""
        sae = build(2, topk_settings(d_sae=3, k=2, aux_k=1))
        dead = torch.tensor([False, False, True])
        with torch.no_grad():
            sae.W_enc.zero_()
            sae.b_enc.copy_(torch.tensor([1e20, 1e20, 0.9e20]))
            sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
        result = sae.training_pass(torch.ones(4, 2), torch.ones(4, 2), START, dead)
        result.loss.backward()  # type: ignore[no-untyped-call]
        assert number(result.loss) == number(result.components["mse"]) == 2
        for parameter in sae.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()

    def test_aux_k_defaults_to_half_of_the_width(self) -> None:
        sae, x = made(topk_settings()), rows()
        explicit = made(topk_settings(aux_k=D // 2))
        dead = torch.ones(S, dtype=torch.bool)
        mine = sae.training_pass(x, x, START, dead).components["aux"]
        assert number(mine) == number(explicit.training_pass(x, x, START, dead).components["aux"])


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.architecture)
@pytest.mark.parametrize("scale", [0.037, 1.0, 12.5])
def test_a_folded_module_takes_raw_activations(settings: SAESettings, scale: float) -> None:
    trained, folded = made(settings), made(settings)
    folded.fold_scale(scale)
    x = rows() / scale
    acts = trained.encode(x * scale)
    torch.testing.assert_close(folded.encode(x), acts)
    torch.testing.assert_close(folded.decode(acts), trained.decode(acts) / scale)
    torch.testing.assert_close(folded(x), trained(x * scale) / scale)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.full((S,), 1 / scale, dtype=torch.float64))


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.architecture)
def test_weights_survive_storing(settings: SAESettings) -> None:
    sae, x = made(settings).float(), rows().float()
    stored = safetensors.torch.load(safetensors.torch.save(dict(sae.state_dict())))
    assert set(stored) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert stored["W_enc"].shape == (D, S)
    assert stored["W_dec"].shape == (S, D)
    other = build(D, settings)
    other.load_state_dict(stored)
    assert torch.equal(other.encode(x), sae.encode(x))
    assert torch.equal(other(x), sae(x))


def test_a_kind_without_a_module_is_refused() -> None:
    class Unknown(SAESettings):
        pass

    with pytest.raises(TypeError, match="no SAE for Unknown"):
        build(D, Unknown(architecture="unknown", name="a", hook_name="h", d_sae=2))
