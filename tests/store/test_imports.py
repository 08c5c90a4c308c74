"""What must stay cheap to import."""

import subprocess
import sys
from pathlib import Path

import pytest

from services.synthetic import RESID, make_manifest, write_dataset

HEAVY = ["torch", "transformer_lens", "transformers", "zarr", "s3fs", "redis", "matplotlib"]


def imported(code: str) -> list[str]:
    """Which of the heavy packages a fresh interpreter has imported after some code."""
    ask = f"{code}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found: list[str] = eval(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "module",
    ["objects", "dataset", "corpus", "commits", "index", "order", "manifest", "lookup", "joined", "truth"],
)
def test_the_store_is_light(module: str) -> None:
    assert imported(f"import penstock.store.{module}") == []


def test_a_notebook_reads_rows_without_waiting_for_torch(tmp_path: Path) -> None:
    write_dataset(tmp_path, make_manifest([40, 33]))
    code = (
        "from penstock.store.dataset import open_dataset\n"
        f"dataset = open_dataset({str(tmp_path)!r})\n"
        f"assert len(dataset.as_numpy({RESID!r})) == 73\n"
        "found = dataset.rows([3])\n"
        "assert dataset.context(int(found.sequence[0]), 2).tokens[2] == 3"
    )
    assert imported(code) == []


def test_making_toy_data_and_rows_of_ones_own_wants_no_torch() -> None:
    assert imported("import penstock.producer.toy_source, penstock.producer.own") == []


def test_the_queue_wants_redis_alone() -> None:
    assert imported("import penstock.store.queue") == ["redis"]


def test_the_loader_wants_torch_alone() -> None:
    assert imported("import penstock.store.loader") == ["torch"]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["inspect", "--help"]])
def test_help_is_instant(arguments: list[str]) -> None:
    code = (
        "from penstock.deploy.cli import cli\n"
        f"try:\n    cli({arguments})\nexcept SystemExit as stop:\n    assert stop.code == 0"
    )
    assert imported(code) == []


def test_configuration_and_status_want_no_torch() -> None:
    """It takes seconds and hundreds of megabytes, and looking at things must be cheap."""
    wanted = imported("import penstock.deploy.config, penstock.deploy.look, penstock.trainer.config")
    assert wanted == ["redis"]
