"""Prometheus, from Debian's package, with our rules, scraping processes of this machine."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from penstock.deploy.observability.dashboards import HERE
from services.processes import free_port, kill, need, start
from services.waiting import eventually


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def ask(self, path: str, **arguments: object) -> Any:
        """The data of an API call; its errors are those of the test."""
        query = urllib.parse.urlencode(arguments)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                told = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{arguments}: {error.read().decode()}") from error
        assert told["status"] == "success", told
        assert not told.get("warnings"), told
        return told["data"]

    def now(self, expr: str) -> list[dict[str, Any]]:
        """The series that an expression has now."""
        found: list[dict[str, Any]] = self.ask("query", query=expr)["result"]
        return found

    def since(self, expr: str, began: float) -> list[list[float]]:
        """Values of every series that an expression has had since a time."""
        found = self.ask("query_range", query=expr, start=began, end=time.time(), step=1)
        return [[float(value) for _, value in series["values"]] for series in found["result"]]


def config_for(targets: Mapping[str, list[str]]) -> dict[str, Any]:
    """Our configuration with other addresses: jobs, labels and rules stay as they are."""
    config: dict[str, Any] = yaml.safe_load((HERE / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(HERE / pattern) for pattern in config["rule_files"]]
    del config["alerting"]
    jobs = [job for job in config["scrape_configs"] if job["job_name"] in targets]
    assert len(jobs) == len(targets)
    for job in jobs:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": targets[job["job_name"]]}]
    config["scrape_configs"] = jobs
    return config


@contextmanager
def prometheus(directory: Path, targets: Mapping[str, list[str]]) -> Iterator[Prometheus]:
    """A server that scrapes `targets`, addresses by job, every second. Skips (fails on CI) without one."""
    need("prometheus")
    directory.mkdir()
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(config_for(targets)))
    port = free_port()
    command = [
        *("prometheus", f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
    ]
    with (directory / "log").open("wb") as log:
        process = start(command, log)
        try:
            server = Prometheus(f"http://127.0.0.1:{port}")
            eventually(server.ready, 60)
            yield server
        finally:
            kill(process)
