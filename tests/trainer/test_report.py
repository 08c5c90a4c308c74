"""The report: what it says, what it withstands, and that a browser opens it without complaint."""

import copy
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from penstock.trainer.report import TABLE_ROWS, render_report
from services.browser import open_page

START = 1_760_000_000.0
ROWS, STEPS = 524_280, 512
HOOKS = {"blocks.3.hook_resid_post": 192, "blocks.2.mlp.hook_post": 768}

# name, hook, architecture, sparsity setting, L0, explained variance, CE recovered
SAES: list[tuple[str, str, str, float, float, float, float | None]] = [
    ("resid-topk", "blocks.3.hook_resid_post", "topk", 32, 32.0, 0.931, 0.982),
    ("resid-topk-64", "blocks.3.hook_resid_post", "topk", 64, 64.0, 0.957, 0.991),
    ("resid-l1", "blocks.3.hook_resid_post", "standard", 0.1, 48.7, 0.902, 0.964),
    ("mlp-topk", "blocks.2.mlp.hook_post", "topk", 32, 32.0, 0.781, None),
]


def make_summary() -> dict[str, Any]:
    """A finished run of four SAEs on two hooks; one of them has no CE figures."""
    edges = [-6 + 0.25 * i for i in range(25)]
    return {
        "format": 1,
        "run": "demo-1a2b3c4d",
        "status": "done",
        "created": START,
        "finished": START + 222.4,
        "strict": True,
        "model": {"name": "builtin:pystd-6l", "weights_sha256": "ab" * 32},
        "dataset": {
            "rows": ROWS,
            "chunks": 32,
            "bytes": 1.0e9,
            "hooks": HOOKS,
            "context": 256,
            "corpus": "python standard library",
            "parts": [
                {"url": "s3://bucket/datasets/demo", "digest": "cd" * 32},
                {"url": "s3://bucket/datasets/more", "digest": "ce" * 32},
            ],
        },
        "training": {
            "batch_rows": 1024,
            "window_chunks": 4,
            "epochs": 1,
            "steps": STEPS,
            "rows": ROWS,
            "seed": 0,
            "takeovers": 0,
            "head_count": 9,
        },
        "saes": [
            {
                "name": name,
                "hook_name": hook,
                "architecture": architecture,
                "d_in": HOOKS[hook],
                "d_sae": 8 * HOOKS[hook],
                "rows": ROWS,
                "steps": STEPS,
                "loss": 0.0803,
                "l0": l0,
                "dead_features": 12,
                "explained_variance": variance + 0.004,
                "ce_recovered": recovered,
                ("k" if architecture == "topk" else "l1_coefficient"): setting,
                "held_out": {
                    "rows": 40_000,
                    "l0": l0,
                    "loss": 0.0821,
                    "explained_variance": variance,
                    "ce_clean": 3.2,
                    "ce_spliced": None if recovered is None else 7.9 - 4.7 * recovered,
                    "ce_zero": 7.9,
                    "ce_recovered": recovered,
                    "dead_features": 20,
                },
                "density": {
                    "log10_edges": edges,
                    "counts": [round(260 * math.exp(-((e + 2.4) ** 2))) for e in edges[:-1]],
                    "never_active": 20,
                },
                "weights_sha256": "ef" * 32,
            }
            for name, hook, architecture, setting, l0, variance, recovered in SAES
        ],
        "controls": {"identity_ce_recovered": 1.0, "zero_ce_recovered": 0.0},
        "stages": [
            {"name": "corpus", "seconds": 12.1},
            {"name": "harvest", "seconds": 95.0, "rows_per_second": 5500.0, "processes": 2},
            {
                "name": "train",
                "seconds": 180.0,
                "rows_per_second": 2912.0,
                "waiting_seconds": 14.0,
            },
            {"name": "evaluate", "seconds": 20.0},
        ],
        "timeline": {
            "start": START + 12,
            "chunks": [[START + 12 + 2.97 * (i + 1), ROWS * (i + 1) / 32] for i in range(32)],
        },
        "environment": {"torch": "2.13.0", "threads": 1, "device": "cpu"},
    }


def make_history() -> list[dict[str, Any]]:
    """A point every fourth step, of curves that look like training."""

    def sae(progress: float, i: int) -> dict[str, float]:
        _, _, architecture, _, l0, variance, _ = SAES[i]
        wobble = 0.02 * math.sin(41 * progress + i)
        left = math.exp(-7 * progress) * (1 + wobble)
        return {
            "loss": (0.08 + 0.05 * i) * (1 + 9 * left) * (1 + wobble),
            "mse": 0.07 * (1 + 9 * left),
            "l0": l0 if architecture == "topk" else l0 * (1 + 9 * left),
            "explained_variance": variance - 1.2 * left + 0.2 * wobble,
            "dead_features": round(12 + 140 * progress * math.exp(-5 * progress) * (i + 1)),
            "learning_rate": 3e-4,
        }

    return [
        {
            "time": START + 27 + 180 * step / STEPS,
            "step": step,
            "rows": step * 1024 if step < STEPS else ROWS,
            "saes": {SAES[i][0]: sae(step / STEPS, i) for i in range(len(SAES))},
        }
        for step in [1, *range(4, STEPS + 1, 4)]
    ]


class Elements(HTMLParser):
    """Every start tag of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attrs for name, attrs in self.found if name == tag)


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(make_summary(), make_history())


def test_says_what_the_run_was(page: str) -> None:
    for text in (
        "demo-1a2b3c4d",
        "builtin:pystd-6l",
        "python standard library",
        "524,280",
        "1,536",  # d_sae
        "93.1 %",  # held-out, not the 93.5 % of training
        "98.2 %",
        "2,912",
        "7.8 % waiting",
        "3 min 42 s",
        "1 min 20 s before the last rows were produced",
        "2025-10-09 08:53 UTC",
        "ab" * 32,
        "cd" * 32,
        "ce" * 32,
        "ef" * 32,
        "blocks.2.mlp.hook_post",
        *(name for name, *_ in SAES),
    ):
        assert text in page


def test_every_figure_has_a_name_and_its_data(page: str) -> None:
    figures = re.findall(r'<figure class="card plot">.*?</figure>', page, re.DOTALL)
    assert len(figures) == 2 + 4 + len(SAES) + 1
    for figure in figures:
        (name,) = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', figure)
        assert len(name) > 30
        assert 1 <= figure.count("<tr>") - 1 <= TABLE_ROWS
        assert "<details>" in figure


def test_data_tables_keep_the_first_and_last_point(page: str) -> None:
    after = page[page.index("Loss over rows trained") :]
    rows = re.findall(r"<tr><td>([^<]*)</td>", after[: after.index("</table>")])
    assert (len(rows), rows[0], rows[-1]) == (TABLE_ROWS, "1,024", "524,280")


def test_a_value_that_was_not_measured_is_a_dash_and_no_point() -> None:
    summary = make_summary()
    for sae in summary["saes"]:
        sae["ce_recovered"] = sae["held_out"]["ce_recovered"] = None
    page = render_report(summary, make_history())
    assert page.count('data-label="CE recovered" class="meter">—') == len(SAES)
    assert "not measured" in page
    assert page.count("Nothing was recorded for this figure.") == 1


def test_figures_from_training_are_marked() -> None:
    summary = make_summary()
    summary["saes"][0]["held_out"] = None
    page = render_report(summary, make_history())
    assert "93.5 %" in page
    assert "<small>in training</small>" in page


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "text", 10**400])
def test_no_value_is_too_strange(value: Any) -> None:
    def spoil(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: spoil(item) for key, item in tree.items()}
        if isinstance(tree, list):
            return [spoil(item) for item in tree]
        return tree if isinstance(tree, str | bool) else value

    page = render_report(spoil(make_summary()), spoil(make_history()))
    assert "resid-topk" in page
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", page)


def test_one_bad_point_leaves_the_others() -> None:
    history = make_history()
    history[5]["saes"]["resid-topk"]["loss"] = math.nan
    history[6]["saes"]["resid-topk"]["loss"] = 0.0  # has no logarithm
    del history[7]["saes"]["resid-topk"]
    page = render_report(make_summary(), history)
    assert page.count("Nothing was recorded") == 0


def test_an_empty_run_has_a_page() -> None:
    page = render_report({"run": "x", "status": "failed", "saes": None}, [])
    assert "No SAE was recorded." in page
    page = render_report(make_summary() | {"timeline": None, "stages": None}, [])
    assert page.count("Nothing was recorded for this figure.") == 5


def test_many_saes_are_drawn_by_hook() -> None:
    summary = make_summary()
    for i in range(2, 5):
        more = copy.deepcopy(summary["saes"][:4])
        summary["saes"] += [sae | {"name": f"{sae['name']}-{i}"} for sae in more]
    page = render_report(summary, make_history())
    assert page.count('<h3 class="group">') == len(HOOKS)


def test_hostile_names_stay_text() -> None:
    summary, history = make_summary(), make_history()
    hostile = '<script>x("$\\frac$")</script>\'"&'
    summary["saes"][0]["name"] = summary["saes"][0]["hook_name"] = hostile
    summary["run"] = summary["dataset"]["corpus"] = hostile
    for point in history:
        point["saes"][hostile] = point["saes"].pop("resid-topk")
    page = render_report(summary, history)
    elements = Elements(page)
    assert list(elements.named("script")) == []
    assert "&lt;script&gt;x(" in page
    # Nothing broke out of an attribute either.
    names = {name for _, attrs in elements.found for name in attrs}
    assert all(re.fullmatch("[a-zA-Z:-]+[12]?", name) for name in names)
    assert not any(name.startswith("on") for name in names)


def test_asks_nothing_of_a_network(page: str) -> None:
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    for _, attrs in Elements(page).found:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attrs.get(name) or ""
            assert value in ("", "data:,") or value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    ids = [attrs["id"] for _, attrs in Elements(page).found if attrs.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', page)) <= set(ids)


def test_colours_are_the_pages_own(page: str) -> None:
    # A stand-in that survives would be drawn as it is, in light and in dark.
    assert not re.search(r"#a[12]000\d", page)
    used = set(re.findall(r"var\((--[\w-]+)[,)]", page))
    assert used <= {*re.findall(r"(--[\w-]+):", page)}


def test_same_input_same_bytes(page: str) -> None:
    assert render_report(make_summary(), make_history()) == page


def test_the_readers_matplotlib_settings_are_set_aside(page: str) -> None:
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "axes.facecolor": "red"}):
        assert render_report(make_summary(), make_history()) == page


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = "import sys, penstock.trainer.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.services
def test_a_browser_opens_it_without_complaint(page: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    dom, complaints = open_page(path, tmp_path / "profile")
    assert complaints == []
    assert '<table class="saes">' in dom
