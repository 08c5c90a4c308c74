"""The same grid on several hook points: the page goes by method, with a panel for each of them."""

import math
import re
from typing import Any

import pytest

from penstock.trainer.sweep.figures import heatmap
from penstock.trainer.sweep.layers import across_hooks
from penstock.trainer.sweep.report import render_sweep
from penstock.trainer.sweep.tables import families
from services.swept import ABOUT, record

HOOKS = [f"blocks.{layer}.mlp.hook_post" for layer in range(6)]


def records(hooks: list[str] = HOOKS, **changes: Any) -> list[dict[str, Any]]:
    """Two penalties and two sizes per hook point, without true features; later ones are harder."""
    return [
        record(
            alpha,
            ratio,
            hook_name=hook,
            size_ratio=None,
            mmcs=None,
            matched_cosine=None,
            reconstruction_loss=(1 + layer) * (1 + alpha),
            dead_features=10 * layer,
            mmcs_with_larger=None if ratio == 2 else 0.5 + layer / 20,
            **changes,
        )
        for layer, hook in enumerate(hooks)
        for alpha in (0.1, 1.0)
        for ratio in (1, 2)
    ]


def sections(html: str) -> dict[str, list[str]]:
    """Titles of the cards of each section of heatmaps."""
    parts = re.findall(r'<section class="heat">\s*<h2>(.*?)</h2>(.*?)</section>', html, re.DOTALL)
    return {title: re.findall(r"<figcaption><h3>(.*?)</h3>", body) for title, body in parts}


def test_every_method_has_a_panel_per_hook_point() -> None:
    made = render_sweep(records(), {}, ABOUT)
    found = sections(made.html)
    assert list(found)[:8] == [
        "Method 1: Dead features, standard",
        "Method 1: Dead features, 10 minibatches, standard",
        "Method 2: Reconstruction loss, standard",
        "Method 2: L1, standard",
        "Method 2: SSLL, standard",
        "Method 2: Reconstruction loss by penalty, standard",
        "Method 2: L1 by penalty, standard",
        "Method 3: MMCS with larger, standard",
    ]
    assert all(cards == HOOKS for cards in found.values())
    for hook in HOOKS:
        assert f"heatmap-mmcs_with_larger-standard-{hook}.csv" in made.files
        assert f"sticky-l1-standard-{hook}.csv" in made.files
    assert "MMCS with the true features" not in "".join(found)
    assert "blocks.5.mlp.hook_post, " in made.html, "where losses are flat, by hook point"


def test_panels_of_a_figure_share_their_colours() -> None:
    """A value has one colour on the whole page: 1 of 6 and 6 of 6 are not both the darkest."""
    cells = [[[float(layer)] * 2] for layer in (1, 3, 6)]
    made = [heatmap("a", "t", ["1", "2"], ["1"], c, ("x", "y"), among=(1.0, 3.0, 6.0)) for c in cells]
    fills = [set(re.findall(r"fill: (#[0-9a-f]{6})", svg)) for svg in made]
    assert fills[0] != fills[1] != fills[2]
    alone = [heatmap("a", "t", ["1", "2"], ["1"], c, ("x", "y")) for c in cells]
    assert len({tuple(sorted(re.findall(r"fill: (#[0-9a-f]{6})", svg))) for svg in alone}) == 1


@pytest.mark.parametrize("values", [[0.0, 2.0], [math.nan, 2.0]])
def test_a_span_takes_awkward_values(values: list[float]) -> None:
    assert "<svg" in heatmap(
        "a", "t", ["1", "2"], ["1"], [values], ("x", "y"), log=True, among=(0.0, 2.0, 9.0)
    )


def test_few_hook_points_or_other_grids_stay_by_themselves() -> None:
    def groups(*found: dict[str, Any]) -> list[int]:
        return [len(alike) for alike in across_hooks(families(found))]

    assert groups(*records(HOOKS[:2])) == [1, 1]
    assert groups(*records(HOOKS[:3])) == [3]
    other = record(0.01, 1, hook_name="elsewhere")
    assert groups(*records(HOOKS[:3]), other) == [3, 1]
    kinds = records(HOOKS[:3], architecture="gated")
    assert groups(*records(HOOKS[:4]), *kinds) == [4, 3]


def test_two_hook_points_keep_their_sections() -> None:
    found = sections(render_sweep(records(HOOKS[:2]), {}, ABOUT).html)
    assert list(found) == [f"standard on {hook}" for hook in HOOKS[:2]]


def test_on_the_page_a_layer_with_fewer_dead_features_has_another_colour() -> None:
    """Within a layer all are the same: only colours over all layers tell them apart."""
    html = render_sweep(records(), {}, ABOUT).html
    section = html.split("<h2>Method 1: Dead features, standard</h2>")[1].split("</section>")[0]
    panels = [set(re.findall(r"fill: (#[0-9a-f]{6})", p)) for p in section.split("<figure")[1:]]
    assert len(panels) == 6
    assert len({tuple(sorted(colours)) for colours in panels}) == 6
