"""`docker compose up` without Docker: services of a Compose file in containers of services/containers.py."""

import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from services.compose import HealthCheck, Service
from services.containers import Container, Networks, Spec


@dataclass(frozen=True)
class Image:
    """What an image says: ENTRYPOINT, ENV, USER, HEALTHCHECK, and programs that stand for its own."""

    entry: list[str]
    environment: dict[str, str]
    programs: dict[str, str]
    user: tuple[int, int]
    health: list[str]


class Pace:
    """Lets so many bytes a second through, whoever has them; none at all limits nothing."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._seconds_per_byte = 1 / bytes_per_second if bytes_per_second else 0.0
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, n_bytes: int) -> None:
        """Until this many more may pass."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + n_bytes * self._seconds_per_byte
            pause = self._free_at - time.monotonic()
        if pause > 0:
            time.sleep(pause)


class Forwarder:
    """TCP from one address to another, for as long as the `with` block lasts.

    Args:
        bytes_per_second: how fast it is in each direction, all connections together.
    """

    def __init__(
        self, listen: tuple[str, int], to: tuple[str, int], bytes_per_second: float | None = None
    ) -> None:
        self._to = to
        self._there, self._back = Pace(bytes_per_second), Pace(bytes_per_second)
        self._server = socket.create_server(listen)
        threading.Thread(target=self._accept, name="forwarder", daemon=True).start()

    def __enter__(self) -> "Forwarder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # wakes the thread that accepts
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(ConnectionError), socket.create_connection(self._to) as server:
            back = threading.Thread(target=_pump, args=(server, client, self._back), daemon=True)
            back.start()
            _pump(client, server, self._there)
            back.join()


def _pump(source: socket.socket, sink: socket.socket, pace: Pace) -> None:
    """Bytes from one side to the other until one of them has had enough; then tell the other."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            pace.wait(len(data))
            sink.sendall(data)
    for end, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with suppress(OSError):
            end.shutdown(how)


class Stack:
    """Services as Compose would run them.

    Call `step` again and again: it starts what may be started and starts again what the policy says.

    Args:
        shown: directories of this machine that every container can read.
        elsewhere: service -> address, for those that something on this machine stands for.
    """

    def __init__(
        self,
        services: dict[str, Service],
        networks: Networks,
        directory: Path,
        image: Callable[[Service], Image],
        shown: list[Path],
        elsewhere: dict[str, str],
    ) -> None:
        self.services = services
        self.containers: dict[str, list[Container]] = {}
        self.ends: dict[str, list[int]] = {name: [] for name in services}
        self.held: set[str] = set()
        self._networks, self._directory = networks, directory
        self._image, self._shown, self._elsewhere = image, shown, elsewhere
        self._addresses = {
            name: {network: networks.address(network) for network in service.networks}
            for name, service in services.items()
        }
        self._again_at: dict[str, float] = {}

    def __enter__(self) -> "Stack":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for containers in self.containers.values():
            for container in containers:
                container.remove()

    def step(self) -> None:
        """Do what can be done now."""
        for name, service in self.services.items():
            if name in self._elsewhere or name in self.held:
                continue
            if name not in self.containers:
                if all(self._met(other, need.condition) for other, need in service.depends_on.items()):
                    self.containers[name] = [self._start(name)]
                continue
            (container,) = self.containers[name]
            code = container.exit_code
            if code is None:
                continue
            if name not in self._again_at:
                self.ends[name].append(code)
                again = service.restart in ("unless-stopped", "always") or (
                    service.restart == "on-failure" and code != 0
                )
                self._again_at[name] = time.monotonic() + 1.0 if again else float("inf")
            elif time.monotonic() >= self._again_at[name]:
                del self._again_at[name]
                container.remove()
                self.containers[name] = [self._start(name)]

    def restart(self, name: str) -> float:
        """As `docker compose restart NAME` does; seconds until it had ended.

        Fails if it does not end with 0 within its grace.
        """
        container = self.container(name)
        began = time.monotonic()
        assert container.stop(self.services[name].stop_grace_period) == 0, name
        took = round(time.monotonic() - began, 2)
        container.remove()
        self.containers[name] = [self._start(name)]
        return took

    def completed(self, name: str) -> bool:
        """Whether a service ended with 0."""
        return bool(self.ends[name]) and self.ends[name][-1] == 0

    def healthy(self, name: str) -> bool:
        """Whether its health check passes now."""
        if name in self._elsewhere:
            return True
        containers = self.containers.get(name)
        if not containers:
            return False
        service = self.services[name]
        return containers[0].healthy(service.healthcheck or HealthCheck(), self._image(service).health)

    def container(self, name: str) -> Container:
        (container,) = self.containers[name]
        return container

    def address(self, name: str, network: str) -> str:
        """A service's address, also for this machine."""
        return self._addresses[name][network]

    def found(self, network: str, name: str) -> list[str]:
        """Addresses of the containers that run under a name on a network."""
        return [
            self._addresses[service][network]
            for service, containers in list(self.containers.items())
            if network in self._addresses[service]
            and name in (service, *self.services[service].networks[network].aliases)
            and containers
            and containers[0].exit_code is None
        ]

    def down(self) -> dict[str, float]:
        """Stop what runs, as `docker compose down` does; volumes stay. Seconds that each service took.

        Fails if one does not end with 0 within its grace.
        """
        took = {}
        # whoever needs another ends before it
        for name, containers in reversed(self.containers.items()):
            for container in containers:
                if container.exit_code is None:
                    began = time.monotonic()
                    assert container.stop(self.services[name].stop_grace_period) == 0, name
                    took[name] = round(time.monotonic() - began, 2)
                container.remove()
        self.containers.clear()
        self._again_at.clear()
        for ends in self.ends.values():
            ends.clear()
        return took

    def logs(self) -> dict[str, str]:
        """Everything that each service ever said."""
        return {
            path.name.removesuffix(".log"): path.read_text(errors="replace")
            for path in self._directory.glob("*.log")
        }

    def volume(self, name: str) -> Path:
        """Where a named volume lies on this machine."""
        return self._directory / "volumes" / name

    def _met(self, name: str, condition: str) -> bool:
        if name in self._elsewhere:
            return True
        if condition == "service_completed_successfully":
            return self.completed(name)
        return self.healthy(name) if condition == "service_healthy" else name in self.containers

    def _start(self, name: str) -> Container:
        service = self.services[name]
        image = self._image(service)
        # a name in place of numbers is the image's own user
        numbers = re.fullmatch(r"(\d+):(\d+)", service.user or "")
        uid, gid = (int(numbers[1]), int(numbers[2])) if numbers else image.user
        mounts = []
        for mount in service.volumes:
            source = mount.path
            if mount.is_volume:
                source = self.volume(mount.source)
                if not source.exists():
                    source.mkdir(parents=True)
                    # as Docker does for what an image declares: a new volume belongs to the image's user
                    os.chown(source, uid, gid)
            mounts.append((source, mount.target, mount.read_only))
        return Container(
            Spec(
                name=name,
                command=[*image.entry, *service.command],
                environment=image.environment | service.environment,
                uid=uid,
                gid=gid,
                programs=image.programs,
                shown=self._shown,
                mounts=mounts,
                tmpfs=service.tmpfs,
                networks={
                    self._networks.bridge(network): address
                    for network, address in self._addresses[name].items()
                },
                hosts=self._hosts(name),
                name_server=self._networks.gateway("watch") if "watch" in service.networks else None,
                read_only=service.read_only,
                workdir="/var/lib/penstock" if service.is_penstock else "/",
            ),
            self._directory,
        )

    def _hosts(self, name: str) -> dict[str, str]:
        """Names that a service can look up: those on its own networks."""
        found: dict[str, str] = {}
        for other, addresses in self._addresses.items():
            for network, address in addresses.items():
                if network in self.services[name].networks:
                    there = self._elsewhere.get(other, address)
                    for alias in (other, *self.services[other].networks[network].aliases):
                        found.setdefault(alias, there)
        return found
