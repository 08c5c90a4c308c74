"""A real Prometheus with our rules watches a real run: every query is answered, dashboards' with data."""

import math
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from penstock.deploy.observability.dashboards import DASHBOARDS, HERE
from penstock.deploy.observability.panels import TAKEOVERS, Query
from penstock.store.heads import newest_head
from penstock.store.objects import open_store
from penstock.trainer.config import run_ids
from services.command import COMMAND, penstock, small_config, write_config
from services.processes import free_port, kill, need, start
from services.prometheus import Prometheus, prometheus
from services.waiting import eventually

pytestmark = pytest.mark.services

MISSED = 'ALERTS{alertname="ScrapeDown", job="trainer"}'
"""A trainer that was killed; it fires two minutes later."""
QUERIES = [
    pytest.param(query, id=f"{dashboard.name}: {panel.title}: {query.legend}")
    for dashboard in DASHBOARDS
    for panel in dashboard.panels
    for query in panel.queries
]
RULES: list[dict[str, Any]] = [
    rule
    for file in sorted((HERE / "alerts").glob("*.yml"))
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
]


@dataclass(frozen=True)
class Watched:
    """A run that was watched from its beginning to its end."""

    server: Prometheus
    began: float
    pages: dict[str, str]
    run: str


def page(port: int) -> str:
    """What a process publishes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Watched]:
    """One producer, two trainers, one after the other, and the exporter.

    The first trainer is killed when it has made a head, so the run is taken over.
    """
    need("prometheus", "promtool")
    directory = tmp_path_factory.mktemp("watched")
    config = small_config(directory / "work")
    config["redis"] = {"url": valkey_url, "prefix": f"watched-{os.getpid()}", "lease_seconds": 3.0}
    # so long that it is not done when the first trainer is killed
    config["runs"][0]["epochs"] = 4
    # inside the model, too, after every head
    config["trainer"] = {"evaluate_every": 1}
    config["evaluation"]["live_sequences"] = 1
    file = str(write_config(directory / "config.yaml", config))
    ports = {job: free_port() for job in ("producer", "trainer", "exporter")}
    processes: list[subprocess.Popen[bytes]] = []
    runs = open_store(str(directory / "work" / "runs"))

    def run_process(command: str, port: int) -> "subprocess.Popen[bytes]":
        with (directory / f"{command}.log").open("ab") as log:
            process = start([*COMMAND, "--metrics-port", str(port), command, file], log)
        processes.append(process)
        return process

    def head(at: int) -> bool:
        newest = [newest_head(runs, run) for run in run_ids(runs)]
        return any(head is not None and head.position >= at for head in newest)

    def done() -> bool:
        newest = [newest_head(runs, run) for run in run_ids(runs)]
        return any(head is not None and head.status == "done" for head in newest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert penstock("corpus", file).returncode == 0
        targets = {job: [f"127.0.0.1:{port}"] for job, port in ports.items()}
        with prometheus(directory / "prometheus", targets) as server:
            began = time.time()
            try:
                run_process("exporter", ports["exporter"])
                run_process("produce", ports["producer"])
                first = run_process("train", ports["trainer"])
                eventually((directory / "work" / "dataset" / "manifest.json").exists, 120)
                pages = {"producer": page(ports["producer"])}
                assert penstock("submit", file).returncode == 0
                eventually(lambda: head(2), 120)
                kill(first)
                eventually(lambda: server.now(MISSED), 60)
                run_process("train", ports["trainer"])
                eventually(done, 180)
                ended = time.time()
                pages |= {job: page(port) for job, port in ports.items() if job != "producer"}
                # two more scrapes and looks, so that the end is seen too
                eventually(lambda: server.now('penstock_runs{state="done"} == 1'), 60)
                eventually(lambda: server.now(f'timestamp(up{{job="trainer"}} == 1) > {ended + 2}'), 60)
                yield Watched(server, began, pages, run_ids(runs)[0])
            finally:
                for process in processes:
                    kill(process)


def as_grafana_asks(expr: str) -> str:
    return expr.replace("$__rate_interval", "1m").replace("$run", ".*")


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_of_the_dashboards_has_data(watched: Watched, query: Query) -> None:
    found = watched.server.since(as_grafana_asks(query.expr), watched.began)
    if query.may_be_empty:
        return
    assert any(math.isfinite(value) for values in found for value in values), query.expr


def test_the_takeover_is_marked_at_its_time(watched: Watched) -> None:
    values = watched.server.since(as_grafana_asks(TAKEOVERS), watched.began)
    assert {len(set(series)) for series in values} == {1}
    assert watched.began < values[0][0] / 1000 < time.time()


def test_every_alert_is_evaluated_without_an_error(watched: Watched) -> None:
    """Until the last second of the run, by the server itself."""
    groups = watched.server.ask("rules", type="alert")["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert rules.keys() == {rule["alert"] for rule in RULES}
    for name, rule in rules.items():
        assert rule["health"] == "ok", (name, rule.get("lastError"))
    for rule in RULES:
        told = " ".join(rule["annotations"].values())
        for expr in [rule["expr"], *re.findall(r'query "([^"]*)"', told)]:
            watched.server.since(expr, watched.began)


def test_the_alerts_say_what_happened_and_nothing_else(watched: Watched) -> None:
    """A trainer was killed and the run taken over: that is worth a note, and nobody's sleep."""
    found = watched.server.ask(
        "query_range",
        query='ALERTS{alertstate="firing"}',
        start=watched.began,
        end=time.time(),
        step=1,
    )["result"]
    fired = {(series["metric"]["alertname"], series["metric"].get("run")) for series in found}
    # here a producer that has finished stays a target
    assert fired - {("ScrapeDown", None)} == {("RunTakenOver", watched.run)}


def test_the_trainer_that_was_killed_is_missed_no_longer(watched: Watched) -> None:
    assert watched.server.since(MISSED, watched.began)
    assert watched.server.now(MISSED) == []


@pytest.mark.parametrize("job", ["producer", "trainer", "exporter"])
def test_the_metrics_of_every_process_follow_the_rules(watched: Watched, job: str) -> None:
    text = watched.pages[job]
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
