"""compose.yaml with its Prometheus and Alertmanager, configured as it says, on Ceph.

A trainer is killed, then every process is restarted, while one run goes on: what is alerted, what comes out.
"""

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from penstock.store.heads import Head, newest_head
from penstock.store.objects import open_store
from services.ceph import CephGateway
from services.command import penstock, small_config, write_config
from services.containers import need_containers
from services.deployment import Up, bring_up
from services.processes import need

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]

JOBS = ("producer", "trainer", "exporter")
# the run lasts at least as long as its bytes take to pass, however fast the machine is
CHUNKS, CHUNK_BYTES, BYTES_PER_SECOND = 72, 4_000_000, 3_000_000


def experiment(workdir: Path, base: str) -> dict[str, Any]:
    """A producer that waits for the run: it makes no more than 16 chunks ahead of it."""
    config = small_config(workdir, runs_url=f"{base}runs", json_logs=True)
    config["corpus"] |= {"url": f"{base}corpus", "max_tokens": (CHUNKS + 1) * 16 * 128}
    config["dataset"] |= {"url": f"{base}dataset", "max_rows": CHUNKS * 16 * 127}
    config["dataset"] |= {"retention": "window", "budget_bytes": 16 * CHUNK_BYTES}
    config["runs"][0]["head_interval"] = 2
    return config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Head:
    """The last head of the same experiment under `penstock run`."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    result = penstock("run", write_config(workdir / "config.yaml", experiment(workdir, "")), timeout=600)
    assert result.returncode == 0, result.stderr
    return last_head(str(workdir / "runs"))


def last_head(url: str) -> Head:
    runs = open_store(url)
    (run_id,) = runs.folders("")
    head = newest_head(runs, run_id)
    assert head is not None
    return head


@pytest.fixture(scope="module")
def up(ceph: CephGateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    need_containers()
    need("prometheus", "prometheus-alertmanager")
    config = experiment(Path("/var/lib/penstock"), "s3://penstock/")
    config["metrics"] = {"host": "0.0.0.0", "port": 9464}
    file = write_config(tmp_path_factory.mktemp("compose") / "penstock.yaml", config)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ceph.environment().items():
            patch.setenv(name, value)
        profiles = ("cpu", "observability")
        with bring_up(ceph, file, *profiles, held={"submit"}, bytes_per_second=BYTES_PER_SECOND) as running:
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


def all_up(up: Up) -> bool:
    return targets(up) == dict.fromkeys(JOBS, "up")


def alerts(up: Up) -> set[str]:
    """Names of what Alertmanager was told and has not seen resolved."""
    return {alert["labels"]["alertname"] for alert in ask(up, "alertmanager", 9093, "/api/v2/alerts") or []}


def ever_fired(up: Up) -> set[tuple[str, str]]:
    """Name and severity of all that has fired since the start."""
    query = 'group by (alertname, severity) (count_over_time(ALERTS{alertstate="firing"}[2h]))'
    told = ask(up, "prometheus", 9090, "/api/v1/query", query=query)
    return {(found["metric"]["alertname"], found["metric"]["severity"]) for found in told["data"]["result"]}


def test_every_target_is_up(up: Up) -> None:
    # nothing is submitted yet: the producer waits with what it is allowed to have made
    up.until("every target", lambda: all_up(up))
    told = ask(up, "prometheus", 9090, "/api/v1/alertmanagers")
    assert [found["url"] for found in told["data"]["activeAlertmanagers"]] == [
        "http://alertmanager:9093/api/v2/alerts"
    ]
    rules = ask(up, "prometheus", 9090, "/api/v1/rules")
    assert sum(len(group["rules"]) for group in rules["data"]["groups"]) >= 10


def test_a_killed_trainer_is_seen(up: Up) -> None:
    up.stack.held.clear()
    up.until("some heads", lambda: (head := up.head()) is not None and head.n >= 2)
    assert alerts(up) == set()
    trainer = up.stack.container("trainer")
    trainer.kill()
    up.until("another process has taken over", lambda: _starts(up) >= 2)
    began = time.monotonic()
    up.until("the alert", lambda: "RunTakenOver" in alerts(up))
    print(f"fired {time.monotonic() - began:.0f} s after the takeover")
    assert up.stack.container("trainer") is not trainer


def test_every_process_is_restarted_in_turn(up: Up, ceph: CephGateway) -> None:
    def restart(name: str) -> None:
        if name == "s3":
            ceph.stop_gateway()
            ceph.start_gateway()
        else:
            up.stack.restart(name)

    def serves(name: str) -> bool:
        paths = {"prometheus": (9090, "/api/v1/targets"), "alertmanager": (9093, "/api/v2/alerts")}
        return ask(up, name, *paths[name]) is not None if name in paths else up.stack.healthy(name)

    def went_on(after: int) -> bool:
        head = up.head()
        return head is not None and head.n > after

    lasting = [name for name, service in up.stack.services.items() if service.restart == "unless-stopped"]
    names = [*lasting, "producer"]
    assert set(names) == {"valkey", "s3", "producer", "trainer", "exporter", "prometheus", "alertmanager"}
    for name in names:
        began = time.monotonic()
        restart(name)
        up.until(f"{name} again", partial(serves, name))
        before = up.head()
        assert before is not None
        up.until("a head after it", partial(went_on, before.n))
        print(f"{name}: {time.monotonic() - began:.1f} s until the run went on")
    head = up.head()
    assert head is not None
    assert head.status == "running", "the run was over before every process had been restarted"


def test_nothing_came_of_it(up: Up, undisturbed: Head) -> None:
    up.until("the run's end", lambda: (head := up.head()) is not None and head.status == "done")
    head = up.head()
    assert head is not None
    assert {name: file.sha256 for name, file in head.checkpoint.items()} == {
        name: file.sha256 for name, file in undisturbed.checkpoint.items()
    }
    assert head.rows == undisturbed.rows
    # Prometheus, too, was restarted, and has kept what it knew
    assert ever_fired(up) == {("RunTakenOver", "info")}


def test_the_alert_ends(up: Up) -> None:
    up.until("the alert's end", lambda: ask(up, "alertmanager", 9093, "/api/v2/alerts") == [], 900.0)
    assert ever_fired(up) == {("RunTakenOver", "info")}


def _starts(up: Up) -> int:
    return up.stack.logs()["trainer"].count("taken over at")
