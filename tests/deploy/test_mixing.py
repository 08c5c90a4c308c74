"""`penstock inspect --mixing`: what it says, and its exit codes."""

from pathlib import Path

import numpy as np
import pytest

from penstock.deploy.cli import main
from penstock.deploy.mixing import mixing_report
from penstock.store import writer
from services.synthetic import MLP, RESID, write_dataset


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shuffled")
    write_dataset(directory)
    return directory


def test_the_report(shuffled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = inspect(capsys, shuffled, "--mixing", "--window-chunks", 4, "--batch-rows", 200)
    assert code == 0, out
    lines = out.splitlines()
    assert "within 10 %" in next(line for line in lines if "perfect shuffle of each window" in line)
    assert "NOT within 10 %" in next(line for line in lines if "perfect shuffle of the whole" in line)
    assert "window_chunks: 16 would do" in out
    table = [line.split() for line in lines if line.strip()[:2].strip().isdigit() and "rows" not in line]
    assert [row[0] for row in table] == ["1", "2", "4", "8", "16"]
    assert [float(row[2]) for row in table] == pytest.approx([16, 8, 4, 2, 1], rel=0.1)
    assert out.rstrip().endswith("shuffled as they are meant to be")


def test_one_window_is_a_perfect_shuffle(shuffled: Path) -> None:
    lines, fine = mixing_report(str(shuffled), window_chunks=16, batch_rows=500)
    assert fine
    assert "against a shuffle of the whole dataset: within 10 %" in lines


def test_the_runs_own_defaults(shuffled: Path) -> None:
    lines, _ = mixing_report(str(shuffled))
    assert any("windows of 16 chunks, batches of 4,096, seed 0" in line for line in lines)
    assert "against a shuffle of the whole dataset: within 10 %" in lines


def test_one_hook(shuffled: Path) -> None:
    lines, _ = mixing_report(str(shuffled), hooks=[MLP])
    assert any(MLP in line for line in lines)
    assert not any(RESID in line for line in lines)


def test_an_unshuffled_dataset_is_flagged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer, "permutation", lambda n, *_: np.arange(n))
    write_dataset(tmp_path)
    code, out, _ = inspect(capsys, tmp_path, "--mixing")
    assert code == 1
    assert "NOT SHUFFLED: in stored order, neighbours are of one sequence" in out
    assert "meant to be" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mixing", "--hook", "blocks.9"], "hook 'blocks.9' is not in this dataset"),
        (["--mixing", "--window-chunks", "0"], "--window-chunks"),
        (["--batch-rows", "5"], "go with --mixing"),
    ],
)
def test_bad_input_is_refused(
    shuffled: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, out, err = inspect(capsys, shuffled, *arguments)
    assert code == 2
    assert said in err
    assert not out
