"""Toy data through the command line: one config, from the ground truth to the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.common.errors import ConfigError
from penstock.deploy.config import load_config
from penstock.deploy.plan.make import make_plan
from penstock.deploy.plan.record import Prices
from penstock.producer.toy import Toy, ToySettings
from penstock.store.dataset import open_dataset
from penstock.store.truth import load_truth
from penstock.trainer.load import load_sae
from services.command import called, penstock, write_config
from services.trees import tree_digests

TOY: dict[str, Any] = {"d_in": 32, "features": 48, "active": 3.0, "rows_per_sequence": 64}


def toy_config(workdir: Path, **changes: Any) -> dict[str, Any]:
    sae = {
        "architecture": "topk",
        "hook_name": "toy",
        "d_sae": 48,
        "k": 3,
        "lr": 3e-3,
        "decoder_bias": "none",
        "dead_after_rows": 4000,
    }
    run = {
        "name": "toy",
        "strict": True,
        "batch_rows": 256,
        "window_chunks": 2,
        "saes": [{"name": "a"} | sae],
    }
    return {
        "workdir": str(workdir),
        "toy": TOY,
        "dataset": {"hooks": ["toy"], "max_rows": 40_000, "sequences_per_chunk": 64},
        "runs": [run],
        "evaluation": {"sequences": 40},
        "redis": {"lease_seconds": 3.0},
    } | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("toy") / "work"
    result = penstock("run", write_config(workdir.parent / "config.yaml", toy_config(workdir)))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "corpus" not in result.stdout
    return workdir


def test_a_run_ends_with_a_report(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["training"]["rows"] == 40_000
    assert summary["model"]["name"] == "toy"
    (sae,) = summary["saes"]
    assert sae["held_out"]["rows"] == 40 * 64
    assert sae["ce_recovered"] is sae["held_out"]["ce_recovered"] is None
    assert "<html" in (finished / "report.html").read_text()
    assert not (finished / "corpus").exists()
    dataset = open_dataset(str(finished / "dataset"))
    assert dataset.committed() == set(range(10))
    assert dataset.manifest.total_rows == 40_000


def test_its_figures_are_those_of_rows_that_nobody_trained_on(finished: Path) -> None:
    import torch

    summary = json.loads((finished / "summary.json").read_text())
    toy = Toy(ToySettings(**TOY))
    rows = np.concatenate([toy.rows(n, held_out=True)["toy"] for n in range(40)])
    x = torch.from_numpy(rows).bfloat16().float()
    sae = load_sae(f"{finished}/runs/{summary['run']}", "a")
    acts = sae.encode(x)
    residual = (x - sae.decode(acts)).double().square().sum()
    variance = (x.double() - x.double().mean(dim=0)).square().sum()
    (told,) = summary["saes"]
    assert told["explained_variance"] == pytest.approx(float(1 - residual / variance), abs=1e-6)
    assert told["explained_variance"] > 0.6
    assert told["held_out"]["l0"] == pytest.approx(float((acts > 0).sum() / len(x)))
    assert told["held_out"]["dead_features"] == int(((acts > 0).sum(0) == 0).sum())


def test_the_truth_lies_beside_the_rows(finished: Path) -> None:
    truth = load_truth(open_dataset(str(finished / "dataset")))
    assert truth is not None
    assert truth.digest == Toy(ToySettings(**TOY)).truth.digest


def test_running_it_again_finds_everything_done(finished: Path) -> None:
    result = penstock("run", finished.parent / "config.yaml")
    assert result.returncode == 0, result.stderr
    assert "everything is done already" in result.stdout


def test_every_other_command_works_on_it(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, before = str(finished / "dataset"), tree_digests(finished / "dataset")

    def told(*arguments: str) -> str:
        assert called(*arguments) == 0
        return capsys.readouterr().out

    assert "no faults" in told("verify", url)
    assert "ground truth" in told("inspect", url)
    assert "rows are shuffled as they are meant to be" in told("inspect", "--mixing", url)
    assert "README.md" in told("card", url, "--out", str(tmp_path / "README.md"))
    card = (tmp_path / "README.md").read_text()
    assert "# Toy activations" in card
    assert "language model" not in card
    assert "10 of 10 chunks" in told("status", str(finished.parent / "config.yaml"))
    assert "everything is whole" in told("repair", str(finished.parent / "config.yaml"))
    assert tree_digests(finished / "dataset") == before


def test_a_lost_chunk_is_made_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree_digests(finished / "dataset")
    for name in ("activations.zarr/acts/toy/c/3/0", "truth.safetensors"):
        (finished / "dataset" / name).unlink()
    assert called("repair", str(finished.parent / "config.yaml")) == 0, capsys.readouterr().out
    assert tree_digests(finished / "dataset") == before


def test_the_plan_is_what_a_run_takes(finished: Path, tmp_path: Path) -> None:
    config = load_config(str(write_config(tmp_path / "c.yaml", toy_config(tmp_path / "w"))))
    plan = make_plan(config, Prices())
    files = [file for file in (finished / "dataset").rglob("*") if file.is_file()]
    assert plan.parts["dataset"]["objects"] == len(files)
    assert plan.parts["dataset"]["bytes"] == pytest.approx(sum(f.stat().st_size for f in files), rel=0.01)
    assert (plan.rows, plan.chunks, plan.parts["corpus"]["bytes"]) == (40_000, 10, 0)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"name": "gpt2"}},
            "model: toy data are made from no model and no text; leave out model or toy",
        ),
        ({"corpus": {"context": 64}}, "corpus: toy data are made from no model and no text"),
        ({"toy": {"feature": 3}}, "toy.feature: unknown setting. Did you mean features"),
        ({"toy": {"features": 3}}, "toy: active: 5 of 3 features"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = write_config(tmp_path / "c.yaml", toy_config(tmp_path / "work", **changes))
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        (
            "plan",
            {"dataset": {"hooks": ["blocks.0.hook_out"], "max_rows": 9}},
            "toy data have no 'blocks.0.hook_out'",
        ),
        ("plan", {"dataset": {"hooks": ["toy"]}}, "dataset.max_rows: toy data have no end"),
        ("plan", {"toy": TOY | {"label_noise": 0.1}}, "toy.label_noise: only toy.target has it"),
        ("corpus", {}, "toy: toy data are made from no text"),
    ],
)
def test_one_line_says_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, changes: dict[str, Any], words: str
) -> None:
    file = write_config(tmp_path / "c.yaml", toy_config(tmp_path / "work", **changes))
    assert called(command, str(file)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


def test_another_truth_at_the_same_place(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = toy_config(finished, toy=TOY | {"seed": 1}, runs=[], trainers=0)
    assert called("plan", str(write_config(tmp_path / "c.yaml", toy))) == 2
    error = capsys.readouterr().err
    assert "holds another dataset" in error
    assert "corpus.digest" in error


def test_the_example_is_a_config() -> None:
    config = load_config(str(Path(__file__).parents[2] / "examples" / "toy.yaml"))
    assert config.toy == ToySettings(draw="batch")
