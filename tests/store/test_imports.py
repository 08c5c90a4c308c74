"""What must stay cheap to import."""

import subprocess
import sys

import pytest

HEAVY = ["torch", "transformer_lens", "transformers", "zarr", "s3fs", "redis", "matplotlib"]


def imported(code: str) -> list[str]:
    """Which of the heavy packages a fresh interpreter has imported after some code."""
    ask = f"{code}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found: list[str] = eval(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("module", ["objects", "dataset", "corpus", "commits", "order", "manifest", "joined"])
def test_the_store_is_light(module: str) -> None:
    assert imported(f"import penstock.store.{module}") == []


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
