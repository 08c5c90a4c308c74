"""A dataset that continues an earlier one, and a run over both, through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import UserError
from penstock.deploy.config import load_config
from penstock.deploy.heal import Repair
from penstock.deploy.look import describe
from penstock.deploy.manage import cancel, remove
from penstock.deploy.processes import submit
from penstock.deploy.state import read_state
from penstock.deploy.status import status_lines, survey
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.retention import readers
from services.command import penstock, small_config, write_config
from services.trees import tree_digests

pytestmark = pytest.mark.long


def second_config(work: Path, first: Path, **changes: Any) -> dict[str, Any]:
    """The config of the later part; its run reads both."""
    config = small_config(
        work,
        corpus__url=str(first.parent / "corpus"),
        dataset__after=str(first),
        dataset__max_rows=None,
        evaluation={"sequences": 2},
        **changes,
    )
    config["runs"][0]["datasets"] = [str(first), "dataset"]
    return config


@pytest.fixture(scope="module")
def grown(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory: `first/` with a dataset, `second/` with what the corpus has left and a run over both."""
    directory = tmp_path_factory.mktemp("grown")
    for part in ("corpus", "dataset"):
        ignored = shutil.ignore_patterns("readers")
        shutil.copytree(small_run / part, directory / "first" / part, ignore=ignored)
    config = second_config(directory / "second", directory / "first" / "dataset")
    result = penstock("run", write_config(directory / "second.yaml", config))
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


@pytest.fixture(scope="module")
def parts(grown: Path) -> list[Dataset]:
    return [open_dataset(str(grown / name / "dataset")) for name in ("first", "second")]


@pytest.fixture(scope="module")
def summary(grown: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((grown / "second" / "summary.json").read_text())
    return found


def test_the_run_has_read_both(parts: list[Dataset], summary: dict[str, Any]) -> None:
    rows = [part.manifest.total_rows for part in parts]
    assert parts[1].manifest.corpus.first_sequence == parts[0].manifest.corpus.end > 0
    assert min(rows) > 1_000
    assert summary["status"] == "done"
    assert summary["training"]["rows"] == summary["dataset"]["rows"] == sum(rows)
    assert summary["dataset"]["chunks"] == sum(part.n_chunks for part in parts)
    assert summary["timeline"]["chunks"][-1][1] == sum(rows)


def test_the_report_names_both(grown: Path, parts: list[Dataset], summary: dict[str, Any]) -> None:
    told = [{"url": part.url, "digest": part.manifest.digest} for part in parts]
    assert summary["dataset"]["parts"] == told
    html = (grown / "second" / "report.html").read_text()
    assert all(part.manifest.digest in html for part in parts)


def test_status_and_inspect(grown: Path, parts: list[Dataset], summary: dict[str, Any]) -> None:
    config = load_config(str(grown / "second.yaml"))
    n = sum(part.n_chunks for part in parts)
    status = "\n".join(status_lines(survey(config)))
    assert f"run {summary['run']}: done, position {n} of {n}" in status
    inspected = list(describe(f"{config.runs_url}/{summary['run']}"))
    for part in parts:
        assert f"  dataset {part.url}, {part.manifest.total_rows:,} rows" in inspected
    state = read_state(config)
    assert state.finished
    assert state.runs[summary["run"]].stored_rows == sum(part.manifest.total_rows for part in parts)


def test_a_live_run_protects_every_dataset_that_it_reads(grown: Path, tmp_path: Path) -> None:
    copies = [tmp_path / name / "dataset" for name in ("first", "second")]
    for copy in copies:
        shutil.copytree(grown / copy.relative_to(tmp_path), copy, ignore=shutil.ignore_patterns("readers"))
    config = load_config(
        str(write_config(tmp_path / "c.yaml", second_config(tmp_path / "second", copies[0])))
    )
    ((run_id, new),) = submit(config)
    assert new
    for copy in copies:
        with pytest.raises(UserError, match=f"{copy} is needed by run {run_id}, which has not ended"):
            list(remove(str(copy), really=True))
    run_url = f"{config.runs_url}/{run_id}"
    assert "is cancelled at position 0" in cancel(run_url)
    list(remove(run_url, really=True))
    for copy in copies:
        assert readers(open_dataset(str(copy)).store) == [], "a run that is gone reads nothing"


def test_an_earlier_part_is_repaired_with_the_config_of_the_later_one(grown: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(
            grown / name, tmp_path / name, ignore=shutil.ignore_patterns("valkey", "logs", "runs")
        )
    written = second_config(tmp_path / "second", tmp_path / "first" / "dataset")
    before = tree_digests(tmp_path / "first" / "dataset")
    chunk = (
        tmp_path / "first" / "dataset" / "activations.zarr" / "acts" / "blocks.0.mlp.hook_post" / "c" / "2"
    )

    def repaired() -> tuple[int, str]:
        (chunk / "0").unlink()
        said: list[str] = []
        repair = Repair(load_config(str(write_config(tmp_path / "second.yaml", written))), said.append)
        repair.everything()
        return repair.left, "\n".join(said)

    left, said = repaired()
    assert (left, "chunk 2: made again" in said) == (0, True), said
    assert tree_digests(tmp_path / "first" / "dataset") == before

    # a config that makes other rows
    written["dataset"] |= {"drop_special": False, "url": "other"}
    left, said = repaired()
    assert left == 1
    assert "first/dataset was made from another model or corpus: call `penstock repair` with" in said


def test_what_cannot_be_read_as_one_is_refused_before_anything_is_written(
    grown: Path, tmp_path: Path
) -> None:
    first = grown / "first" / "dataset"

    def submitted(*datasets: Path | str) -> None:
        config = second_config(grown / "second", first, runs_url=str(tmp_path / "runs"))
        config["runs"][0]["datasets"] = [str(url) for url in datasets]
        submit(load_config(str(write_config(tmp_path / "c.yaml", config))))

    with pytest.raises(UserError, match=f"runs: small: datasets: no dataset at {tmp_path}/nowhere yet"):
        submitted(first, tmp_path / "nowhere")
    with pytest.raises(UserError, match="hold the same rows; list it once"):
        submitted(first, first)
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_dataset_is_missing_is_not_submitted(grown: Path, tmp_path: Path) -> None:
    config = second_config(
        tmp_path / "second", tmp_path / "nowhere", dataset__url=str(grown / "second" / "dataset")
    )
    state = read_state(load_config(str(write_config(tmp_path / "c.yaml", config))))
    assert state.runs["small"].status == "not submitted"
    assert "nowhere" in str(state.runs["small"].reason)
    assert not state.finished
