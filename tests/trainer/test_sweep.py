"""A sweep's page and files: what they hold, that they ask nothing of a network, and right figures."""

import csv
import io
import math
import re
from typing import Any

import pytest

from penstock.trainer.sweep.figures import brief, heatmap
from penstock.trainer.sweep.report import render_sweep
from penstock.trainer.sweep.tables import families, write_csv
from services.swept import ABOUT, record


def records() -> list[dict[str, Any]]:
    return [record(a, r, s) for a in (0.01, 0.1, 1.0) for r in (0.5, 1, 2) for s in (0, 1)]


def density() -> dict[str, Any]:
    return {"log10_edges": [-2.0, -1.0, 0.0], "counts": [300, 100], "never_active": 7}


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


class TestTables:
    def test_cells_are_means_over_seeds(self) -> None:
        (family,) = families(records())
        assert family.penalties == [0.01, 0.1, 1.0]
        assert family.size_names() == ["0.5×", "1×", "2×"]
        cells = family.cells("mmcs")
        assert cells[1][1] == pytest.approx(0.91)
        assert family.cells("mmcs_with_larger")[2] == [None, None, None]

    def test_kinds_and_hook_points_stand_apart(self) -> None:
        others = [record(0.1, 1, hook_name="b"), record(0.1, 1, architecture="topk", penalty="k", k=8)]
        assert [f.title for f in families([*records(), *others])] == [
            "standard on toy",
            "standard on b",
            "topk on toy",
        ]

    def test_missing_values_are_empty_cells(self) -> None:
        assert write_csv([{"a": 1, "b": None}, {"a": 0.1 + 0.2, "b": "x,y"}]) == (
            'a,b\n1,\n0.30000000000000004,"x,y"\n'
        )


class TestHeatmap:
    def test_values_are_in_their_cells(self) -> None:
        svg = heatmap("a", "told", ["0.1", "1"], ["1×", "2×"], [[0.5, None], [0.25, 1234]], ("α", "features"))
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
        assert {".50", ".25", "1.2k", "0.1", "2×", "α", "features"} <= set(texts)

    def test_the_same_input_gives_the_same_bytes(self) -> None:
        made = [heatmap("a", "t", ["1"], ["1", "2"], [[1.0], [2.0]], ("x", "y"), log=True) for _ in range(2)]
        assert made[0] == made[1]

    def test_nothing_known(self) -> None:
        assert heatmap("a", "t", ["1"], ["1"], [[None]], ("x", "y")) == ""

    @pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, 5.0], [math.nan, 1.0], [-1.0, 1.0]])
    def test_awkward_values(self, values: list[float]) -> None:
        for log in (False, True):
            assert "<svg" in heatmap("a", "t", ["1", "2"], ["1"], [values], ("x", "y"), log=log)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.917, ".92"),
            (1.0, "1"),
            (12.34, "12"),
            (512, "512"),
            (99.9, "100"),
            (16384, "16k"),
            (0.00004, "4e−5"),
            (0, "0"),
        ],
    )
    def test_numbers_are_short(self, value: float, text: str) -> None:
        assert brief(value) == text


class TestPage:
    def test_every_plot_has_its_data_beside_it(self) -> None:
        made = render_sweep(records(), {"toy-1a2b3c4d/relu-a0.1-r1-s1": density()}, ABOUT)
        assert len(rows_of(made.files["dictionaries.csv"])) == 18
        cells = rows_of(made.files["heatmap-mmcs-standard-toy.csv"])
        assert {"d_sae": "512", "penalty": "0.1", "mmcs": "0.91"} in cells
        assert len(cells) == 9
        assert len(rows_of(made.files["frontier.csv"])) == 18
        assert rows_of(made.files["densities.csv"])[0]["features"] == "7"
        assert "heatmap-ce_recovered-standard-toy.csv" not in made.files
        assert (
            made.html.count('<svg viewBox="0 0 380')
            == sum(name.startswith(("heatmap", "sticky", "frontier")) for name in made.files) + 1
        )

    def test_it_asks_nothing_of_a_network(self) -> None:
        html = render_sweep(records(), {}, ABOUT).html
        assert "toy &lt;b&gt;" in html
        assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", html)
        assert "<script" not in html

    def test_what_is_called_what(self) -> None:
        html = render_sweep(records(), {}, ABOUT).html
        assert "Largest dictionary tested" in html
        assert "1,024" in html
        assert not re.search("features? in the model", html, re.IGNORECASE)

    def test_sticky_losses_are_named(self) -> None:
        html = render_sweep(records(), {}, ABOUT).html
        assert "1× features: reconstruction loss flat from α 0.01 to 0.1" in html

    def test_without_truth_penalty_or_evaluation(self) -> None:
        bare = record(0.1, 1, mmcs=None, matched_cosine=None, size_ratio=None, penalty=None)
        bare |= {
            "alpha": None,
            "explained_variance": None,
            "held_out_l0": None,
            "l1": None,
            "ssll": None,
            "loss": math.nan,
        }
        made = render_sweep([bare], {}, ABOUT | {"true_features": None})
        assert "known features</strong>" not in made.html
        assert rows_of(made.files["frontier.csv"])[0]["measured"] == "in training"

    def test_the_same_input_gives_the_same_bytes(self) -> None:
        one, two = (render_sweep(records(), {}, ABOUT) for _ in range(2))
        assert one == two
