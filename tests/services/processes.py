"""Servers as processes of their own: found, given a port, ended with the process that started them."""

import os
import random
import shutil
import socket
import subprocess
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import pytest

_PORTS = range(20_000, 32_000)  # below the ports that Linux gives to outgoing connections


def need(*binaries: str) -> None:
    """Skip (fail on CI) where one of these commands is missing."""
    missing = [name for name in binaries if shutil.which(name) is None]
    if missing:
        reason = f"no {', '.join(missing)}: tests/services/install brings it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, and that stays free while its server restarts."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def start(command: list[str], output: IO[bytes] | int = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
    """Start a server that is killed when this process dies, where `setpriv` is there to see to it.

    Linux ties a child to the *thread* that started it: start servers from one that lasts.
    """
    if shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    # modules of `services` are found whatever the working directory
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": path},
    )


def kill(process: "subprocess.Popen[bytes] | None") -> None:
    """SIGKILL a server, if it still runs, and wait until it is gone."""
    if process is not None:
        process.kill()
        process.wait()


def listens(url: str) -> bool:
    """Whether something takes connections at a URL."""
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or 80), timeout=5).close()
    except OSError:
        return False
    return True
