"""docs/own-activations.md as it stands: its example stores rows, and its config trains on them."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml

from penstock.store.dataset import open_dataset
from penstock.trainer.load import load_sae
from services.command import called, penstock
from services.trees import tree_digests

PAGE = Path(__file__).parents[2] / "docs" / "own-activations.md"


def block(language: str) -> str:
    """The page's only block of a language."""
    found: list[str] = re.findall(
        rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S
    )
    (code,) = found
    return code


def store(folder: Path) -> None:
    script = folder / "example.py"
    script.write_text(block("python"), encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    store(tmp_path)
    assert capsys.readouterr().out == "20480 rows\n"
    return tmp_path


def test_the_example_is_short() -> None:
    lines = [line for line in block("python").splitlines() if line]
    assert len(lines) <= 20


def test_the_rows_are_the_models(stored: Path) -> None:
    dataset = open_dataset("mine/dataset")
    hidden, output = (dataset.as_numpy(hook).astype("float32") for hook in ("hidden", "output"))
    assert hidden.shape == (20480, 64)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    with torch.no_grad():
        given = model[2](torch.from_numpy(hidden))
    # both were rounded to bfloat16
    assert torch.allclose(given, torch.from_numpy(output), atol=0.03)
    before = tree_digests(stored / "mine")
    store(stored)
    assert tree_digests(stored / "mine") == before


@pytest.mark.long
def test_the_config_trains_on_them(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(block("yaml"), encoding="utf-8")
    config = yaml.safe_load(block("yaml"))
    result = penstock("run", "mine.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((stored / "mine" / "summary.json").read_text())
    (sae,) = summary["saes"]
    assert summary["training"]["rows"] == 20480
    assert sae["d_sae"] == config["runs"][0]["saes"][0]["d_sae"] == 256
    assert sae["explained_variance"] is sae["ce_recovered"] is None
    assert sae["held_out"] == {}
    assert "<html" in (stored / "mine" / "report.html").read_text()
    assert not (stored / "mine" / "corpus").exists()
    rows = torch.from_numpy(open_dataset("mine/dataset").as_numpy("hidden", 0, 500).astype("float32"))
    trained = load_sae(f"mine/runs/{summary['run']}", "hidden-topk")
    variance = (rows - rows.mean(dim=0)).square().sum()
    assert float((rows - trained(rows)).square().sum() / variance) < 0.7
    for arguments in (["inspect", "mine/dataset"], ["verify", "mine/dataset"], ["card", "mine/dataset"]):
        assert called(*arguments) == 0
    assert "no faults" in capsys.readouterr().out
    assert "language model" not in Path("README.md").read_text()


def test_repair_says_who_can_make_its_chunks(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(block("yaml"), encoding="utf-8")
    Path("mine/dataset/activations.zarr/acts/output/c/3/0").unlink()
    assert called("repair", "mine.yaml") == 1
    assert "store_rows(…, check=True)" in capsys.readouterr().out
