"""The health endpoint, asked over HTTP."""

import http.client
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from penstock.common import health
from penstock.common.errors import ConfigError
from penstock.common.health import Health, HealthServer
from penstock.common.logs import LOGGER


class Clock:
    """Stands in for the `time` module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[HealthServer, Health]]:
    """One server for all tests: closing one takes half a second."""
    health = Health()
    server = HealthServer(health, "127.0.0.1", 0)
    yield server, health
    server.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(health, "time", clock)
    return clock


@pytest.fixture
def server(running: tuple[HealthServer, Health]) -> HealthServer:
    return running[0]


@pytest.fixture
def state(running: tuple[HealthServer, Health], clock: Clock) -> Health:
    """As a process that has just started."""
    state = running[1]
    state.ready = False
    state.beat()
    return state


def ask(server: HealthServer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}") as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_livez_follows_the_loop(server: HealthServer, state: Health, clock: Clock) -> None:
    assert ask(server, "/livez") == (200, "ok\n")
    clock.now += health.STALLED_AFTER_SECONDS - 1
    assert ask(server, "/livez")[0] == 200
    clock.now += 2
    assert ask(server, "/livez") == (503, "the loop has stalled\n")
    state.beat()
    assert ask(server, "/livez")[0] == 200


def test_readyz_waits_for_the_process(server: HealthServer, state: Health) -> None:
    assert ask(server, "/readyz") == (503, "not ready yet\n")
    state.ready = True
    assert ask(server, "/readyz?verbose") == (200, "ok\n")


def test_a_process_that_is_not_ready_is_alive(server: HealthServer, state: Health) -> None:
    assert not state.ready
    assert ask(server, "/livez")[0] == 200


def test_metrics_are_ours_alone(server: HealthServer) -> None:
    status, text = ask(server, "/metrics")
    assert status == 200
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert {"sae_takeovers_total", "penstock_chunks_committed_total"} <= names
    assert all(name.startswith(("sae_", "penstock_")) for name in names)


def test_anything_else_is_not_found(server: HealthServer) -> None:
    status, text = ask(server, "/")
    assert status == 404
    assert "/livez" in text


def test_a_taken_port_is_a_setting_to_change(state: Health) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"metrics\.port: .*:{port}"):
            HealthServer(state, "127.0.0.1", port)


def test_a_negative_port_serves_nothing(state: Health) -> None:
    server = HealthServer(state, "127.0.0.1", -1)
    assert server.port == -1
    server.close()


def test_close_gives_the_port_back(state: Health) -> None:
    server = HealthServer(state, "127.0.0.1", 0)
    server.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/livez")


def test_a_client_that_hangs_up_leaves_no_traceback(
    server: HealthServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()

    def broken(registry: object) -> bytes:
        raise BrokenPipeError

    def debug(message: str, *arguments: object, exc_info: bool) -> None:
        assert exc_info
        told.set()

    monkeypatch.setattr(health, "generate_latest", broken)
    monkeypatch.setattr(LOGGER, "debug", debug)
    with pytest.raises(http.client.RemoteDisconnected):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10)
    assert told.wait(10)
    assert capfd.readouterr().err == ""
