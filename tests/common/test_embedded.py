"""The embedded server keeps its data, and never outlives whoever started it."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.common.embedded import RESTARTS, EmbeddedServer
from penstock.common.errors import Unavailable
from penstock.common.guard import SOCKET_NAME, remove
from penstock.common.redis import RedisSettings, connect
from services.valkey import answers, connected, fresh_prefix, kill_server
from services.waiting import eventually


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "valkey")
    server.wait_until_ready()
    yield server
    server.close()


def running(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def guard_of(server: EmbeddedServer) -> int:
    return int(Path(f"/proc/{server.server_pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_data_outlives_a_stop(tmp_path: Path) -> None:
    key = fresh_prefix()
    for start in range(3):
        server = EmbeddedServer(tmp_path)
        try:
            server.wait_until_ready()
            client = connected(server)
            assert client.incr(key) == start + 1
            client.close()
        finally:
            server.close()


def test_a_killed_server_is_started_again_with_its_data(server: EmbeddedServer) -> None:
    key = fresh_prefix()
    client = connected(server)
    client.config_set("appendfsync", "always")
    client.set(key, "kept")
    assert not server.ensure(), "it is up"
    killed = server.server_pid
    kill_server(server)
    assert server.ensure()
    assert server.server_pid != killed
    server.wait_until_ready()
    assert client.get(key) == "kept"
    client.close()


def test_a_killed_guard_takes_the_server_along_and_both_are_started_again(server: EmbeddedServer) -> None:
    key, url = fresh_prefix(), server.url
    client = connected(server)
    client.set(key, "kept")
    server_pid, guard_pid = server.server_pid, guard_of(server)
    os.kill(guard_pid, signal.SIGKILL)
    eventually(lambda: not running(server_pid))
    assert server.ensure()
    server.wait_until_ready()
    assert server.url == url, "whoever has the address can go on"
    assert client.get(key) == "kept"
    client.close()


def test_a_server_that_dies_again_and_again_is_given_up(server: EmbeddedServer) -> None:
    for _ in range(RESTARTS - 1):
        kill_server(server)
        assert server.ensure()
    kill_server(server)
    with pytest.raises(Unavailable, match="keeps dying: "):
        server.ensure()


def test_close_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    server.wait_until_ready()
    pids = [server.server_pid, guard_of(server)]
    assert server.socket.exists()
    server.close()
    assert not any(map(running, pids))
    assert not server.socket.parent.exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_guard_that_is_told_to_end_cleans_up(tmp_path: Path, sent: signal.Signals) -> None:
    """A Ctrl-C does not reach it; should it do so, the supervisor decides."""
    server = EmbeddedServer(tmp_path)
    server.wait_until_ready()
    server_pid, guard_pid = server.server_pid, guard_of(server)
    os.kill(guard_pid, sent)
    if sent == signal.SIGINT:
        assert server.alive()
    else:
        eventually(lambda: not running(guard_pid))
        assert not running(server_pid)
        assert not server.socket.parent.exists()
    server.close()


OWNER = """
import sys, time
from pathlib import Path
from penstock.common.embedded import RESTARTS, EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]))
server.wait_until_ready()
print(server.server_pid, server.socket, flush=True)
time.sleep(1000)
"""


def test_it_ends_with_a_killed_owner_and_the_next_one_finds_the_data(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        pid, socket = owner.stdout.readline().split()
        client = connect(RedisSettings(url=f"unix://{socket}"))
        client.set("a", "kept")
        client.close()
        owner.kill()
    # at once: the old server may still be closing
    server = EmbeddedServer(tmp_path)
    try:
        assert not running(int(pid)), "two servers must not share a directory"
        server.wait_until_ready()
        client = connected(server)
        assert client.get("a") == "kept"
        client.close()
        assert not Path(socket).parent.exists()
    finally:
        server.close()


def test_the_next_one_waits_for_a_server_that_closes_slowly(tmp_path: Path) -> None:
    """The guard is killed and the server frozen, so that it cannot even begin to close."""
    first = EmbeddedServer(tmp_path)
    first.wait_until_ready()
    server_pid, socket = first.server_pid, first.socket
    os.kill(server_pid, signal.SIGSTOP)
    os.kill(guard_of(first), signal.SIGKILL)
    late = threading.Timer(0.5, os.kill, (server_pid, signal.SIGCONT))
    late.start()
    second = EmbeddedServer(tmp_path)
    try:
        assert late.finished.is_set()
        assert not running(server_pid)
        assert not socket.parent.exists(), "nobody else removes it"
        second.wait_until_ready()
    finally:
        late.join()
        second.close()
        first.close()


def test_a_directory_that_stays_in_use_is_refused(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(sockets))
    with pytest.raises(Unavailable, match=r"valkey does not start: another server uses this directory"):
        EmbeddedServer(tmp_path / "valkey", patience=0.2)
    assert server.alive()
    assert answers(server.url)
    assert list(sockets.iterdir()) == []


def test_only_a_socket_and_its_directory_are_ever_removed(tmp_path: Path) -> None:
    """What a lock file names is not trusted."""
    other = tmp_path / "precious" / "file"
    other.parent.mkdir()
    other.touch()
    remove(other)
    assert other.exists()
    remove(tmp_path / "gone" / SOCKET_NAME)


def test_it_never_evicts(server: EmbeddedServer) -> None:
    client = connected(server)
    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert client.config_get("appendonly") == {"appendonly": "yes"}
    client.close()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").mkdir()
    (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("not a manifest\n")
    server = EmbeddedServer(tmp_path)
    try:
        with pytest.raises(Unavailable, match=r"does not start: .*manifest"):
            server.wait_until_ready()
    finally:
        server.close()
