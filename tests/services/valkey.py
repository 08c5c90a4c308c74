"""Redis for tests: the embedded Valkey server, and Debian's Redis as a second opinion.

Each test takes a key prefix of its own; nothing is ever flushed.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from penstock.common.embedded import EmbeddedServer
from penstock.common.redis import Client, RedisSettings, connect
from services.waiting import eventually


@contextmanager
def valkey_server() -> Iterator[EmbeddedServer]:
    """A running server, gone at the end of the `with` block."""
    with tempfile.TemporaryDirectory() as directory:
        server = EmbeddedServer(Path(directory))
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.close()


@contextmanager
def debian_redis(*arguments: str) -> Iterator[str]:
    """The URL of a running `redis-server`; skips (fails on CI) where there is none."""
    binary = shutil.which("redis-server")
    if binary is None:
        reason = "no redis-server: tests/services/install brings it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="penstock-") as directory:
        socket = Path(directory) / "redis.sock"
        command = [binary, "--port", "0", "--unixsocket", str(socket), "--dir", directory, "--save", ""]
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL)
        try:
            url = f"unix://{socket}"
            eventually(lambda: process.poll() is None and answers(url), 20.0)
            yield url
        finally:
            process.terminate()
            process.wait()


def answers(url: str) -> bool:
    """Whether a Redis server answers at a URL, a demand for a password included."""
    with redis.Redis.from_url(url, protocol=2) as client:
        try:
            client.ping()
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False
        return True


def kill_server(server: EmbeddedServer) -> None:
    """SIGKILL the server itself, not its guard, and wait until it is gone."""
    os.kill(server.server_pid, signal.SIGKILL)
    eventually(lambda: not server.alive())


def connected(server: EmbeddedServer) -> Client:
    """A client of it."""
    return connect(RedisSettings(url=server.url))


def fresh_prefix() -> str:
    """A key prefix that no other test uses."""
    return f"test-{uuid.uuid4().hex[:8]}"
