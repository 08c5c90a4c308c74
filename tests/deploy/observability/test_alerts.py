"""The alerts, without Prometheus: what each must have beside its expression."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.deploy.observability.dashboards import HERE
from services.metric_names import EXPORTER, SCRAPED, everything
from services.promql import used_in

ROOT = Path(__file__).parents[3]
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for file in sorted((HERE / "alerts").glob("*.yml"))
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
}
KNOWN = everything()


def queries(rule: dict[str, Any]) -> list[str]:
    """Its expression, and those that its annotations ask."""
    told = " ".join(rule["annotations"].values())
    return [rule["expr"], *re.findall(r'query "([^"]*)"', told)]


def cases(alert: str) -> list[dict[str, Any]]:
    """What its unit tests expect, evaluation by evaluation."""
    told = yaml.safe_load((HERE / "tests" / f"{alert}.yml").read_text())
    found = [case for test in told["tests"] for case in test["alert_rule_test"]]
    assert all(case["alertname"] == alert for case in found)
    return found


@pytest.mark.parametrize("alert", RULES)
def test_every_metric_and_label_exists(alert: str) -> None:
    for expr in queries(RULES[alert]):
        used = used_in(expr)
        assert used.metrics.keys() <= KNOWN.keys(), expr
        for name, labels in used.metrics.items():
            assert labels <= KNOWN[name] | SCRAPED, expr
        assert used.grouping <= SCRAPED.union(*(KNOWN[name] for name in used.metrics)), expr


@pytest.mark.parametrize("alert", RULES)
def test_it_tells_what_happened_to_whom_and_what_to_do(alert: str) -> None:
    rule = RULES[alert]
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    annotations = rule["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url"}
    assert annotations["runbook_url"] == f"docs/runbooks/{alert}.md"
    used = used_in(rule["expr"])
    of_a_run = any("run" in KNOWN[name] for name in used.metrics)
    if of_a_run:
        assert "$labels.run" in annotations["description"] or "$s.Labels.run" in annotations["description"]
    for label in re.findall(r"\$labels\.(\w+)", annotations["description"]):
        there = used.grouping or SCRAPED.union(*(KNOWN[name] for name in used.metrics))
        assert label in there | SCRAPED.union(*(KNOWN[name] for name in used.metrics))


@pytest.mark.parametrize("alert", RULES)
def test_it_is_shown_to_fire_and_to_be_silent(alert: str) -> None:
    expected = [case["exp_alerts"] for case in cases(alert)]
    assert any(expected), "no test has it fire"
    assert not all(expected), "no test has it silent"


@pytest.mark.parametrize("alert", RULES)
def test_its_page_says_what_it_means_how_to_look_and_what_to_do(alert: str) -> None:
    page = (ROOT / "docs" / "runbooks" / f"{alert}.md").read_text()
    headings = re.findall(r"^(#+ .*)$", page, re.MULTILINE)
    assert headings == [f"# {alert}", "## What it means", "## How to look", "## What to do"]
    look = page.split("## How to look")[1].split("## ")[0]
    assert "```" in look, "no command"


def test_commands_of_the_pages_exist() -> None:
    from penstock.deploy.cli import cli

    for page in sorted((ROOT / "docs" / "runbooks").glob("*.md")):
        for name in re.findall(r"^penstock (\w+)", page.read_text(), re.MULTILINE):
            assert name in cli.commands, f"{page.name}: penstock {name}"


def test_metrics_of_the_pages_exist() -> None:
    pages = [*sorted((ROOT / "docs" / "runbooks").glob("*.md")), ROOT / "docs" / "dashboards.md"]
    for page in pages:
        for name in re.findall(r"\b(?:sae|penstock)_[a-z0-9_]*[a-z0-9]\b", page.read_text()):
            assert any(known.startswith(name) for known in KNOWN), f"{page.name}: {name}"


def test_nothing_is_left_over() -> None:
    pages = {file.stem for file in (ROOT / "docs" / "runbooks").glob("*.md")} - {"README"}
    assert pages == RULES.keys()
    assert {file.stem for file in (HERE / "tests").glob("*.yml")} == RULES.keys()


def test_the_table_of_alerts_is_complete() -> None:
    rows = re.findall(
        r"^\| \[(\w+)\]\(runbooks/(\w+)\.md\) \| (\w+) \|",
        (ROOT / "docs" / "dashboards.md").read_text(),
        re.MULTILINE,
    )
    assert {(name, severity) for name, _, severity in rows} == {
        (name, rule["labels"]["severity"]) for name, rule in RULES.items()
    }
    assert all(name == page for name, page, _ in rows)


def test_inhibitions_name_alerts_that_exist() -> None:
    told = yaml.safe_load((HERE / "alertmanager.yml").read_text())
    receivers = {receiver["name"] for receiver in told["receivers"]}
    routes = [told["route"], *told["route"]["routes"]]
    assert {route["receiver"] for route in routes} == receivers
    for rule in told["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            names = re.fullmatch(r'alertname=~?"([\w|]+)"', matcher)
            assert names, matcher
            assert set(names[1].split("|")) <= RULES.keys()


def test_the_exporters_metrics_are_those_of_its_page() -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    rows = re.findall(r"^\| `(penstock_\w+)` \|([^|]*)\| gauge \|", page, re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows} == EXPORTER
