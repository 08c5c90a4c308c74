"""What /metrics says of runs, and when it stops saying it."""

import threading
import time
from typing import Any

import pytest

from penstock.common.metrics import BLOCKED_REASONS, REGISTRY
from penstock.store.dataset import Dataset
from penstock.trainer.group import Group
from services.dictionaries import SETTINGS, K, settings_of
from services.runs import Bench
from services.training import interrupted, sample

HELD: list[tuple[str, dict[str, Any], float | None]] = [
    ("standard", {}, None),
    ("gated", {}, None),
    ("topk", {}, K),
    ("batchtopk", {}, K),
    ("matryoshka", {}, K),
    ("jumprelu", {}, K),
    ("jumprelu", {"l0_target": None, "l0_coefficient": 0.1}, None),
    ("switch", {}, K),
    ("switch", {"always_on_k": 2}, K + 2),
    ("transcoder", {}, None),
    ("transcoder", {"l1_coefficient": None, "k": K}, K),
]


@pytest.mark.parametrize(("kind", "changes", "held"), HELD)
def test_which_l0_training_holds(kind: str, changes: dict[str, Any], held: float | None) -> None:
    assert settings_of(kind, **changes).held_l0 == held


def test_every_kind_was_asked() -> None:
    assert {kind for kind, _, _ in HELD} == SETTINGS.keys()


def shown(run: str) -> set[str]:
    """Names of the samples that have a run as their label."""
    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
    return {s.name for s in samples if s.labels.get("run") == run and not s.name.endswith("_created")}


COUNTED = {"sae_train_rows_total", "sae_steps_total", "sae_data_wait_seconds_total"}
SETTLED = {"sae_features", "sae_l0_target", "sae_dead_window_rows"}
FIGURES = {"sae_loss", "sae_l0", "sae_dead_features", "sae_explained_variance"}


def test_a_run_is_shown_while_it_is_held_and_after_its_end(bench: Bench, dataset: Dataset) -> None:
    config = bench.submit(dataset, name="shown")
    run, stop = config.run_id, threading.Event()
    with interrupted("stop", config.total_steps() - 1, stop):
        bench.work(stop)
    assert not bench.ended(config)
    assert bench.position(config) > 0
    assert shown(run) == COUNTED, "whoever has it now tells how it stands"
    before = time.time()
    bench.work()
    assert shown(run) == COUNTED | SETTLED | FIGURES | {"sae_takeover_timestamp_seconds"}
    assert before <= sample("sae_takeover_timestamp_seconds", run=run) <= time.time()
    assert sample("sae_features", run=run, sae="topk") == 64
    assert sample("sae_l0_target", run=run, sae="topk") == 2
    assert REGISTRY.get_sample_value("sae_l0_target", {"run": run, "sae": "l1"}) is None


def test_one_worker_shows_one_run_at_a_time(bench: Bench, dataset: Dataset) -> None:
    runs = [bench.submit(dataset, name=name).run_id for name in ("one", "two", "three")]
    bench.work()
    assert sorted(bool(shown(run) & FIGURES) for run in runs) == [False, False, True]
    assert all(shown(run) >= COUNTED for run in runs)


def test_a_run_whose_loss_was_not_finite_is_named(
    bench: Bench, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = bench.submit(dataset, name="diverging")
    before = time.time()
    monkeypatch.setattr(Group, "end_window", lambda group, loaded: ("l1", 3))
    bench.work()
    assert bench.head(config).status == "failed"
    assert sample("sae_run_failed_timestamp_seconds", run=config.run_id, reason="not finite") >= before
    assert not shown(config.run_id) & FIGURES


def test_every_reason_of_a_producer_is_counted_from_the_start() -> None:
    """A rate over a counter that appears with its first event misses that event."""
    name = "penstock_producer_blocked_seconds_total"
    assert all(REGISTRY.get_sample_value(name, {"reason": reason}) is not None for reason in BLOCKED_REASONS)
