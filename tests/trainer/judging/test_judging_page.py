"""The page of an evaluation: what it says, that data stay data, and a browser's opinion."""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from penstock.trainer.judging.experiments import EXPERIMENTS, Experiment, Measurement, chosen
from penstock.trainer.judging.features.heat import feature_cards, visible
from penstock.trainer.judging.page import TABLE_ROWS, cell, csv_files, render_evaluation, shown_by
from penstock.trainer.judging.shown import Shown
from services.browser import open_page

NASTY = '<script>alert("1")</script>\n\t  &'


def feature(**changes: Any) -> dict[str, Any]:
    token = {"token": 5, "text": NASTY, "logit": 1.25}
    return {
        "feature": 7,
        "band": "rare",
        "fired": 12,
        "share": 0.0001,
        "mean_active": 0.5,
        "max": 2.0,
        "histogram": {"edges": [0.25, 0.5, 1.0, 2.0], "counts": [3, 0, 9], "zero": 1000},
        "promotes": [token],
        "suppresses": [token],
        "examples": [
            {
                "activation": 2.0,
                "sequence": 3,
                "position": 1,
                "at": 1,
                "tokens": [None, 5],
                "texts": ["[special]", NASTY],
                "activations": [None, 2.0],
            }
        ],
    } | changes


def dictionary(*features: dict[str, Any]) -> dict[str, Any]:
    return {
        "hook_name": "blocks.1.hook_resid_post",
        "hook_out": "blocks.1.hook_resid_post",
        "d_sae": 64,
        "l0": 16.0,
        "source": {"what": "stored rows", "chunks": 2, "of_chunks": 9, "rows": 1012},
        "never_active": 4,
        "features": list(features),
    }


def figures(l0: float | None, recovered: float | None) -> dict[str, Any]:
    hook = "blocks.1.hook_resid_post"
    same = {"hook_name": hook, "hook_out": hook, "d_sae": 64, "rows": 900, "ce_clean": 3.0, "ce_zero": 9.0}
    rest = {"squared_error": 4.5, "explained_variance": 0.9, "ce_spliced": 3.3, "delta_ce": 0.3, "kl": 0.4}
    return same | rest | {"l0": l0, "ce_recovered": recovered}


@pytest.fixture
def evaluation() -> dict[str, Any]:
    quiet = feature(share=0.0, mean_active=None, max=None, promotes=None, suppresses=None, examples=[])
    quiet |= {"fired": 0, "histogram": {"edges": [], "counts": [], "zero": 1012}}
    control = {
        "sequences": 9,
        "identity": {"squared_error": 0.0, "delta_ce": 0.0, "kl": 0.0},
        "zero_against_ablation": {"ce": 0.0, "kl": 0.0},
    }
    return {
        "format": 1,
        "run": "run-<b>1</b>",
        "warnings": ["context: 256 tokens are judged, the dictionaries were trained on 64"],
        "settings": {},
        "subject": {
            "model": {"name": "builtin:pystd-6l", "weights_sha256": "ab" * 32, "dtype": "float32"},
            "text": {
                "description": "text",
                "sequences": 9,
                "context": 256,
                "sha256": "x",
                "corpus_digest": "y",
            },
            "trained_context": 64,
            "dictionaries": {
                NASTY: {
                    "hook_name": "a",
                    "hook_out": "b",
                    "architecture": "transcoder",
                    "d_sae": 64,
                    "weights_sha256": "cd" * 32,
                }
            },
        },
        "environment": {"time": 1_760_000_000.0, "penstock": "0.1.0", "torch": "2", "device": "cpu"},
        "experiments": {
            "overview": {
                "predictions": 890,
                "dictionaries": {NASTY: figures(16.0, 0.95), "other": figures(32.0, None)},
                "controls": {"blocks.1.hook_resid_post": control},
            },
            "contexts": {NASTY: dictionary(feature(), quiet)},
        },
    }


def rendered(evaluation: dict[str, Any]) -> str:
    return render_evaluation(evaluation, shown_by(EXPERIMENTS, evaluation["experiments"]))


class Tags(HTMLParser):
    """Tags and attributes of a page, and whether it fits together."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_nothing_in_the_data_becomes_markup_or_asks_a_network(evaluation: dict[str, Any]) -> None:
    page = rendered(evaluation)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in {tag for tag, _ in tags.seen}
    assert "<b>1</b>" not in page
    for tag, attributes in tags.seen:
        assert not {"src", "srcset", "onload", "onclick"} & attributes.keys(), tag
        assert (attributes.get("href") or "data:").startswith(("data:", "#"))
    assert not re.search(r"url\(\s*['\"]?(?!#)", page)


def test_it_says_what_was_judged_and_what_to_mind(evaluation: dict[str, Any]) -> None:
    page = rendered(evaluation)
    assert "context: 256 tokens are judged, the dictionaries were trained on 64" in page
    assert "Features in context" in page
    assert "Never active on these rows." in page
    assert "2 of the 9 chunks that are stored" in page
    quiet = evaluation | {"warnings": []}
    assert 'class="card warnings"' not in rendered(quiet)
    assert rendered(evaluation) == page


def test_only_what_was_measured_is_shown(evaluation: dict[str, Any]) -> None:
    del evaluation["experiments"]["overview"]
    page = rendered(evaluation)
    assert "Every dictionary" not in page
    assert "Features in context" in page


def test_white_space_can_be_seen() -> None:
    assert visible("\n") == "↵"
    assert visible(" def\tx") == "·def⇥x"
    assert visible(" " * 8 + "\n\n") == "·×8↵↵"
    assert visible("a\u00a0b\x07") == "a␣b\N{REPLACEMENT CHARACTER}"


def test_heat_marks_the_token_and_shades_by_activation() -> None:
    one = feature()
    one["examples"][0] |= {"texts": ["a", "b", "c"], "activations": [None, 2.0, 0.5], "tokens": [None, 1, 2]}
    cards = str(feature_cards(dictionary(one)))
    spans = re.findall(r'<span class="(\w+)" style="--heat: (\d+)%" title="[^"]*">(\w)</span>', cards)
    assert spans == [("absent", "0", "a"), ("at", "100", "b"), ("t", "25", "c")]
    assert cards.count("<rect") == 3


def test_csv_has_every_row_in_full(evaluation: dict[str, Any]) -> None:
    files = csv_files(shown_by(EXPERIMENTS, evaluation["experiments"]))
    assert all(re.fullmatch(r"[\w.-]+\.csv", name) for name in files)
    rows = list(csv.reader(io.StringIO(files["overview.csv"])))
    assert rows[1][0] == NASTY
    assert rows[1][rows[0].index("KL")] == "0.4"
    assert rows[2][rows[0].index("CE recovered")] == ""


def test_a_long_table_is_folded_and_its_csv_is_not() -> None:
    many = Shown("many", "Many", "", ["Layer", "Value"], [[i, i / 7] for i in range(500)])
    one = Experiment(
        "many", "Many", "", Measurement("many", lambda case, progress: {}), lambda record: [many]
    )
    sections = [(one, [many])]
    evaluation = {
        "run": "r",
        "warnings": [],
        "environment": {},
        "experiments": {},
        "subject": {
            "model": {},
            "text": {"sequences": 1, "context": 2},
            "trained_context": 2,
            "dictionaries": {},
        },
    }
    page = render_evaluation(evaluation, sections)
    assert f"{TABLE_ROWS} of 500 rows" in page
    assert "<summary>500 rows</summary>" in page
    assert len(csv_files(sections)["many.csv"].splitlines()) == 501
    drawn = Shown("d", "Drawn", "", ["x"], [[1]], Markup("<svg></svg>"))
    assert "<figure" in render_evaluation(evaluation, [(one, [drawn])])


def test_cells_are_short() -> None:
    values = [None, True, "a", 0, 0.0, 5, 12345, 0.123456, -1.5]
    assert [cell(value) for value in values] == [
        *("—", "True", "a", "0", "0", "5", "12,345", "0.1235", "−1.500"),
    ]


def test_experiments_have_names_of_their_own() -> None:
    names = [one.name for one in EXPERIMENTS]
    assert len(set(names)) == len(names)
    assert [one.name for one in chosen(["contexts"])] == ["contexts"]


@pytest.mark.services
def test_a_browser_opens_an_evaluation_without_complaint(evaluation: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "evaluation.html"
    path.write_text(rendered(evaluation), encoding="utf-8")
    dom, complaints = open_page(path, tmp_path / "profile")
    assert complaints == []
    assert 'class="feature"' in dom


@pytest.mark.services
def test_a_page_that_asks_a_network_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text('<!doctype html><title>x</title><img src="http://example.org/a.png">', encoding="utf-8")
    assert open_page(path, tmp_path / "profile")[1] == ["http://example.org/a.png"]
