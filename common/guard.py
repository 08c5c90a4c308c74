"""The guard of an embedded server: starts it when asked to, and ends it with whoever asked.

    python -m penstock.common.guard LOCK SECONDS SOCKET COMMAND...

A supervisor that is killed with SIGKILL cannot clean up, so this process does it. It runs COMMAND, owns the
directory of SOCKET, and ends the one and removes the other when its standard input closes or SIGTERM comes.
It answers each line that it reads: `start` (the server, unless it runs) with `started PID` or `up PID`,
`look` with `up PID` or `ended PID`. It says `error: …` and exits if it cannot have LOCK within SECONDS.

Guard and server hold LOCK, a file that names the socket: two servers never share a directory.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from penstock.common.process import try_lock

SOCKET_NAME = "valkey.sock"
END_SECONDS = 10.0
"""How long the server may take to close before it is killed."""
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class Guard:
    """One server, started as often as it must be."""

    def __init__(self, command: list[str], lock: int) -> None:
        self._command = command
        self._lock = lock
        self._server: subprocess.Popen[bytes] | None = None

    def answer(self, request: str) -> str:
        running = self._server is not None and self._server.poll() is None
        word = "up" if running else "ended"
        if request == "start" and not running:
            self._server, word = self._start(), "started"
        return f"{word} {self._server.pid if self._server else 0}"

    def end(self) -> None:
        if self._server is None:
            return
        self._server.terminate()
        try:
            self._server.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._lock,),
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """In the server: have Linux send SIGTERM if the guard itself is killed."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def take_lock(lock: int, seconds: float) -> str | None:
    """Wait for a server that is still closing; the reason if the lock cannot be had."""
    deadline = time.monotonic() + seconds
    while not try_lock(lock):
        if time.monotonic() > deadline:
            return f"another server uses this directory and did not end within {seconds:.0f} s"
        # nothing more is asked before an answer: what can be read now is the end
        if select.select([0], [], [], 0.05)[0]:
            return "nobody waits for it any more"
    return None


def remove(socket: Path) -> None:
    """A socket and the directory made for it; nothing else is ever touched."""
    if socket.name == SOCKET_NAME and socket.parent.is_dir():
        socket.unlink(missing_ok=True)
        socket.parent.rmdir()


def sign(lock: int, socket: Path) -> None:
    """Name our socket in the lock; remove the one of a guard that could not."""
    before = Path(os.pread(lock, 4096, 0).decode().strip())
    if before != socket:
        remove(before)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{socket}\n".encode(), 0)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main(lock_file: str, seconds: str, socket_file: str, *command: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    socket = Path(socket_file)
    lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    guard = Guard(list(command), lock)
    try:
        socket.parent.mkdir(mode=0o700, exist_ok=True)
        line = sys.stdin.readline()
        refusal = take_lock(lock, float(seconds)) if line else None
        if refusal:
            say(f"error: {refusal}")
            return
        if line:
            sign(lock, socket)
        while line:
            say(guard.answer(line.strip()))
            line = sys.stdin.readline()
    except BrokenPipeError:
        pass  # who asked is gone
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        guard.end()
        remove(socket)


if __name__ == "__main__":
    main(*sys.argv[1:])
