"""The examples of docs/python.md run as they stand, on a small dataset."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.store.dataset import Dataset
from services.synthetic import ROWS, make_manifest, write_dataset

HOOK = "blocks.3.hook_resid_post"
PAGE = Path(__file__).parents[2] / "docs" / "python.md"
ROWS_PER_BATCH, WINDOW_CHUNKS, EPOCHS = 1024, 4, 2


@pytest.fixture
def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.chdir(tmp_path)
    return write_dataset("demo/dataset", make_manifest(hooks={HOOK: 16}))


def run(code: str) -> dict[str, Any]:
    """Run an example as the main program, which workers import from its file."""
    script = Path("example.py")
    script.write_text(code, encoding="utf-8")
    return runpy.run_path(str(script.resolve()), run_name="__main__")


def test_there_are_three(examples: list[str]) -> None:
    assert len(examples) == 3


def test_training_resumes(dataset: Dataset, examples: list[str]) -> None:
    """One epoch, then the rest in another call: the weights are those of one call without workers."""
    spawned = 'num_workers=1, multiprocessing_context="spawn"'
    epochs = f"epochs={EPOCHS}"
    assert examples[0].count(spawned) == examples[0].count(epochs) == 1
    run(examples[0].replace(epochs, "epochs=1"))
    half = torch.load("mine.pt", weights_only=True)
    run(examples[0])
    resumed = torch.load("mine.pt", weights_only=True)
    Path("mine.pt").unlink()
    run(examples[0].replace(spawned, "num_workers=0"))
    whole = torch.load("mine.pt", weights_only=True)
    windows = [ROWS[i : i + WINDOW_CHUNKS] for i in range(0, len(ROWS), WINDOW_CHUNKS)]
    assert half["batches"]["batches"] == sum(-(-sum(rows) // ROWS_PER_BATCH) for rows in windows)
    assert whole["batches"] == resumed["batches"]
    assert whole["batches"]["batches"] > half["batches"]["batches"]
    for name, values in whole["model"].items():
        assert torch.equal(values, resumed["model"][name])
        assert not torch.equal(values, half["model"][name])


def test_rows_and_their_text(
    dataset: Dataset, examples: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(examples[1])
    assert names["rows"].shape == (1000, 16)
    assert set(names["found"].tokens.tolist()) <= {17, 23}
    norm, *lines = capsys.readouterr().out.splitlines()
    assert float(norm) > 0
    assert len(lines) == 5
    for line, token in zip(lines, names["found"].tokens, strict=True):
        decoded = names["tokenizer"].decode([int(token)])
        assert repr(decoded)[1:-1] in line


def test_readers_of_others(dataset: Dataset, examples: list[str]) -> None:
    names = run(examples[2])
    assert names["by_zarr"].dtype.name == "bfloat16"
    assert names["by_zarr"].shape == (1000, 16)
    assert int(names["used"].sum()) == len(names["tokens"]) < 1000
    acts = names["by_zarr"][names["used"]]
    ours = dataset.as_numpy(HOOK, 0, len(acts))
    assert acts.tobytes() == ours.tobytes()
