"""The modules: what they compute, what their losses pull on, and that nothing is lost in storing them."""

import math
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from penstock.trainer.kinds import AnySettings, SAESettings, StandardSettings, TopKSettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.sae import SAE, build

START = Schedule(0, 100)
D, S, B = 6, 20, 9


def standard_settings(**changes: Any) -> StandardSettings:
    base = {"d_sae": S, "l1_coefficient": 0.7, "l1_warmup_steps": 0}
    return StandardSettings.model_validate(
        {"name": "a", "architecture": "standard", "hook_name": "h"} | base | changes
    )


def topk_settings(**changes: float) -> TopKSettings:
    base = {"d_sae": S, "k": 4}
    return TopKSettings.model_validate(
        {"name": "a", "architecture": "topk", "hook_name": "h"} | base | changes
    )


def settings_of(architecture: str, **changes: Any) -> SAESettings:
    settings = {"name": "a", "architecture": architecture, "hook_name": "h", "d_sae": S} | changes
    adapter: TypeAdapter[SAESettings] = TypeAdapter(AnySettings)
    return adapter.validate_python(settings)


KINDS = [
    standard_settings(),
    topk_settings(),
    settings_of("batchtopk", k=4),
    settings_of("gated", l1_coefficient=0.7, l1_warmup_steps=0),
    settings_of("jumprelu", l0_coefficient=0.7, l0_warmup_steps=0),
]


def made(settings: SAESettings, seed: int = 1) -> SAE:
    """An SAE in float64 with every parameter away from its start, decoder rows of all lengths."""
    sae = build(D, settings)
    sae.initialise(seed, torch.linspace(-1, 1, D))
    sae.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.1, 5, settings.d_sae, dtype=torch.float64)[:, None])
        sae.W_enc.add_(0.3 * torch.randn(sae.W_enc.shape, generator=generator, dtype=torch.float64))
        for name in sae.encoder_vectors:
            vector = sae.get_parameter(name)
            vector.add_(0.3 * torch.randn(vector.shape, generator=generator, dtype=torch.float64))
        if "threshold" in sae.state_dict():
            sae.state_dict()["threshold"].fill_(0.3)
    return sae


def in_training(sae: SAE, x: Tensor) -> Tensor:
    """Feature activations that training works with."""
    if sae.architecture != "batchtopk":
        return sae.encode(x)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    smallest = pre.flatten().sort(descending=True).values[4 * B - 1]
    return pre.relu() * (pre >= smallest)


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
    found = sae.training_pass(x, x, START, None).reconstruction
    torch.testing.assert_close(found, sae.decode(in_training(sae, x)))


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.architecture)
def test_losses_are_summed_over_dims_and_averaged_over_rows(settings: SAESettings) -> None:
    sae, x = made(settings), rows()
    acts = in_training(sae, x)
    again = sae.decode(acts)
    result = sae.training_pass(x, x, START, None)
    errors = [number(((x[i] - again[i]) ** 2).sum()) for i in range(B)]
    assert number(result.components["mse"]) == pytest.approx(sum(errors) / B)
    assert result.active.tolist() == [int((acts[:, s] > 0).sum()) for s in range(S)]


def test_the_initial_encoder_is_the_decoders_transpose_made_shorter() -> None:
    sae = build(D, topk_settings())
    mean = torch.arange(D, dtype=torch.float32)
    sae.initialise(3, mean)
    assert torch.equal(sae.W_enc, 0.25 * sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(S))
    assert torch.equal(sae.b_dec, mean)
    assert not sae.b_enc.any()
    again, other = build(D, topk_settings()), build(D, topk_settings())
    again.initialise(3, mean)
    other.initialise(4, None)
    assert torch.equal(again.W_dec, sae.W_dec)
    assert not torch.equal(other.W_dec, sae.W_dec)
    assert not other.b_dec.any()


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

    def test_the_reports_loss_has_the_same_gradient_up_to_one_factor(self) -> None:
        """The report: mean over rows and dims of the squared error, and α · mean over rows of Σ|f| / S."""
        alpha, x = 0.3, rows()
        mine, report = made(standard_settings(l1_coefficient=alpha * D / S)), made(standard_settings())
        mine.training_pass(x, x, START, None).loss.backward()  # type: ignore[no-untyped-call]
        acts = report.encode(x)
        loss = ((x - report.decode(acts)) ** 2).mean() + alpha * acts.abs().sum(dim=1).mean() / S
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in report.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(mine.get_parameter(name).grad, D * parameter.grad)

    @pytest.mark.parametrize("power", [0.1, 0.5, 0.9])
    def test_the_lp_penalty_is_finite_where_nothing_is_active(self, power: float) -> None:
        sae = build(D, standard_settings(penalty_power=power, penalty_epsilon=1e-3, l1_coefficient=1.0))
        sae.initialise(0, None)
        x = torch.zeros(4, D)
        result = sae.training_pass(x, x, START, None)
        assert number(result.components["penalty"]) == pytest.approx(S * 1e-3**power, rel=1e-5)
        for tiny in (0.0, 1e-30):
            sae.zero_grad()
            with torch.no_grad():
                sae.b_enc.fill_(tiny)
            sae.training_pass(x, x, START, None).loss.backward()  # type: ignore[no-untyped-call]
            for parameter in sae.parameters():
                assert parameter.grad is not None
                assert parameter.grad.isfinite().all()
        assert sae.b_enc.grad is not None
        torch.testing.assert_close(sae.b_enc.grad, torch.full((S,), power * 1e-3 ** (power - 1)))

    def test_the_lp_penalty_prefers_one_feature_to_two(self) -> None:
        penalties = {}
        for power in (1.0, 0.5):
            sae = build(1, standard_settings(d_sae=2, penalty_power=power, l1_coefficient=1.0))
            for split in ([2.0, 0.0], [1.0, 1.0]):
                with torch.no_grad():
                    sae.W_enc.copy_(torch.tensor([split]))
                    sae.W_dec.fill_(1.0)
                result = sae.training_pass(torch.ones(1, 1), torch.ones(1, 1), START, None)
                penalties[power, split[1]] = number(result.loss) - number(result.components["mse"])
        assert penalties[1.0, 0.0] == penalties[1.0, 1.0] == 2
        assert penalties[0.5, 0.0] < 0.75 * penalties[0.5, 1.0]

    def test_free_decoder_rows_weight_the_penalty_by_their_norms(self) -> None:
        sae, x = made(standard_settings(decoder_norm="free")), rows()
        result = sae.training_pass(x, x, START, None)
        acts = sae.encode(x)
        torch.testing.assert_close(result.reconstruction, acts @ sae.W_dec + sae.b_dec)
        l1 = number((acts * sae.W_dec.norm(dim=1)).sum()) / B
        assert number(result.components["l1"]) == pytest.approx(l1)
        assert number(result.loss) == pytest.approx(number(result.components["mse"]) + 0.7 * l1)

    def test_with_free_decoder_rows_the_loss_does_not_depend_on_where_norms_are(self) -> None:
        """Norms moved into the encoder are the same function, and the same loss: that of unit norm."""
        free, unit_norm, x = made(standard_settings(decoder_norm="free")), made(standard_settings()), rows()
        with torch.no_grad():
            norms = free.W_dec.norm(dim=1)
            unit_norm.W_enc.mul_(norms)
            unit_norm.b_enc.mul_(norms)
        one, other = (sae.training_pass(x, x, START, None) for sae in (free, unit_norm))
        assert number(one.loss) == pytest.approx(number(other.loss))

    def test_only_the_encoder_sees_noise(self) -> None:
        sae, x = made(standard_settings(noise=0.5)), rows()
        result = sae.training_pass(x, x, START, None)
        seen = x + 0.5 * sae.noise(x, START)
        again = sae(seen)
        torch.testing.assert_close(result.reconstruction, again)
        assert number(result.components["mse"]) == pytest.approx(number(((x - again) ** 2).sum()) / B)
        other = sae.training_pass(x, x, Schedule(1, 100), None)
        assert number(other.loss) != number(result.loss)
        assert number(sae.training_pass(x, x, START, None).loss) == number(result.loss)
        torch.testing.assert_close(sae.encode(x), made(standard_settings()).encode(x))

    @pytest.mark.parametrize("decoder_norm", ["unit", "free"])
    def test_a_tied_encoder_is_the_decoders_transpose(self, decoder_norm: str) -> None:
        sae = build(D, standard_settings(tied=True, decoder_norm=decoder_norm)).double()
        sae.initialise(1, None)
        assert set(sae.state_dict()) == {"b_enc", "W_dec", "b_dec"}
        with torch.no_grad():
            sae.W_dec.mul_(torch.linspace(0.5, 2, S)[:, None])
            sae.b_dec.fill_(0.1)
        x = rows()
        expected = ((x - sae.b_dec) @ sae.directions().T).relu()
        torch.testing.assert_close(sae.encode(x), expected)
        whole = sae(x)
        sae.fold_scale(0.4)
        torch.testing.assert_close(sae.encode(x / 0.4), expected)
        torch.testing.assert_close(sae(x / 0.4), whole / 0.4)
        told = sae.to_saelens().tensors
        torch.testing.assert_close(told["W_enc"], (sae.W_dec.T * 0.4**2).float())

    def test_new_directions_of_tied_features(self) -> None:
        sae = build(D, standard_settings(tied=True))
        sae.initialise(1, None)
        x = rows()[:2].float()
        sae.reset_features(torch.tensor([3, 5]), x, x)
        torch.testing.assert_close(sae.encode(x)[[0, 1], [3, 5]], x.norm(dim=1))


class TestNewDirections:
    def test_features_of_rows_that_are_alike_add_up_to_one_feature(self) -> None:
        x, together = rows()[:1], {}
        for features in ([3], [3, 4, 6]):
            sae = made(standard_settings())
            with torch.no_grad():
                sae.W_enc.fill_(1.0)  # a new feature's length is measured by the others'
            sae.reset_features(torch.tensor(features), x.repeat(len(features), 1), x.repeat(len(features), 1))
            together[len(features)] = ((x - sae.b_dec) @ sae.W_enc[:, features]).sum().item()
        assert together[1] > 0
        assert together[3] == pytest.approx(together[1], rel=1e-5)

    def test_features_of_rows_at_right_angles_are_not_shortened(self) -> None:
        sae = made(standard_settings())
        with torch.no_grad():
            sae.b_dec.zero_()
            sae.W_enc.fill_(1.0)
        x = torch.eye(D, dtype=torch.float64)[:2]
        sae.reset_features(torch.tensor([3, 5]), x, x)
        torch.testing.assert_close(
            sae.W_enc[:, [3, 5]].norm(dim=0), torch.full((2,), 0.2 * math.sqrt(D), dtype=torch.float64)
        )


class TestGated:
    def test_the_gate_decides_and_the_magnitude_says_how_much(self) -> None:
        sae, x = made(settings_of("gated", l1_coefficient=0.7)), rows()
        product = (x - sae.b_dec) @ sae.W_enc
        is_open = product + sae.get_parameter("b_gate") > 0
        magnitude = product * sae.get_parameter("r_mag").exp() + sae.get_parameter("b_mag")
        torch.testing.assert_close(sae.encode(x), torch.where(is_open, magnitude.relu(), 0.0))
        assert (is_open & (magnitude < 0)).any()
        assert (~is_open & (magnitude > 0)).any()

    def test_the_penalty_does_not_shrink_magnitudes(self) -> None:
        """A gate learns 2 − λ/2 of a target of 2, but the magnitude 2."""
        sae = build(2, settings_of("gated", d_sae=1, l1_coefficient=1.0, l1_warmup_steps=0))
        x = torch.tensor([[2.0, 0.0]]).repeat(3, 1)
        with torch.no_grad():
            sae.W_enc.zero_()
            sae.W_dec.copy_(torch.tensor([[3.0, 0.0]]))
            sae.get_parameter("b_gate").fill_(0.3)
            sae.get_parameter("b_mag").fill_(0.3)
        for _ in range(60):
            sae.zero_grad()
            sae.training_pass(x, x, START, None).loss.backward()  # type: ignore[no-untyped-call]
            for name in ("b_gate", "b_mag"):
                vector = sae.get_parameter(name)
                assert vector.grad is not None
                with torch.no_grad():
                    vector.sub_(0.25 * vector.grad)
        assert number(sae.get_parameter("b_gate")) == pytest.approx(1.5)
        assert sae.encode(x)[:, 0].tolist() == pytest.approx([2.0] * 3)


class TestJumpReLU:
    def test_what_is_above_the_threshold_stays_as_it_is(self) -> None:
        sae, x = made(settings_of("jumprelu", l0_coefficient=0.7)), rows()
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        with torch.no_grad():
            sae.get_parameter("threshold")[3] = pre[0, 3].abs()
            sae.b_enc[3] += pre[0, 3].abs() - pre[0, 3]
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        threshold = sae.get_parameter("threshold")
        torch.testing.assert_close(sae.encode(x), torch.where(pre > threshold, pre, 0.0))
        assert ((pre > 0) & (pre < threshold)).any()

    def test_the_penalty_is_the_number_of_active_features(self) -> None:
        sae, x = made(settings_of("jumprelu", l0_coefficient=0.7, l0_warmup_steps=4)), rows()
        l0 = number((sae.encode(x) > 0).sum()) / B
        for step, share in ((1, 0.5), (3, 1.0), (50, 1.0)):
            result = sae.training_pass(x, x, Schedule(step, 100), None)
            assert number(result.components["penalty"]) == pytest.approx(l0)
            price = number(result.loss) - number(result.components["mse"])
            assert price == pytest.approx(share * 0.7 * l0)

    @pytest.mark.parametrize(("coefficient", "weight"), [(3.0, 3.0), (None, 10.0 * D)])
    def test_a_target_prices_the_distance_from_it(self, coefficient: float | None, weight: float) -> None:
        settings = settings_of("jumprelu", l0_target=5, l0_coefficient=coefficient, l0_warmup_steps=0)
        sae, x = made(settings), rows()
        l0 = number((sae.encode(x) > 0).sum()) / B
        result = sae.training_pass(x, x, Schedule(1, 100), None)
        price = number(result.loss) - number(result.components["mse"])
        assert price == pytest.approx(weight * (l0 / 5 - 1) ** 2)

    def test_the_first_batch_meets_the_target(self) -> None:
        sae, x = made(settings_of("jumprelu", l0_target=3)), rows()
        sae.training_pass(x, x, START, None)
        assert (sae.encode(x) > 0).sum() == 3 * B - 1
        chosen = made(settings_of("jumprelu", l0_target=3, initial_threshold=0.2))
        with torch.no_grad():
            chosen.get_parameter("threshold").fill_(0.2)
        chosen.training_pass(x, x, START, None)
        assert (chosen.get_parameter("threshold") == 0.2).all()

    def test_an_imported_threshold_is_not_moved_to_the_target(self) -> None:
        sae, x = made(settings_of("jumprelu", l0_target=3, init_from="somewhere")), rows()
        sae.training_pass(x, x, START, None)
        assert (sae.get_parameter("threshold") == 0.3).all()

    def test_new_directions_get_the_others_threshold(self) -> None:
        x = rows()[:2]
        for own, expected in (({"l0_target": 3}, 0.3), ({"l0_target": 3, "initial_threshold": 0.2}, 0.2)):
            sae = made(settings_of("jumprelu", **own))
            with torch.no_grad():
                sae.get_parameter("threshold")[[4, 9]] = 7.0
            sae.reset_features(torch.tensor([4, 9]), x, x)
            assert sae.get_parameter("threshold").tolist() == pytest.approx(
                [expected if s in (4, 9) else 0.3 for s in range(S)]
            )

    def test_thresholds_below_zero_count_as_zero(self) -> None:
        sae, x = made(settings_of("jumprelu", l0_coefficient=0.7)), rows()
        with torch.no_grad():
            sae.get_parameter("threshold").fill_(-0.5)
        before = sae.encode(x)
        assert (before >= 0).all()
        result = sae.training_pass(x, x, Schedule(1, 100), None)
        assert (sae.get_parameter("threshold") == 0).all()
        torch.testing.assert_close(sae.encode(x), before)
        torch.testing.assert_close(result.reconstruction, sae.decode(before))

    @pytest.mark.parametrize("changes", [{}, {"l0_target": S + 1}], ids=["nothing", "too much"])
    def test_settings_without_a_penalty_are_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match="l0_target"):
            settings_of("jumprelu", **changes)


class TestBatchTopK:
    def test_a_batch_keeps_its_largest(self) -> None:
        sae, x = made(settings_of("batchtopk", k=4)), rows()
        result = sae.training_pass(x, x, START, None)
        pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
        assert int(result.active.sum()) == 4 * B
        kept = pre >= pre.flatten().sort(descending=True).values[4 * B - 1]
        assert result.active.tolist() == kept.sum(dim=0).tolist()
        assert len(set(kept.sum(dim=1).tolist())) > 1

    def test_negative_ones_are_not_kept(self) -> None:
        sae, x = made(settings_of("batchtopk", k=4)), rows()
        with torch.no_grad():
            sae.b_enc.sub_(50)
        assert not sae.training_pass(x, x, START, None).active.any()
        assert number(sae.get_buffer("threshold")) == 0.3, "nothing kept must leave the threshold alone"

    def test_the_threshold_follows_the_smallest_kept(self) -> None:
        sae = made(settings_of("batchtopk", k=4, threshold_decay=0.9))
        sae.get_buffer("threshold").zero_()
        expected = 0.0
        for seed in range(5):
            x = rows(seed)
            pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            smallest = number(pre.flatten().sort(descending=True).values[4 * B - 1])
            expected = smallest if seed == 0 else 0.9 * expected + 0.1 * smallest
            sae.training_pass(x, x, START, None)
            assert number(sae.get_buffer("threshold")) == pytest.approx(expected)
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        torch.testing.assert_close(sae.encode(x), torch.where(pre > expected, pre, 0.0))

    def test_rows_of_many_norms_cannot_be_normalised(self) -> None:
        sae = made(settings_of("batchtopk", k=4))
        sae.fold_scale(0.5)
        x = rows()
        before = sae.encode(x)
        sae.normalise_decoder()
        torch.testing.assert_close(sae.encode(x), 2 * before)
        with torch.no_grad():
            sae.W_dec[0] *= 2
        with pytest.raises(ValueError, match="norms of"):
            sae.normalise_decoder()


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
    own = {"gated": {"b_gate", "b_mag", "r_mag"}}.get(settings.architecture, {"b_enc"})
    own = own | ({"threshold"} if settings.architecture in ("batchtopk", "jumprelu") else set())
    assert set(stored) == {"W_enc", "W_dec", "b_dec"} | own
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
