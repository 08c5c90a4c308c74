"""`penstock sweep` end to end on small toy data: a grid in, a page and numbers out."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import ConfigError
from penstock.deploy.config import load_config
from penstock.deploy.toy_grid import frame_of
from penstock.producer.toy import READ, Toy, ToySettings
from services.command import penstock, write_config

SHORT = [
    *("l1_coefficient", "d_sae", "size_ratio", "seed", "mmcs", "matched_cosine"),
    *("duplicates", "dead_features", "loss", "l0"),
]


def config_of(workdir: Path, **entry: Any) -> dict[str, Any]:
    """Twelve dictionaries in two runs, on 16 features in 12 dimensions."""
    grid = {
        "name": "relu",
        "architecture": "standard",
        "hook_name": "toy",
        "alpha": [0.03, 0.3, 10.0],
        "size_ratio": [0.5, 1, 2],
        "initialisation": "orthogonal",
        "decoder_bias": "none",
        "lr": 1e-2,
        "l1_warmup_steps": 0,
        "dead_after_rows": 2000,
    }
    run = {"strict": True, "batch_rows": 64, "window_chunks": 2, "head_interval": 1}
    return {
        "workdir": str(workdir),
        "toy": {"d_in": 12, "features": 16, "active": 1.5, "decay": 1.0, "rows_per_sequence": 64},
        "dataset": {"hooks": ["toy"], "max_rows": 32_768, "sequences_per_chunk": 64},
        "evaluation": {"sequences": 16},
        "runs": [
            {"name": "one", **run, "grid": [grid | entry]},
            {"name": "two", **run, "grid": [grid | {"size_ratio": 1, "seed": 1} | entry]},
        ],
    }


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("sweep") / "work"
    file = write_config(workdir.parent / "config.yaml", config_of(workdir))
    result = penstock("sweep", file)
    assert result.returncode == 0, result.stderr
    assert "12 dictionaries; largest dictionary tested: 32 features" in result.stdout
    return workdir


def summary_of(workdir: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((workdir / "toy-summary.json").read_text())
    return {f"{entry['name']}/{entry['seed']}": entry for entry in found}


@pytest.mark.long
def test_the_summary_tells_of_every_dictionary(swept: Path) -> None:
    found = summary_of(swept)
    assert len(found) == 12
    for entry in found.values():
        assert set(SHORT) <= set(entry)
        assert all(entry[field] is not None for field in SHORT)
        assert entry["size_ratio"] == entry["d_sae"] / 16
        # the scale of the first window is close to what the ground truth says
        named = float(entry["name"].split("-a")[1].split("-")[0])
        assert entry["alpha"] == pytest.approx(named, rel=0.1)


@pytest.mark.long
def test_features_are_found_in_the_valley_and_not_beside_it(swept: Path) -> None:
    found = summary_of(swept)
    valley, beyond = found["relu-a0.3-r1/0"], found["relu-a10-r1/0"]
    assert valley["mmcs"] > 0.9
    assert 0.7 < valley["matched_cosine"] <= valley["mmcs"]
    assert valley["mmcs"] - beyond["mmcs"] > 0.05
    assert beyond["dead_features"] > valley["dead_features"]
    assert beyond["l0"] < valley["l0"]


@pytest.mark.long
def test_dictionaries_are_compared_with_each_other_across_runs(swept: Path) -> None:
    found = summary_of(swept)
    assert found["relu-a0.3-r1/0"]["mmcs_with_larger"] > 0.8
    assert found["relu-a0.3-r2/0"]["mmcs_with_larger"] is None
    assert found["relu-a0.3-r1/0"]["seed_agreement"] > 0.8
    assert found["relu-a0.3-r0.5/0"]["seed_agreement"] is None
    assert all(entry["ssll"] == entry["ssll"] for entry in found.values())
    assert found["relu-a0.3-r1/0"]["convergence"] > 0.9


@pytest.mark.long
def test_the_page_and_its_data(swept: Path) -> None:
    html = (swept / "sweep.html").read_text()
    assert "16 known features" in html
    with open(swept / "sweep" / "dictionaries.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["run"].split("-")[0] for row in rows} == {"one", "two"}
    assert (swept / "sweep" / "heatmap-mmcs-standard-toy.csv").is_file()
    assert (swept / "sweep" / "densities.csv").is_file()


@pytest.mark.long
def test_again_only_the_report_is_made(swept: Path) -> None:
    before = (swept / "toy-summary.json").read_bytes(), (swept / "sweep.html").read_bytes()
    result = penstock("sweep", swept.parent / "config.yaml")
    assert result.returncode == 0
    assert "everything is done already" in result.stdout
    assert ((swept / "toy-summary.json").read_bytes(), (swept / "sweep.html").read_bytes()) == before


def test_the_frame_is_that_of_the_rows() -> None:
    """Mean ‖x‖² follows from the ground truth, whatever is made harder."""
    for harder in ({}, {"strictly_positive": True}, {"scale_spread": 0.5, "input_noise": 0.1}):
        toy = Toy(ToySettings.model_validate({"d_in": 32, "features": 64, "active": 4.0} | harder))
        rows = [toy.rows(sequence)[READ] for sequence in range(40)]
        square = sum(float((r.astype("f8") ** 2).sum()) for r in rows) / sum(map(len, rows))
        assert frame_of(toy)["mean_square"] == pytest.approx(square, rel=0.03)


def test_a_grid_in_a_config_is_refused_in_one_line(tmp_path: Path) -> None:
    file = write_config(tmp_path / "c.yaml", config_of(tmp_path, l1=3))
    with pytest.raises(ConfigError, match=r"c\.yaml: runs\.0: grid\[0\]: l1: unknown setting"):
        load_config(str(file))


@pytest.mark.parametrize(("name", "dictionaries"), [("toy", 36), ("toy-full", 136), ("layers", 54)])
def test_the_examples(name: str, dictionaries: int) -> None:
    examples = Path(__file__).parents[2] / "examples"
    config = load_config(str(examples / f"{name}.yaml"))
    assert sum(len(run.saes) for run in config.runs) == dictionaries
