"""`penstock compare`: a trained model and its controls, every figure beside the others'."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from penstock.common.errors import UserError
from penstock.deploy.cli import cli
from penstock.deploy.compare import compare
from services.browser import open_page


def sae(name: str, **held_out: Any) -> dict[str, Any]:
    figures = {
        "rows": 1000,
        "l0": 31.5,
        "loss": 2.0,
        "explained_variance": 0.9,
        "ce_clean": 3.5,
        "ce_spliced": 3.75,
        "ce_zero": 8.5,
        "ce_recovered": 0.95,
        "delta_ce": 0.25,
        "kl": 0.3,
        "dead_features": 7,
    }
    return {
        "name": name,
        "hook_name": "blocks.1.hook_resid_post",
        "d_sae": 64,
        "l0": 32.0,
        "loss": 2.5,
        "dead_features": 5,
        "held_out": figures | held_out,
    }


def summary(model: str, *saes: dict[str, Any], corpus: str = "text") -> dict[str, Any]:
    return {"model": {"name": model}, "dataset": {"corpus": corpus}, "saes": list(saes)}


def write(folder: Path, record: Any, name: str = "summary.json") -> str:
    folder.mkdir()
    (folder / name).write_text(json.dumps(record))
    return str(folder)


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    random = summary("tiny (random, seed 0)", sae("a", kl=0.01, ce_recovered=None), sae("only-random"))
    return [
        write(tmp_path / "trained", summary("tiny", sae("a"), sae("b"))),
        write(tmp_path / "random", random) + "/summary.json",
    ]


def rows_of(file: Path) -> dict[tuple[str, str], list[str]]:
    with open(file) as stream:
        _, *rows = csv.reader(stream)
    return {(row[0], row[2]): row[3:] for row in rows}


def test_every_figure_stands_beside_the_others(two: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out" / "page.html"
    lines = compare(two, out)
    found = rows_of(out.parent / "beside.csv")
    assert found["a", "KL"] == ["0.3", "0.01"]
    assert found["a", "ΔCE"] == ["0.25", "0.25"]
    assert found["a", "CE recovered"] == ["0.95", ""], "what is not defined is missing"
    assert found["b", "L0"] == ["31.5", ""]
    assert found["only-random", "Dead features, held out"] == ["", "7"]
    assert found["a", "Dead features, in training"] == ["5", "5"]
    figures = [what for name, what in found if name == "a"]
    assert figures[:2] == ["L0", "Explained variance"], "sparsity is always beside quality"
    assert len(figures) == 15
    assert lines[0].split()[-4:] == ["tiny", "(random,", "seed", "0)"]
    assert any("KL" in line and "0.3000" in line and "0.01000" in line for line in lines)
    html = out.read_text()
    assert "All on the same text" in html
    assert html.count('<svg viewBox="0 0 380') == 6
    assert rows_of(out.parent / "beside.csv").keys() == found.keys()
    with open(out.parent / "beside-kl.csv") as stream:
        assert list(csv.reader(stream))[1] == ["a", "0.3", "0.01"]


def test_the_same_gives_the_same_bytes(two: list[str], tmp_path: Path) -> None:
    pages = [tmp_path / name / "page.html" for name in ("one", "other")]
    for page in pages:
        compare(two, page)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_evaluations_can_be_compared_with_reports(two: list[str], tmp_path: Path) -> None:
    judged = {"a": {"hook_name": "h", "hook_out": "h", "d_sae": 64, "l0": 30.0, "kl": 0.2, "ce_zero": None}}
    evaluation = {
        "subject": {"model": {"name": "judged"}, "text": {"description": "another text"}},
        "experiments": {"overview": {"dictionaries": judged}},
    }
    folder = write(tmp_path / "judged", evaluation, "evaluation.json")
    compare([two[0], folder], tmp_path / "page.html")
    assert rows_of(tmp_path / "beside.csv")["a", "KL"] == ["0.3", "0.2"]
    assert "Not on the same text" in (tmp_path / "page.html").read_text()


def test_all_that_an_evaluation_has_overall_stands_beside(two: list[str], tmp_path: Path) -> None:
    def overall(value: float) -> dict[str, Any]:
        return {"overall": {"mean": value}}

    metrics = {
        name: overall(value) for name, value in [("l1", 9.0), ("norm", 7.0), ("ce_recovered_mean", 0.8)]
    }
    place = {"name": "a", "hook_out": "h"}
    experiments = {
        "overview": {"dictionaries": {"a": {"hook_name": "h", "hook_out": "h", "d_sae": 64, "l0": 30.0}}},
        "positions": {
            "dictionaries": [place | {"metrics": metrics}],
            "sites": {"h": {"mean": {"ce": overall(6.5)}}},
        },
        "cloze": {
            "clean": {"accuracy": 0.75},
            "dictionaries": [place | {"accuracy": 0.5, "mean_delta_ln_p": -0.25}],
        },
        "feature_scores": {"dictionaries": [place | {"never_active": 11}]},
    }
    subject = {"model": {"name": "judged"}, "text": {"description": "text", "context": 64}}
    folder = write(tmp_path / "judged", {"subject": subject, "experiments": experiments}, "evaluation.json")
    compare([two[0], folder], tmp_path / "page.html")
    found = rows_of(tmp_path / "beside.csv")
    expected = {
        "L1": "9.0",
        "‖x‖": "7.0",
        "CE recovered, mean": "0.8",
        "CE mean": "6.5",
        "Accuracy on tasks, clean": "0.75",
        "Accuracy on tasks, spliced": "0.5",
        "Δln p on tasks": "-0.25",
        "Features active on no prompt": "11",
    }
    assert {name: found["a", name] for name in expected} == {k: ["", v] for k, v in expected.items()}


def test_other_sequences_of_the_same_text_are_another_text(two: list[str], tmp_path: Path) -> None:
    fewer = write(tmp_path / "fewer", summary("other", sae("a", rows=500)))
    compare([two[0], fewer], tmp_path / "page.html")
    assert "Not on the same text" in (tmp_path / "page.html").read_text()


def test_an_evaluation_without_its_overview(two: list[str], tmp_path: Path) -> None:
    subject = {"model": {"name": "judged"}, "text": {"description": "text"}}
    folder = write(tmp_path / "judged", {"subject": subject, "experiments": {}}, "evaluation.json")
    with pytest.raises(
        UserError, match=r"holds no overview, which is compared; evaluate with `--only overview`"
    ):
        compare([two[0], folder], tmp_path / "page.html")


def test_equal_names_want_labels(two: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"two evaluations are of 'tiny'; name each of them: LABEL=PATH"):
        compare([two[0], two[0]], tmp_path / "page.html")
    compare([f"one={two[0]}", f"other={two[0]}"], tmp_path / "page.html")
    header = (tmp_path / "beside.csv").read_text().splitlines()[0]
    assert header == "SAE,Hook point,Figure,one,other"


def test_a_toy_summary_has_no_cross_entropy(two: list[str], tmp_path: Path) -> None:
    without = dict.fromkeys(("ce_clean", "ce_spliced", "ce_zero", "ce_recovered", "delta_ce", "kl"))
    toys = [write(tmp_path / n, summary(n, sae("a", **without))) for n in ("t1", "t2")]
    compare(toys, tmp_path / "page.html")
    assert ("a", "KL") not in rows_of(tmp_path / "beside.csv")


BAD = [
    (["{two}"], "give two evaluations at least"),
    (["{two}", "{tmp}/none"], "none: no such file; `penstock report` writes a summary.json"),
    (["{two}", "{tmp}"], "holds neither summary.json nor evaluation.json"),
    (["{two}", "{tmp}/list.json"], "is no evaluation"),
    (["{two}", "{tmp}/other.json"], "other.json is neither a summary.json of `penstock report` nor"),
    (["{two}", "{tmp}/text.json"], "it is not JSON"),
]


@pytest.mark.parametrize(("sources", "said"), BAD)
def test_what_cannot_be_compared(sources: list[str], said: str, two: list[str], tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text('{"saes": [{}]}')
    (tmp_path / "text.json").write_text("text")
    given = [source.format(two=two[0], tmp=tmp_path) for source in sources]
    result = CliRunner().invoke(cli, ["compare", *given, "--out", str(tmp_path / "page.html")])
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.services
def test_the_page_opens_without_a_word_on_the_console(two: list[str], tmp_path: Path) -> None:
    compare(two, tmp_path / "page.html")
    dom, console = open_page(tmp_path / "page.html", tmp_path / "profile")
    assert console == []
    assert "Side by side" in dom
