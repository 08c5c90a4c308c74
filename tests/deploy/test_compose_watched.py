"""compose.yaml with its Prometheus and Alertmanager, configured as it says: targets, and one alert's life."""

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.command import small_config, write_config
from services.compose import ROOT
from services.containers import need_containers
from services.deployment import Up, bring_up
from services.moto import MotoServer
from services.processes import need

_PARTS = [ROOT / "deploy" / "exporter.py", ROOT / "deploy" / "observability" / "prometheus.yml"]
pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not all(part.exists() for part in _PARTS), reason="nothing to watch with yet"),
]

JOBS = {"producer", "trainer", "exporter"}


@pytest.fixture(scope="module")
def up(moto: MotoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    need_containers()
    need("prometheus", "prometheus-alertmanager")
    config = small_config(Path("/var/lib/penstock"), runs_url="s3://penstock/runs", json_logs=True)
    config["corpus"]["url"] = "s3://penstock/corpus"
    config["dataset"]["url"] = "s3://penstock/dataset"
    config["metrics"] = {"host": "0.0.0.0", "port": 9464}
    # long enough to be killed in the middle, after heads that tell so
    config["runs"][0] |= {"epochs": 24, "head_interval": 4}
    file = write_config(tmp_path_factory.mktemp("compose") / "penstock.yaml", config)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in moto.environment().items():
            patch.setenv(name, value)
        with bring_up(moto, file, "cpu", "observability") as running:
            yield running


def ask(up: Up, service: str, port: int, path: str, **arguments: str) -> Any:
    url = f"http://{up.stack.address(service, 'watch')}:{port}{path}?{urllib.parse.urlencode(arguments)}"
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.loads(reply.read())
    except OSError:
        return None


def targets(up: Up) -> dict[str, str]:
    """Job -> health of its only target, as Prometheus has it."""
    told = ask(up, "prometheus", 9090, "/api/v1/targets", state="active")
    found = told["data"]["activeTargets"] if told else []
    return {target["labels"]["job"]: target["health"] for target in found}


def alerts(up: Up) -> dict[str, str]:
    """Name -> state of what Alertmanager was told and has not seen resolved."""
    told = ask(up, "alertmanager", 9093, "/api/v2/alerts")
    return {alert["labels"]["alertname"]: alert["status"]["state"] for alert in told or []}


def test_a_killed_trainer_is_seen_and_forgotten(up: Up) -> None:
    # the producer ends in the middle of this: what it was is seen before
    seen: dict[str, str] = {}

    def all_up() -> bool:
        seen.update({job: health for job, health in targets(up).items() if health == "up"})
        return set(seen) == JOBS

    up.until("every target is up", all_up)
    told = ask(up, "prometheus", 9090, "/api/v1/alertmanagers")
    assert [found["url"] for found in told["data"]["activeAlertmanagers"]] == [
        "http://alertmanager:9093/api/v2/alerts"
    ]
    rules = ask(up, "prometheus", 9090, "/api/v1/rules")
    assert sum(len(group["rules"]) for group in rules["data"]["groups"]) >= 10
    up.until("some heads", lambda: (head := up.head()) is not None and head.n >= 2)
    assert "RunTakenOver" not in alerts(up)
    trainer = up.stack.container("trainer")
    trainer.kill()
    up.until("another process has taken over", lambda: _took_over(up))
    began = time.monotonic()
    up.until("the alert", lambda: "RunTakenOver" in alerts(up))
    print(f"fired {time.monotonic() - began:.0f} s after the takeover: {alerts(up)}")
    assert up.stack.container("trainer") is not trainer
    up.until("the run's end", lambda: (head := up.head()) is not None and head.status == "done", 900.0)
    up.until("the alert's end", lambda: "RunTakenOver" not in alerts(up), 900.0)
    print(f"gone {time.monotonic() - began:.0f} s after the takeover; left: {alerts(up)}")
    assert {"NoTrainer", "ScrapeDown", "RunFailed", "Corruption"} & set(alerts(up)) == set()


def _took_over(up: Up) -> bool:
    return up.stack.logs()["trainer"].count("taken over at") >= 2
