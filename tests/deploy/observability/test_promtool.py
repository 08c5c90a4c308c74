"""What Prometheus' own tools say of rules, their tests, configurations and metrics."""

import subprocess
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from penstock.common.metrics import REGISTRY
from penstock.deploy.observability.dashboards import HERE
from services.processes import need

pytestmark = pytest.mark.services


def say(*command: str | Path, text: str | None = None) -> str:
    """What a tool says; it must be content."""
    need(str(command[0]))
    done = subprocess.run([*map(str, command)], input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_configurations_are_valid() -> None:
    assert "3 rule files found" in say("promtool", "check", "config", HERE / "prometheus.yml")
    assert "3 receivers" in say("amtool", "check-config", HERE / "alertmanager.yml")


def test_the_rules_have_no_flaws() -> None:
    say("promtool", "check", "rules", "--lint-fatal", *sorted((HERE / "alerts").glob("*.yml")))


def test_every_alert_fires_when_it_should_and_not_else() -> None:
    files = sorted((HERE / "tests").glob("*.yml"))
    assert say("promtool", "test", "rules", *files).count("SUCCESS") == len(files)


def test_names_and_help_of_the_metrics_follow_the_rules() -> None:
    text = generate_latest(REGISTRY).decode()
    assert say("promtool", "check", "metrics", text=text) == ""
