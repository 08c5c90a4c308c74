"""The Redis connection."""

import os
import re
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
