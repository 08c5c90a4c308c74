"""The dashboards: written from their descriptions, and every metric and label in them exists."""

import json
import re
from typing import Any

import pytest

from penstock.deploy.observability.dashboards import DASHBOARDS, FOLDER, rendered
from penstock.deploy.observability.panels import RUNS, TAKEOVERS, Dashboard, Panel, Query, render
from services.metric_names import SCRAPED, everything
from services.promql import used_in

KNOWN = everything()
PANELS = [
    pytest.param(panel, id=f"{dashboard.name}: {panel.title}")
    for dashboard in DASHBOARDS
    for panel in dashboard.panels
]


def unknown(expr: str) -> list[str]:
    """Metrics and labels of an expression that no process publishes."""
    used = used_in(expr)
    missing = [name for name in used.metrics if name not in KNOWN]
    for name, labels in used.metrics.items():
        missing += [f"{name}{{{x}}}" for x in sorted(labels - KNOWN.get(name, labels) - SCRAPED)]
    there = SCRAPED.union(*(KNOWN.get(name, set()) for name in used.metrics))
    return missing + [f"by {label}" for label in sorted(used.grouping - there)]


def test_the_lint_finds_what_does_not_exist() -> None:
    assert unknown('sum by (run) (rate(sae_steps_total{run=~"$run", job="trainer"}[5m])) > 2e3') == []
    assert unknown("sae_losses / on (run) group_left (sae) sae_l0 offset 1h") == ["sae_losses"]
    assert unknown('sae_l0{chunk="1"}') == ["sae_l0{chunk}"]
    assert unknown("sum by (component) (sae_l0)") == ["by component"]
    assert unknown("sae_step_seconds") == ["sae_step_seconds"], "a histogram has no series of its name"
    assert unknown("sae_steps") == ["sae_steps"], "a counter's series ends in _total"


def test_the_files_are_those_of_the_descriptions() -> None:
    stored = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.iterdir()}
    assert stored == rendered(), "run `python -m penstock.deploy.observability.dashboards`"


@pytest.mark.parametrize("panel", PANELS)
def test_every_metric_and_label_exists(panel: Panel) -> None:
    for query in panel.queries:
        assert unknown(query.expr) == [], query.expr
        legend = set(re.findall(r"{{(\w+)}}", query.legend))
        used = used_in(query.expr)
        there = SCRAPED.union(*(KNOWN[name] for name in used.metrics))
        assert legend <= (used.grouping or there), f"{query.legend}: {query.expr}"


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_says_what_it_shows(panel: Panel) -> None:
    assert panel.queries
    assert panel.text.endswith(".")


def test_what_is_beside_the_panels_exists_too() -> None:
    assert unknown(TAKEOVERS) == []
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", RUNS).groups()  # type: ignore[union-attr]
    assert label in KNOWN[metric]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda d: str(d.name))
def test_panels_lie_beside_each_other(dashboard: Dashboard) -> None:
    made = render(dashboard)
    taken: set[tuple[int, int]] = set()
    for panel in made["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)


def test_each_dashboard_leads_to_the_others_and_marks_takeovers() -> None:
    made: list[dict[str, Any]] = [json.loads(text) for text in rendered().values()]
    assert len({dashboard["uid"] for dashboard in made}) == 3
    for dashboard in made:
        assert [link["tags"] for link in dashboard["links"]] == [dashboard["tags"]]
        (takeovers,) = dashboard["annotations"]["list"]
        assert takeovers["expr"] == TAKEOVERS
        assert takeovers["useValueForTime"] is True


QUESTIONS = {
    "learning": "sae_loss sae_l0 sae_explained_variance sae_dead_features sae_ce_recovered sae_kl",
    "feeding": "sae_data_wait_seconds_total penstock_backlog_chunks penstock_chunk_read_seconds_bucket "
    "penstock_chunk_write_seconds_bucket penstock_producer_rows_total "
    "penstock_producer_blocked_seconds_total",
    "safety": "penstock_run_head_age_seconds sae_fenced_total penstock_chunk_corrupt_total "
    "penstock_redis_retries_total penstock_queue_rebuilds_total penstock_run_held penstock_store_free_bytes",
}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda d: str(d.name))
def test_each_question_is_answered(dashboard: Dashboard) -> None:
    queries: list[Query] = [query for panel in dashboard.panels for query in panel.queries]
    shown = {name for query in queries for name in used_in(query.expr).metrics}
    assert set(QUESTIONS[dashboard.name].split()) <= shown
