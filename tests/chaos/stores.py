"""Where experiments keep their objects, and what can happen there."""

import os
import random
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.ceph import CephGateway
from services.moto_process import MotoProcess
from services.s3_server import S3Server
from services.tcp_proxy import Chances, TcpProxyProcess

CHANCES = Chances(
    reset_before=0.003,
    reset_inside=0.003,
    swallow=0.003,
    truncate=0.003,
    latency=0.05,
    latency_seconds=0.3,
)
"""What goes wrong all the time between the processes and an S3 server."""


@dataclass(frozen=True)
class Trouble:
    """An outage that has begun: what it is, and how and after how many seconds it is ended."""

    what: str
    seconds: float
    end: Callable[[], None] = lambda: None


Begin = Callable[[random.Random], Trouble]


class Place(ABC):
    """A store's URLs and troubles.

    Attributes:
        environment: what processes need to reach it.
    """

    environment: dict[str, str] = {}

    @abstractmethod
    def base(self, name: str) -> str | None:
        """A URL below which an experiment stores everything; None for its work directory."""

    def troubles(self) -> dict[str, tuple[int, Begin]]:
        """What can be made to happen to the store, by name: how often (a weight), and how."""
        return {}

    def faults(self) -> dict[str, int]:
        """How often each small fault happened so far."""
        return {}


class Files(Place):
    def base(self, name: str) -> str | None:
        return None


class Behind(Place):
    """An S3 server behind a proxy that fails now and then."""

    def __init__(self, server: S3Server, proxy: TcpProxyProcess) -> None:
        self.proxy = proxy
        self.environment = server.environment(proxy.url)
        self._bucket = server.make_bucket()

    def base(self, name: str) -> str | None:
        return f"s3://{self._bucket}/{name}"

    def troubles(self) -> dict[str, tuple[int, Begin]]:
        return {"outage": (3, self._outage)}

    def faults(self) -> dict[str, int]:
        return self.proxy.faults()

    def _outage(self, random: random.Random) -> Trouble:
        seconds = random.uniform(0.3, 4.0)
        self.proxy.outage()
        return Trouble(f"no connections for {seconds:.1f} s", seconds, self.proxy.restore)


class Moto(Behind):
    def __init__(self, server: MotoProcess, proxy: TcpProxyProcess) -> None:
        super().__init__(server, proxy)
        self._server = server

    def troubles(self) -> dict[str, tuple[int, Begin]]:
        return super().troubles() | {"pause": (3, self._pause)}

    def _pause(self, random: random.Random) -> Trouble:
        seconds = random.uniform(0.3, 5.0)
        self._server.pause()
        return Trouble(f"server silent for {seconds:.1f} s", seconds, self._server.resume)


class Ceph(Behind):
    def __init__(self, server: CephGateway, proxy: TcpProxyProcess) -> None:
        super().__init__(server, proxy)
        self._server = server

    def troubles(self) -> dict[str, tuple[int, Begin]]:
        return super().troubles() | {
            "kill gateway": (4, self._kill_gateway),
            "kill all daemons": (2, self._kill_all),
        }

    def _kill_gateway(self, random: random.Random) -> Trouble:
        self._server.kill_gateway()
        return Trouble("SIGKILL to the gateway", random.uniform(0.0, 3.0), self._server.start_gateway)

    def _kill_all(self, random: random.Random) -> Trouble:
        self._server.kill_all()
        return Trouble(
            "SIGKILL to gateway, disk and monitor", random.uniform(0.0, 3.0), self._server.start_all
        )


@contextmanager
def open_place(name: str, seed: int) -> Iterator[Place]:
    """A store by name: local, moto or ceph. This process reaches its server directly, not by the proxy."""
    if name == "local":
        yield Files()
        return
    with ExitStack() as stack:
        server: MotoProcess | CephGateway = MotoProcess() if name == "moto" else CephGateway()
        stack.enter_context(server)
        proxy = stack.enter_context(TcpProxyProcess(server.url, seed, CHANCES))
        stack.enter_context(_variables(server.environment()))
        yield Moto(server, proxy) if isinstance(server, MotoProcess) else Ceph(server, proxy)


@contextmanager
def _variables(wanted: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def scratch(keep: Callable[[], bool]) -> Iterator[Path]:
    """A directory for everything, kept if asked to at the end; its path is short: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        yield path
    finally:
        if keep():
            print(f"kept: {path}")
        else:
            shutil.rmtree(path)
