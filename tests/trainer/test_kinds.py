"""What must hold of every kind of dictionary in the registry, a new one included.

A kind is tested here as soon as it has a line in the registry; the settings that it needs are a line in
`services/dictionaries.py`.
"""

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.store.dataset import Dataset
from penstock.store.objects import open_store
from penstock.trainer import kinds
from penstock.trainer.kinds import SAESettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.load import load_sae
from penstock.trainer.sae import SAE, build
from penstock.trainer.step import SAETraining
from services.dictionaries import SETTINGS, settings_of
from services.runs import Bench, digests
from services.synthetic import MLP, RESID
from services.training import Killed, interrupted

D, D_OUT, S, B, STEPS = 8, 6, 24, 32, 30
CPU = torch.device("cpu")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in sorted(kinds.KINDS)),
    ("matryoshka", {"prefixes": [5, 11.0, 20]}),
    ("switch", {"experts": 4, "always_on_k": 2}),
    ("transcoder", {"k": 4, "l1_coefficient": None}),
    ("transcoder", {"k": 4, "l1_coefficient": None, "skip": True}),
]
"""Every kind, and settings with which it has other parameters or computes otherwise."""
FOREIGN_GRADIENTS = {"gated", "jumprelu"}
"""Kinds whose gradients are not those of their loss, by design: test_gradients.py says what they are."""
BY_BATCH = {"batchtopk", "matryoshka"}
"""Kinds that keep other features in training than afterwards."""


def over(variants: list[tuple[str, dict[str, Any]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("kind", "changes"), variants, ids=lambda value: value if isinstance(value, str) else ""
    )


each = over(VARIANTS)
others = over([variant for variant in VARIANTS if variant[1] or variant[0] == "transcoder"])
"""What test_kinds_training.py does not train, which has one hook point and every kind's own defaults."""


def small(kind: str, changes: dict[str, Any], **more: Any) -> SAESettings:
    quick = {"d_sae": S, "dead_after_rows": 200, "lr": 3e-3, "lr_warmup_steps": 5}
    return settings_of(kind, **(quick | changes | more))


def width_out(settings: SAESettings) -> int | None:
    return D_OUT if len(settings.hooks) > 1 else None


def sparse_rows(n: int, seed: int) -> Tensor:
    """[n, D] sums of a few of 16 fixed directions, not centred."""
    directions = torch.randn(16, D, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    strengths = torch.rand(n, 16, generator=generator) * (torch.rand(n, 16, generator=generator) < 0.2)
    return (3 * strengths @ directions + 1).bfloat16()


def targets_of(settings: SAESettings, rows: Tensor) -> Tensor | None:
    """What a transcoder computes from rows: something that a dictionary can learn."""
    if len(settings.hooks) == 1:
        return None
    mixing = torch.randn(D, D_OUT, generator=torch.Generator().manual_seed(98))
    return (rows.float() @ mixing).relu().bfloat16()


def moved(settings: SAESettings) -> SAE:
    """In float64, every parameter away from its start, decoder rows of many lengths."""
    sae = build(D, settings, width_out(settings))
    sae.initialise(1, torch.linspace(-1, 1, sae.d_out))
    sae.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.W_dec.mul_(torch.linspace(0.2, 4, settings.d_sae, dtype=torch.float64)[:, None])
        for buffer in sae.buffers():
            buffer.fill_(0.2)
    return sae


def given(settings: SAESettings) -> tuple[Tensor, Tensor]:
    """Rows and targets in float64."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64)
    other = torch.randn(B, D_OUT, generator=generator, dtype=torch.float64)
    return x, other if len(settings.hooks) > 1 else x


def train(training: SAETraining, steps: range) -> None:
    for step in steps:
        rows = sparse_rows(64, step)
        if step % 5 == 0:
            training.begin_window(rows, 64 * step, targets_of(training.settings, rows))
        training.step(rows, Schedule(step, STEPS), targets_of(training.settings, rows))


def begun(settings: SAESettings) -> SAETraining:
    training = SAETraining(D, settings, CPU, width_out(settings))
    first = sparse_rows(400, 1000)
    training.initialise(first, targets=targets_of(settings, first))
    return training


def test_every_kind_has_settings_to_be_tested_with() -> None:
    assert SETTINGS.keys() == kinds.KINDS.keys(), "add the kind to tests/services/dictionaries.py"


@over([variant for variant in VARIANTS if variant[0] not in FOREIGN_GRADIENTS])
@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead"])
def test_gradients_are_finite_differences_of_the_loss(kind: str, changes: dict[str, Any], dead: bool) -> None:
    # the auxiliary loss takes the error as given, so with it the gradient would not be the loss's
    settings = small(kind, changes, **({"aux_coefficient": 0.0} if dead and "aux_k" in dir_of(kind) else {}))
    sae = moved(settings)
    x, target = given(settings)
    mask = torch.arange(S) % 3 == 0 if dead else None

    def loss() -> Tensor:
        return sae.training_pass(x, target, Schedule(500, 1000), mask).loss

    loss().backward()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        along = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        expected = float((parameter.grad * along).sum())
        step = 1e-6
        with torch.no_grad():
            parameter.add_(along, alpha=step)
            above = float(loss())
            parameter.add_(along, alpha=-2 * step)
            below = float(loss())
            parameter.add_(along, alpha=step)
        assert (above - below) / (2 * step) == pytest.approx(expected, rel=1e-5, abs=1e-6), name


def dir_of(kind: str) -> set[str]:
    """Names of a kind's settings."""
    return set(kinds.KINDS[kind].Settings.model_fields)


@over([variant for variant in VARIANTS if variant[0] not in BY_BATCH])
def test_the_reconstruction_in_training_is_that_of_the_module(kind: str, changes: dict[str, Any]) -> None:
    settings = small(kind, changes)
    sae = moved(settings)
    x, target = given(settings)
    result = sae.training_pass(x, target, Schedule(500, 1000), None)
    acts = sae.encode(x)
    assert acts.shape == (B, S)
    assert 0 < (acts > 0).sum() < acts.numel()
    torch.testing.assert_close(result.reconstruction, sae(x))
    torch.testing.assert_close(result.reconstruction, sae.reconstruct(x, acts))
    assert result.active.tolist() == (acts > 0).sum(dim=0).tolist()
    error = (target - result.reconstruction).square().sum(dim=1).mean()
    torch.testing.assert_close(result.components["mse"], error)


@each
@pytest.mark.parametrize("scales", [(0.04, None), (12.5, 0.3)], ids=str)
def test_a_folded_module_takes_raw_rows(
    kind: str, changes: dict[str, Any], scales: tuple[float, float | None]
) -> None:
    """Two scales for those that have a target of their own."""
    settings = small(kind, changes)
    scale, scale_out = scales
    out = scale if scale_out is None or len(settings.hooks) == 1 else scale_out
    trained, folded = moved(settings), moved(settings)
    folded.fold_scale(scale, out)
    x, _ = given(settings)
    acts = trained.encode(x)
    torch.testing.assert_close(folded.encode(x / scale), acts)
    torch.testing.assert_close(folded(x / scale), trained(x) / out)
    norms = folded.directions().norm(dim=1)
    torch.testing.assert_close(norms / trained.directions().norm(dim=1), torch.full_like(norms, 1 / out))


@others
def test_decoder_directions_keep_unit_norm(kind: str, changes: dict[str, Any]) -> None:
    training = begun(small(kind, changes))
    for step in range(10):
        train(training, range(step, step + 1))
        norms = training.sae.directions().detach().norm(dim=1)
        assert float((norms - 1).abs().max()) <= 1e-6
    again = SAETraining(D, training.settings, CPU, width_out(training.settings))
    again.restore(training.weights(), training.optimizer_state())
    assert torch.equal(again.sae.directions(), training.sae.directions())


@others
@pytest.mark.parametrize("resampling", [None, 640], ids=["", "resampling"])
def test_a_restored_training_is_bit_identical(
    kind: str, changes: dict[str, Any], resampling: int | None
) -> None:
    """At a step in the middle of a warm-up, and at random ones."""
    settings = small(kind, changes, resample_every_rows=resampling)
    whole = begun(settings)
    train(whole, range(STEPS))
    # heads fall between windows: that is where training is taken up
    for stop in {5, *random.Random(f"{kind}{changes}").sample(range(10, STEPS, 5), 2)}:
        first = begun(settings)
        train(first, range(stop))
        second = SAETraining(D, settings, CPU, width_out(settings))
        second.restore(first.weights(), first.optimizer_state())
        train(second, range(stop, STEPS))
        mine = second.weights() | second.optimizer_state()
        theirs = whole.weights() | whole.optimizer_state()
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), (name, stop)


@each
def test_it_learns(kind: str, changes: dict[str, Any]) -> None:
    """More of the variance is explained at the end than at the start, and by more than the mean."""
    training = begun(small(kind, changes, lr=1e-2))
    explained = []
    for begin in range(0, 150, 50):
        rows = sparse_rows(64, 0)
        training.begin_window(rows, 64 * begin, targets_of(training.settings, rows))
        for step in range(begin, begin + 50):
            rows = sparse_rows(64, step)
            training.step(rows, Schedule(step, 150), targets_of(training.settings, rows))
        figures, bad = training.end_window()
        assert bad is None
        explained.append(figures["explained_variance"])
    assert explained[-1] > max(0.3, explained[0]), explained


@pytest.fixture(scope="module")
def every_kind() -> list[dict[str, Any]]:
    """SAEs of a run, one of each variant, on the synthetic dataset's hook points."""
    saes = []
    for number, (kind, changes) in enumerate(VARIANTS):
        settings = small(kind, changes, name=f"{kind}-{number}", hook_name=RESID)
        told = settings.model_dump(mode="json", exclude_unset=True)
        saes.append(told | ({"hook_out": MLP} if "hook_out" in told else {}))
    return saes


class TestARun:
    def test_killed_at_a_random_step_it_carries_on_to_the_same_bits(
        self, bench: Bench, dataset: Dataset, tmp_path: Path, every_kind: list[dict[str, Any]]
    ) -> None:
        config = bench.submit(dataset, saes=every_kind)
        after = random.Random(len(every_kind)).randrange(2, config.total_steps())
        with interrupted("killed in a step", after, threading.Event()), pytest.raises(Killed):
            bench.work()
        bench.work()
        undisturbed = Bench(open_store(str(tmp_path / "other")), bench.client, bench.redis.prefix + "-u")
        assert undisturbed.submit(dataset, saes=every_kind).run_id == config.run_id
        undisturbed.work()
        assert bench.head(config).status == "done"
        assert digests(bench.head(config)) == digests(undisturbed.head(config))
        for sae in every_kind:
            loaded = load_sae(f"{bench.runs.url}/{config.run_id}", sae["name"])
            told = dataset.read_chunk(0, [RESID]).acts[RESID]
            assert loaded(torch.from_numpy(told.astype("float32"))).shape[1] == loaded.d_out
            assert loaded.d_out == (16 if "hook_out" in sae else 8)
