"""The Redis connection."""

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import redis
from pydantic import Field
from redis.backoff import NoBackoff
from redis.retry import Retry

from penstock.common import metrics, retries
from penstock.common.errors import ConfigError, Unavailable
from penstock.common.logs import LOGGER
from penstock.common.redact import hide, hide_in_url, redact
from penstock.common.settings import Settings

Client = Any
"""A `redis.Redis` that decodes answers. redis-py types an answer as all that any command might give."""

URL_VARIABLE = "PENSTOCK_REDIS_URL"
PASSWORD_VARIABLE = "PENSTOCK_REDIS_PASSWORD"

OLDEST_SERVER = (6, 2)
"""The first version that has every command we use."""
EVICTION = "noeviction"
"""The only `maxmemory-policy` under which work cannot vanish."""

REPLY_SECONDS = 10.0
"""An attempt waits for a reply for so long."""

_T = TypeVar("_T")


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


class PolicyRetry(Retry):
    """redis-py's hook for trying again, filled with our policy.

    redis-py nests such calls: a command that finds its connection broken connects anew inside. Only the
    outermost call tries again, so that the bounds hold for a command as a whole.
    """

    def __init__(self, bounds: retries.Bounds = retries.REDIS) -> None:
        super().__init__(NoBackoff(), bounds.attempts - 1)
        self._bounds = bounds

    def call_with_retry(
        self,
        do: Callable[[], _T],
        fail: Callable[[Exception], Any] | Callable[[Exception, int], Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> _T:
        def is_transient(error: BaseException) -> bool:
            # by redis-py's tree a wrong password is a broken connection
            if not isinstance(error, self._supported_errors) or isinstance(error, redis.AuthenticationError):
                return False
            return is_retryable is None or is_retryable(error)

        def failed(state: Any) -> None:
            # after every failure, the last one too: it drops the connection, or raises another error
            told: Any = fail
            error = state.outcome.exception()
            told(error, state.attempt_number) if with_failure_count else told(error)

        outermost = not getattr(_here, "trying", False)
        bounds = self._bounds if outermost else retries.ONCE
        policy = retries.retrying(is_transient, _count, bounds=bounds)
        policy.after = failed
        _here.trying = True
        try:
            return policy(do)
        finally:
            _here.trying = not outermost


_here = threading.local()
"""`trying`: this thread is inside a call that is tried again."""


def _count(error: BaseException) -> None:
    metrics.redis_retries.inc()
    LOGGER.debug("redis: %s; trying again", error)


def connect(
    settings: RedisSettings, bounds: retries.Bounds = retries.REDIS, patience: float = REPLY_SECONDS
) -> Client:
    """A connected client.

    Args:
        bounds: how long it tries again what may pass by itself.
        patience: seconds that one attempt waits for a reply.

    Raises:
        ConfigError: no url is set, it is not a Redis url, or the server is too old or may evict keys.
        Unavailable: nothing answers there, or it refuses us; the message hides the password.
    """
    url = os.environ.get(URL_VARIABLE) or settings.url
    if not url:
        raise ConfigError(
            f"redis.url: not set; set it or {URL_VARIABLE}, or use `penstock run`, which starts a server"
        )
    hide_in_url(url)
    options: dict[str, Any] = {}
    password = os.environ.get(PASSWORD_VARIABLE)
    if settings.password_file:
        try:
            password = Path(settings.password_file).read_text().strip()
        except OSError as error:
            raise ConfigError(f"redis.password_file: {error.strerror}: {settings.password_file}") from error
    if password:
        hide(password)
        options["password"] = password
    try:
        client = redis.Redis.from_url(
            url,
            decode_responses=True,
            # reply shapes differ between protocol versions
            protocol=2,
            socket_timeout=patience,
            socket_connect_timeout=min(5.0, patience),
            retry=PolicyRetry(bounds),
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
        facts = _facts(client)
    except TypeError as error:
        raise ConfigError(f"redis.url: {without_password(url)} has an unknown option: {error}") from error
    except redis.RedisError as error:
        raise Unavailable(
            f"redis.url: no Redis at {without_password(url)} ({error}); is the server up and the url right?"
        ) from error
    _check_server(facts, f"redis.url: {without_password(url)}")
    return client


def _facts(client: Client) -> dict[str, Any]:
    """What the server says of its version and its memory; nothing where it may not say."""
    try:
        return {**client.info("server"), **client.info("memory")}
    except redis.ResponseError:  # INFO is renamed, or the user's ACL lacks it
        return {}


def _check_server(facts: dict[str, Any], name: str) -> None:
    """Refuse a server that cannot be used; warn of what it does not say.

    Raises:
        ConfigError: it is too old, or may evict keys.
    """
    # redis-py makes a number of a version that has one dot
    version = str(facts.get("redis_version", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        LOGGER.warning("%s: the server does not say its version; it must be 6.2 or newer", name)
    elif (int(numbers[1]), int(numbers[2])) < OLDEST_SERVER:
        raise ConfigError(f"{name} is Redis {version}; use Redis 6.2 or newer, or Valkey")
    policy = facts.get("maxmemory_policy")
    if policy is None:
        LOGGER.warning("%s: the server does not say its maxmemory-policy; it must be %s", name, EVICTION)
    elif policy != EVICTION:
        raise ConfigError(
            f"{name} has maxmemory-policy {policy}, which drops keys when memory is short, and with them "
            f"work; set maxmemory-policy {EVICTION}"
        )


def without_password(url: str) -> str:
    """A URL fit for logs."""
    # not by urlsplit: it sees no password in a url whose password holds a slash
    return redact(re.sub(r"(//[^:/@]*:).*@", r"\1***@", url))
