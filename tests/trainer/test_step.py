"""One SAE in training: schedule, scale, counters, figures, and carrying on as if nothing had happened."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.trainer.kinds import StandardSettings, TopKSettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.step import SAETraining

D, STEPS = 6, 40
CPU = torch.device("cpu")


def topk_settings(**changes: Any) -> TopKSettings:
    base = {"d_sae": 30, "k": 2, "aux_k": 3, "dead_after_rows": 120, "lr": 3e-3, "lr_warmup_steps": 5}
    return TopKSettings.model_validate(
        {"name": "a", "architecture": "topk", "hook_name": "h"} | base | changes
    )


def standard_settings(**changes: Any) -> StandardSettings:
    base = {"d_sae": 12, "l1_coefficient": 0.3, "lr": 3e-3, "lr_warmup_steps": 5}
    return StandardSettings.model_validate(
        {"name": "a", "architecture": "standard", "hook_name": "h"} | base | changes
    )


NO_ROWS = torch.zeros(0, D, dtype=torch.bfloat16)


def rows(n: int, seed: int, scale: float = 3.0, offset: float = 1.0) -> Tensor:
    """[n, D] bfloat16: sparse sums of fixed directions."""
    directions = torch.randn(2 * D, D, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    strengths = torch.rand(n, 2 * D, generator=generator) * (torch.rand(n, 2 * D, generator=generator) < 0.2)
    return (scale * strengths @ directions + offset).to(torch.bfloat16)


def train(training: SAETraining, steps: range, window_steps: int = 5) -> None:
    for step in steps:
        if step % window_steps == 0:
            training.begin_window(NO_ROWS, 0)
        training.step(rows(32, step), Schedule(step, STEPS))


def begun(settings: TopKSettings | StandardSettings) -> SAETraining:
    training = SAETraining(D, settings, CPU)
    training.initialise(rows(500, 1000))
    return training


class TestSchedule:
    def test_it_rises_stays_and_falls_to_zero(self) -> None:
        training = SAETraining(D, topk_settings(lr=0.01, lr_warmup_steps=10, lr_decay_fraction=0.25), CPU)
        rate = [training.learning_rate(Schedule(step, 100)) for step in range(100)]
        assert rate[:10] == pytest.approx([0.01 * (i + 1) / 10 for i in range(10)])
        assert rate[10:76] == pytest.approx([0.01] * 66)
        assert rate[75:] == pytest.approx([0.01 * (100 - i) / 25 for i in range(75, 100)])
        assert min(rate) > 0

    def test_no_warm_up_and_no_decay(self) -> None:
        training = SAETraining(D, topk_settings(lr=0.01, lr_warmup_steps=0, lr_decay_fraction=0.0), CPU)
        assert {training.learning_rate(Schedule(step, 50)) for step in range(50)} == {0.01}

    def test_a_run_shorter_than_its_warm_up(self) -> None:
        training = SAETraining(D, topk_settings(lr=1.0, lr_warmup_steps=10, lr_decay_fraction=1.0), CPU)
        assert [training.learning_rate(Schedule(s, 2)) for s in range(2)] == pytest.approx([0.1, 0.1])

    def test_steps_use_it(self) -> None:
        """Adam's first step moves each weight by the learning rate, whatever the gradient."""
        training = begun(standard_settings(lr=0.5, lr_warmup_steps=4, lr_decay_fraction=0.0))
        before = training.sae.b_dec.detach().clone()
        training.begin_window(NO_ROWS, 0)
        training.step(rows(64, 1), Schedule(0, STEPS))
        moved = (training.sae.b_dec.detach() - before).abs()
        torch.testing.assert_close(moved, torch.full((D,), 0.5 / 4), rtol=1e-4, atol=0)


class TestStart:
    @pytest.mark.parametrize("size", [0.001, 1.0, 800.0])
    def test_scaled_rows_have_mean_squared_norm_d_in(self, size: float) -> None:
        training = SAETraining(D, topk_settings(), CPU)
        first = rows(20_000, 4, scale=size)
        training.initialise(first)
        mean = float((first.double() * training.scale).square().sum(dim=1).mean())
        assert mean == pytest.approx(D, rel=1e-9)

    def test_the_decoder_bias_starts_at_the_scaled_mean(self) -> None:
        first = rows(20_000, 4)
        training = SAETraining(D, topk_settings(), CPU)
        training.initialise(first)
        expected = (first.double().mean(dim=0) * training.scale).float()
        torch.testing.assert_close(training.sae.b_dec.detach(), expected)

    @pytest.mark.parametrize(("kind", "moves"), [("zero", True), ("none", False)])
    def test_the_decoder_bias_starts_at_zero(self, kind: str, moves: bool) -> None:
        training = SAETraining(D, topk_settings(decoder_bias=kind), CPU)
        training.initialise(rows(500, 4))
        assert not training.sae.b_dec.any()
        train(training, range(5))
        assert bool(training.sae.b_dec.any()) is moves

    def test_rows_of_zeros_leave_the_scale_alone(self) -> None:
        training = SAETraining(D, topk_settings(), CPU)
        training.initialise(torch.zeros(10, D, dtype=torch.bfloat16))
        assert training.scale == 1.0

    def test_weights_follow_the_seed(self) -> None:
        one, same, other = (begun(topk_settings(seed=seed)) for seed in (1, 1, 2))
        assert torch.equal(one.sae.W_dec, same.sae.W_dec)
        assert not torch.equal(one.sae.W_dec, other.sae.W_dec)


class TestDeadFeatures:
    def test_rows_are_counted_since_a_feature_was_active(self) -> None:
        training = begun(topk_settings(lr=1e-9))
        since = np.zeros(30, np.int64)
        training.begin_window(NO_ROWS, 0)
        for step in range(8):
            batch = rows(10 + step, step)
            acts = training.sae.encode(batch.float() * training.scale)
            training.step(batch, Schedule(step, STEPS))
            active = (acts > 0).any(dim=0).numpy()
            since = np.where(active, 0, since + len(batch))
            assert training.rows_since_active.tolist() == since.tolist()
        assert 0 < (since == 0).sum() < 30

    def test_who_is_dead_is_decided_at_the_start_of_a_window(self) -> None:
        training = begun(topk_settings(lr=1e-9, dead_after_rows=50, aux_coefficient=1.0))
        training.begin_window(NO_ROWS, 0)
        for step in range(3):
            training.step(rows(32, 0), Schedule(step, STEPS))
            assert "component.aux" not in training._sums
        figures, _ = training.end_window()
        count = int((training.rows_since_active >= 50).sum())
        assert figures["dead_features"] == count > 0
        training.begin_window(NO_ROWS, 0)
        training.step(rows(32, 0), Schedule(3, STEPS))
        assert training.end_window()[0]["aux"] > 0

    def test_the_window_is_reached_at_exactly_its_rows(self) -> None:
        training = begun(topk_settings(dead_after_rows=64))
        with torch.no_grad():
            training.sae.b_enc.fill_(-1e6)
        training.begin_window(NO_ROWS, 0)
        training.step(rows(63, 0), Schedule(0, STEPS))
        assert training.end_window()[0]["dead_features"] == 0
        training.rows_since_active.fill_(63)
        training.begin_window(NO_ROWS, 0)
        training.step(rows(1, 0), Schedule(0, STEPS))
        assert training.end_window()[0]["dead_features"] == 30


class TestFigures:
    @pytest.mark.parametrize("offset", [0.0, 10.0])
    def test_they_are_means_over_the_windows_rows(self, offset: float) -> None:
        training = begun(standard_settings(lr=1e-12, l1_warmup_steps=0))
        batches = [rows(n, n, offset=offset) for n in (5, 64, 130)]
        training.begin_window(NO_ROWS, 0)
        for step, batch in enumerate(batches):
            training.step(batch, Schedule(step, STEPS))
        figures, bad = training.end_window()
        x = torch.cat(batches).double().numpy() * training.scale
        sae = training.sae.double()
        acts = sae.encode(torch.from_numpy(x)).detach().numpy()
        again = sae(torch.from_numpy(x)).detach().numpy()
        residual = float(((x - again) ** 2).sum())
        assert bad is None
        assert figures["mse"] == pytest.approx(residual / len(x), rel=1e-4)
        assert figures["l1"] == pytest.approx(acts.sum() / len(x), rel=1e-4)
        assert figures["loss"] == pytest.approx(figures["mse"] + 0.3 * figures["l1"], rel=1e-5)
        assert figures["l0"] == pytest.approx((acts > 0).sum() / len(x), abs=0.02)
        total = float(((x - x.mean(axis=0)) ** 2).sum())
        assert figures["explained_variance"] == pytest.approx(1 - residual / total, abs=2e-3)

    def test_each_window_begins_anew(self) -> None:
        training = begun(standard_settings(lr=1e-12))
        seen = []
        for _ in range(2):
            training.begin_window(NO_ROWS, 0)
            training.step(rows(50, 1), Schedule(30, STEPS))
            seen.append(training.end_window()[0])
        assert seen[0] == pytest.approx(seen[1], rel=1e-6)
        assert math.isfinite(seen[0]["loss"])


class TestDivergence:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_the_first_step_with_a_loss_that_is_not_finite_is_named(self, value: float) -> None:
        training = begun(topk_settings())
        training.begin_window(NO_ROWS, 0)
        for step in range(20, 28):
            batch = rows(16, step)
            if step == 23:
                batch[3, 2] = value
            training.step(batch, Schedule(step, STEPS))
        assert training.end_window()[1] == 23

    def test_a_finite_window_names_none(self) -> None:
        training = begun(topk_settings())
        train(training, range(5))
        assert training.end_window()[1] is None


class TestCarryingOn:
    @pytest.mark.parametrize("settings", [topk_settings(), standard_settings()], ids=["topk", "standard"])
    def test_a_restored_training_is_bit_identical(self, settings: TopKSettings | StandardSettings) -> None:
        whole = begun(settings)
        train(whole, range(STEPS))
        first = begun(settings)
        train(first, range(20))
        second = SAETraining(D, settings, CPU)
        second.restore(first.weights(), first.optimizer_state())
        train(second, range(20, STEPS))
        assert_equal_states(second, whole)

    @pytest.mark.parametrize("lost", ["step", "exp_avg", "exp_avg_sq", "rows_since_active", "scale"])
    def test_nothing_of_a_checkpoint_can_be_left_out(self, lost: str) -> None:
        settings = topk_settings(dead_after_rows=30)
        whole = begun(settings)
        train(whole, range(STEPS))
        first = begun(settings)
        train(first, range(20))
        assert first.rows_since_active.max() >= 30, "no feature is dead: the test is void"
        weights, optimizer = first.weights(), first.optimizer_state()
        fresh = {"scale": 1.0}.get(lost, 0.0)
        touched = 0
        for state in (weights, optimizer):
            for name in state:
                if name.split("/")[0] == lost:
                    state[name] = torch.full_like(state[name], fresh)
                    touched += 1
        assert touched
        second = SAETraining(D, settings, CPU)
        second.restore(weights, optimizer)
        train(second, range(20, STEPS))
        assert not torch.equal(second.sae.W_dec, whole.sae.W_dec)

    def test_a_checkpoint_does_not_change_with_further_training(self) -> None:
        training = begun(topk_settings())
        train(training, range(10))
        weights, optimizer = training.weights(), training.optimizer_state()
        before = {k: v.clone() for k, v in (weights | optimizer).items()}
        other = SAETraining(D, topk_settings(), CPU)
        other.restore(weights, optimizer)
        train(other, range(10, 15))
        for name, value in before.items():
            assert torch.equal((weights | optimizer)[name], value), name


def assert_equal_states(one: SAETraining, other: SAETraining) -> None:
    mine, theirs = one.weights() | one.optimizer_state(), other.weights() | other.optimizer_state()
    assert set(mine) == set(theirs)
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
