"""`penstock export`, and configs whose SAEs start from imported dictionaries."""

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from penstock.deploy.cli import export
from penstock.trainer.exchange.write import FORMATS
from penstock.trainer.load import load_saelens
from services.command import SMALL_SAES, assert_one_clear_line, penstock, small_config, write_config


@pytest.fixture
def run_url(small_run: Path) -> Path:
    (directory,) = (small_run / "runs").iterdir()
    return directory


def test_export_writes_a_directory_per_sae_and_overwrites_nothing(run_url: Path, tmp_path: Path) -> None:
    result = penstock("export", run_url, "--format", "saelens", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    written = [Path(line) for line in result.stdout.splitlines()]
    assert written == [tmp_path / "out" / sae["name"] for sae in SMALL_SAES]
    metadata = json.loads((written[0] / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == SMALL_SAES[0]["hook_name"]
    assert (metadata["model_name"], metadata["context_size"]) == ("builtin:pystd-6l", 128)
    assert metadata["prepend_bos"] is True
    assert load_saelens(written[0]).d_sae == SMALL_SAES[0]["d_sae"]

    again = penstock("export", run_url, "--format", "saelens", "--out", tmp_path / "out")
    assert_one_clear_line(again, "resid-topk is there already")


def test_one_sae_in_another_format(run_url: Path, tmp_path: Path) -> None:
    arguments = ("--format", "dictionary-learning", "--sae", "mlp-l1", "--out", tmp_path)
    result = penstock("export", run_url, *arguments)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "mlp-l1").iterdir()) == ["ae.pt", "config.json"]


def test_export_of_what_is_no_run(tmp_path: Path) -> None:
    result = penstock("export", tmp_path / "nothing", "--format", "sparsify", "--out", tmp_path)
    assert result.returncode == 2
    assert "nothing is not a run" in result.stderr
    assert "repair" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["run", "submit"])
def test_a_dictionary_to_start_from_that_is_not_there(command: str, small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "corpus", tmp_path / "work" / "corpus")
    shutil.copytree(small_run / "dataset", tmp_path / "work" / "dataset")
    config: dict[str, Any] = small_config(tmp_path / "work")
    config["runs"][0]["saes"] = [SMALL_SAES[0] | {"init_from": str(tmp_path / "gone")}]
    result = penstock(command, write_config(tmp_path / "config.yaml", config))
    assert_one_clear_line(result, "saes: resid-topk: init_from", "gone: no such directory")


def test_the_command_knows_every_format() -> None:
    (choice,) = (option.type for option in export.params if option.name == "format_")
    assert isinstance(choice, click.Choice)
    assert list(choice.choices) == list(FORMATS)
