"""What every kind must hold on its way: directions of unit norm, its L0, and carrying on to the same bits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.trainer.kinds import SAESettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.sae import build
from penstock.trainer.step import SAETraining
from services.dictionaries import KINDS, settings_of

CPU = torch.device("cpu")
D, FEATURES, ACTIVE = 24, 48, 4
BATCH, WINDOW_STEPS, WINDOWS = 128, 5, 12
STEPS = WINDOW_STEPS * WINDOWS
DEAD = 7
"""Features that cannot become active, where dead ones are resampled."""

KEEP_A_NUMBER = ("topk", "batchtopk", "matryoshka", "switch", "transcoder")

WARMED_UP: dict[str, Any] = {"k_warmup_steps": 50}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in KINDS},
    "standard, resampled": ("standard", {"resample_every_rows": 1500}),
    "standard, tied, resampled": ("standard", {"tied": True, "resample_every_rows": 1500}),
    "standard, noise": ("standard", {"noise": 0.3}),
    "standard, free": ("standard", {"decoder_norm": "free", "penalty_power": 0.5}),
    "batchtopk, resampled": ("batchtopk", {"resample_every_rows": 1500}),
    "gated, resampled": ("gated", {"resample_every_rows": 1500}),
    "jumprelu, resampled": ("jumprelu", {"resample_every_rows": 1500}),
    "jumprelu, no target": ("jumprelu", {"l0_target": None, "l0_coefficient": 1.0}),
    **{f"{kind}, k warmed up": (kind, WARMED_UP) for kind in KEEP_A_NUMBER},
    "transcoder, k warmed up": ("transcoder", WARMED_UP | {"k": 4, "l1_coefficient": None}),
}


def rows(n: int, seed: int) -> Tensor:
    """[n, D] bfloat16: sums of about `ACTIVE` of `FEATURES` directions."""
    features = torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(99))
    features /= features.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, FEATURES, generator=generator) < ACTIVE / FEATURES
    return (torch.rand(n, FEATURES, generator=generator) * active @ features).to(torch.bfloat16)


def training_of(name: str) -> SAETraining:
    kind, changes = VARIANTS[name]
    common = {
        "d_sae": 64,
        "lr": 5e-3,
        "lr_warmup_steps": 5,
        "dead_after_rows": 300,
        "l1_warmup_steps": 20,
        "l0_warmup_steps": 20,
    }
    settings = settings_of(kind)
    own = {key: value for key, value in (common | changes).items() if key in type(settings).model_fields}
    return SAETraining(D, settings_of(kind, **own), CPU)


def begun(name: str) -> SAETraining:
    training = training_of(name)
    training.initialise(window_rows(0))
    if "resampled" in name:
        with torch.no_grad():
            for vector in set(training.sae.encoder_vectors) - {"r_mag"}:
                training.sae.get_parameter(vector)[:DEAD] = -100.0
    return training


def window_rows(window: int) -> Tensor:
    return torch.cat([rows(BATCH, window * WINDOW_STEPS + i) for i in range(WINDOW_STEPS)])


def train(training: SAETraining, windows: range) -> None:
    for window in windows:
        all_rows = window_rows(window)
        training.begin_window(all_rows, window * WINDOW_STEPS * BATCH)
        for i, batch in enumerate(torch.split(all_rows, BATCH)):
            training.step(batch, Schedule(window * WINDOW_STEPS + i, STEPS))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_restored_training_is_bit_identical(name: str) -> None:
    whole = begun(name)
    train(whole, range(WINDOWS))
    stop = int(torch.randint(1, WINDOWS, (1,), generator=torch.Generator().manual_seed(len(name))))
    first = begun(name)
    train(first, range(stop))
    second = training_of(name)
    second.restore(first.weights(), first.optimizer_state())
    train(second, range(stop, WINDOWS))
    mine, theirs = second.weights() | second.optimizer_state(), whole.weights() | whole.optimizer_state()
    assert set(mine) == set(theirs)
    for key in mine:
        assert torch.equal(mine[key], theirs[key]), key


@pytest.mark.parametrize("kind", KEEP_A_NUMBER)
def test_the_features_kept_fall_to_k(kind: str) -> None:
    """From as many as the input has dimensions, or the expert features, linearly."""
    training = begun(f"{kind}, k warmed up")
    settings = training.settings.model_dump()
    k, most = settings["k"], min(D, 64 // settings.get("experts", 1))
    x = torch.rand(BATCH, D)
    with torch.no_grad():
        # all pre-activations are positive, so that what is active is what was kept
        training.sae.W_enc.abs_()
        training.sae.b_enc.fill_(100.0)
    for step, wanted in ((0, most), (25, most + round((k - most) / 2)), (50, k), (59, k)):
        result = training.sae.training_pass(x, x, Schedule(step, STEPS), None)
        assert int(result.active.sum()) == BATCH * wanted, step


def test_without_a_k_there_is_nothing_to_warm_up() -> None:
    with pytest.raises(ValueError, match="k_warmup_steps: there is no k"):
        settings_of("transcoder", k=None, l1_coefficient=1.0, k_warmup_steps=5)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "resampled" in name])
def test_resampling_takes_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without which the test above says nothing of it."""
    training = begun(name)
    reset: list[int] = []
    whole = training.sae.reset_features

    def spying(features: Tensor, *rest: Tensor) -> None:
        reset.append(len(features))
        whole(features, *rest)

    monkeypatch.setattr(training.sae, "reset_features", spying)
    train(training, range(6))
    assert sum(reset) >= DEAD


@pytest.mark.parametrize("name", [name for name in VARIANTS if "resampled" in name])
def test_resampled_features_start_anew(name: str) -> None:
    """Biases and moments, too, and of them only."""
    training = begun(name)
    train(training, range(1))
    reset = torch.zeros(64, dtype=torch.bool)
    reset[[3, 60]] = True
    training.rows_since_active.copy_(reset * 1000)
    for state in training.optimizer.state.values():
        state["exp_avg"].fill_(1.0)
        state["exp_avg_sq"].fill_(1.0)
    with torch.no_grad():
        for vector in training.sae.encoder_vectors:
            training.sae.get_parameter(vector).fill_(-3.0)
    training.begin_window(window_rows(1), 2000)
    for vector in training.sae.encoder_vectors:
        assert torch.equal(training.sae.get_parameter(vector) == 0, reset)
    seen = set()
    for key, value in training.optimizer_state().items():
        kind, _, parameter = key.partition("/")
        if kind not in ("exp_avg", "exp_avg_sq"):
            continue
        axis = training.sae.feature_axes.get(parameter)
        if axis is None:
            assert (value == 1).all(), key
            continue
        seen.add(parameter)
        others = value.movedim(axis, 0).reshape(64, -1)
        assert torch.equal((others == 0).all(dim=1), reset), key
        assert (others[~reset] == 1).all(), key
    assert seen == set(training.sae.state_dict()) - {"b_dec"} - set(dict(training.sae.named_buffers()))


@pytest.mark.parametrize("name", [name for name in VARIANTS if "free" not in name])
def test_directions_have_unit_norm_after_every_step_and_after_loading(name: str) -> None:
    training = begun(name)
    ones = torch.ones(64)

    def check(directions: Tensor) -> None:
        torch.testing.assert_close(directions.detach().norm(dim=1), ones, rtol=0, atol=1e-6)

    for window in range(4):
        all_rows = window_rows(window)
        training.begin_window(all_rows, window * WINDOW_STEPS * BATCH)
        for i, batch in enumerate(torch.split(all_rows, BATCH)):
            training.step(batch, Schedule(window * WINDOW_STEPS + i, STEPS))
            check(training.sae.W_dec)
            check(training.sae.directions())
    again = training_of(name)
    again.restore(training.weights(), training.optimizer_state())
    check(again.sae.directions())
    loaded = build(D, training.settings)
    weights = training.weights()
    scale = float(weights.pop("scale"))
    weights.pop("scale_out", None)
    loaded.load_state_dict(weights)
    loaded.fold_scale(scale)
    check(loaded.directions() * scale)


@pytest.mark.parametrize("l0", [2, 4, 7])
@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "matryoshka"])
def test_l0_is_held_at_the_end_of_training(kind: str, l0: int) -> None:
    """On rows that were not trained on, by `encode`."""
    own: dict[str, Any] = {"l0_target": l0} if kind == "jumprelu" else {"k": l0}
    settings: SAESettings = settings_of(kind, d_sae=64, lr=5e-3, lr_warmup_steps=20, **own)
    training = SAETraining(D, settings, CPU)
    training.initialise(rows(2000, 10_000))
    training.begin_window(torch.zeros(0, D), 0)
    steps = 400
    for step in range(steps):
        training.step(rows(BATCH, step), Schedule(step, steps))
    figures, _ = training.end_window()
    x = rows(5000, 20_000).float() * training.scale
    with torch.no_grad():
        found = float((training.sae.encode(x) > 0).sum()) / len(x)
    assert figures["explained_variance"] > 0.3, "it has learned nothing"
    assert abs(found - l0) <= 0.1 * l0
