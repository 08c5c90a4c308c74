"""A control, and evaluations during training, through the whole pipeline with real processes."""

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.store.dataset import open_dataset
from services.command import penstock, small_config, write_config

pytestmark = pytest.mark.long


def summary_of(workdir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((workdir / "summary.json").read_text())
    return found


def weights_of(workdir: Path) -> dict[str, str]:
    return {sae["name"]: sae["weights_sha256"] for sae in summary_of(workdir)["saes"]}


def test_a_control_goes_through_everything(tmp_path: Path, small_run: Path) -> None:
    workdir = tmp_path / "control"
    weights = {"weights": "random-keep-embeddings", "weights_seed": 3}
    file = write_config(tmp_path / "control.yaml", small_config(workdir, model=weights))
    result = penstock("run", file)
    assert result.returncode == 0, result.stderr
    trained, control = summary_of(small_run), summary_of(workdir)
    assert control["model"]["name"] == "builtin:pystd-6l (random-keep-embeddings, seed 3)"
    assert control["model"]["weights_sha256"] != trained["model"]["weights_sha256"]
    assert control["dataset"]["rows"] == trained["dataset"]["rows"]
    clean = [summary["saes"][0]["held_out"]["ce_clean"] for summary in (trained, control)]
    assert clean[1] > clean[0] + 2, "the model that is evaluated is the control"
    pin = open_dataset(str(workdir / "dataset")).manifest.source
    assert pin.weights_sha256 == control["model"]["weights_sha256"]

    page = tmp_path / "compare.html"
    compared = penstock("compare", str(small_run), str(workdir), "--out", str(page))
    assert compared.returncode == 0, compared.stderr
    assert "All on the same text" in page.read_text()
    assert "random-keep-embeddings, seed 3" in compared.stdout

    other = write_config(tmp_path / "trained.yaml", small_config(workdir))
    refused = penstock("run", other)
    assert refused.returncode == 2
    assert "source.weights_sha256" in refused.stderr


def test_evaluating_while_training_changes_no_weight(tmp_path: Path, small_run: Path) -> None:
    workdir = tmp_path / "looked-at"
    config = small_config(workdir, trainer={"evaluate_every": 9000}, evaluation__live_sequences=2)
    result = penstock("run", write_config(tmp_path / "config.yaml", config))
    assert result.returncode == 0, result.stderr
    log = (workdir / "logs" / "trainer-0.log").read_text()
    # heads are about 4,000 rows apart, 31,000 rows in all
    assert log.count("evaluated inside the model in") == 2
    assert weights_of(workdir) == weights_of(small_run)
