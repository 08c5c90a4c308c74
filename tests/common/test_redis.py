"""Connections that fail say why in one line, without the password."""

import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from penstock.common.embedded import EmbeddedServer
from penstock.common.errors import ConfigError, PenstockError, Unavailable
from penstock.common.metrics import REGISTRY
from penstock.common.redis import PolicyRetry, RedisSettings, connect, without_password
from penstock.common.retries import REDIS, Bounds
from services.valkey import connected, debian_redis, kill_server

SECRET = "opensesame"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PENSTOCK_REDIS_URL", "PENSTOCK_REDIS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "valkey")
    server.wait_until_ready()
    yield server
    server.close()


@pytest.fixture
def guarded(server: EmbeddedServer) -> EmbeddedServer:
    """A server that wants a password."""
    client = connected(server)
    client.config_set("requirepass", SECRET)
    client.close()
    return server


def refusal(kind: type[PenstockError], **settings: str) -> str:
    """The message of a connection that fails."""
    with pytest.raises(kind) as caught:
        connect(RedisSettings(**settings))  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert "redis." in message
    return message


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("redis://user@host:1", "redis://user@host:1"),
        (f"redis://:{SECRET}@host:1/0", "redis://:***@host:1/0"),
        (f"rediss://user:{SECRET}@host:1/0?db=2", "rediss://user:***@host:1/0?db=2"),
        (f"unix://:{SECRET}@/run/redis.sock", "unix://:***@/run/redis.sock"),
        (f"redis://:{SECRET}/@{SECRET}@host:1", "redis://:***@host:1"),
        (f"redis://host:1/0?password={SECRET}&db=2", "redis://host:1/0?password=***&db=2"),
        (f"unix:///run/redis.sock?db=1&password={SECRET}", "unix:///run/redis.sock?db=1&password=***"),
    ],
)
def test_without_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_no_url_names_the_ways_to_give_one() -> None:
    message = refusal(ConfigError)
    assert "redis.url: not set" in message
    assert "PENSTOCK_REDIS_URL" in message
    assert "penstock run" in message


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        f"http://:{SECRET}@localhost",
        f"redis://:{SECRET}@localhost:port",
        f"redis://:{SECRET}/x@localhost:1",
        f"redis://:{SECRET}#x@localhost:1",
        f"redis://:{SECRET}@[::1",
        "redis://localhost:1?db=first",
        f"redis://:{SECRET}@localhost:1?no_such_option=1",
    ],
)
def test_a_bad_url_is_a_setting_to_change(url: str) -> None:
    message = refusal(ConfigError, url=url)
    assert message.startswith("redis.url: ")
    assert SECRET not in message


@pytest.mark.parametrize(
    "where", [f":{SECRET}@127.0.0.1:{{port}}/0", f"127.0.0.1:{{port}}/0?password={SECRET}"]
)
def test_nothing_listening(where: str) -> None:
    port = closed_port()
    message = refusal(Unavailable, url="redis://" + where.format(port=port))
    assert f"127.0.0.1:{port}" in message
    assert SECRET not in message


def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    assert str(tmp_path / "none.sock") in refusal(Unavailable, url=f"unix://{tmp_path / 'none.sock'}")


def test_a_wrong_password_is_not_repeated(guarded: EmbeddedServer, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("not-the-one\n")
    for settings in (
        {"url": guarded.url},
        {"url": guarded.url, "password_file": str(tmp_path / "password")},
        {"url": guarded.url.replace("unix://", "unix://:not-the-one@")},
    ):
        message = refusal(Unavailable, **settings)
        assert "not-the-one" not in message
        assert "auth" in message.lower() or "password" in message.lower()


def test_the_password_comes_from_a_file(guarded: EmbeddedServer, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(f"{SECRET}\n")
    client = connect(RedisSettings(url=guarded.url, password_file=str(tmp_path / "password")))
    assert client.ping()
    client.close()


def test_the_password_comes_from_the_environment(
    guarded: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_REDIS_PASSWORD", SECRET)
    client = connect(RedisSettings(url=guarded.url))
    assert client.ping()
    client.close()


def test_a_missing_password_file_is_named(server: EmbeddedServer, tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    assert path in refusal(ConfigError, url=server.url, password_file=path)


def test_the_environment_overrides_the_url(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_REDIS_URL", server.url)
    client = connect(RedisSettings(url="redis://127.0.0.1:1"))
    assert client.ping()
    client.close()


# The server itself


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "allkeys-random"])
def test_a_server_that_may_evict_is_refused(server: EmbeddedServer, policy: str) -> None:
    client = connected(server)
    client.config_set("maxmemory-policy", policy)
    client.close()
    message = refusal(ConfigError, url=server.url)
    assert message.startswith(f"redis.url: {server.url} has maxmemory-policy {policy}")
    assert "set maxmemory-policy noeviction" in message


def test_the_refusal_does_not_repeat_the_password(guarded: EmbeddedServer) -> None:
    url = guarded.url.replace("unix://", f"unix://:{SECRET}@")
    client = connect(RedisSettings(url=url))
    client.config_set("maxmemory-policy", "allkeys-lfu")
    client.close()
    message = refusal(ConfigError, url=url)
    assert SECRET not in message
    assert "unix://:***@" in message


def pretend(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """Let servers say other things of themselves; None leaves a fact out."""
    honest = redis.Redis.info

    def info(client: redis.Redis, section: str) -> dict[str, Any]:
        told: Any = honest(client, section)
        return {key: facts.get(key, value) for key, value in told.items() if facts.get(key, "") is not None}

    monkeypatch.setattr(redis.Redis, "info", info)


@pytest.mark.parametrize("version", ["2.8.24", "5.0.14", "6.0.20", 6.1])
def test_an_old_server_is_refused(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, version: object
) -> None:
    pretend(monkeypatch, redis_version=version)
    message = refusal(ConfigError, url=server.url)
    assert message.startswith(f"redis.url: {server.url} is Redis {version}; use Redis 6.2 or newer")


@pytest.mark.parametrize("version", ["6.2.0", 6.2, "7.2.4", 7.4, "8.1.240", "10.0.0", "255.255.255"])
def test_a_newer_server_is_taken(
    server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: object,
) -> None:
    pretend(monkeypatch, redis_version=version)
    connect(RedisSettings(url=server.url)).close()
    assert caplog.records == []


@pytest.mark.parametrize("fact", ["maxmemory_policy", "redis_version"])
def test_what_a_server_does_not_say_is_warned_of(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fact: str
) -> None:
    pretend(monkeypatch, **{fact: None})
    with caplog.at_level(logging.WARNING, "penstock"):
        connect(RedisSettings(url=server.url)).close()
    (record,) = caplog.records
    assert fact.split("_")[-1] in record.message
    assert server.url in record.message


def test_a_server_that_refuses_to_speak_of_itself_is_warned_of(
    server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    client = connected(server)
    client.acl_setuser(
        "default", enabled=True, nopass=True, keys="*", categories=["+@all"], commands=["-info"]
    )
    client.close()
    with caplog.at_level(logging.WARNING, "penstock"):
        connect(RedisSettings(url=server.url)).close()
    assert len(caplog.records) == 2


# Trying again


def retries_counted() -> float:
    return REGISTRY.get_sample_value("penstock_redis_retries_total") or 0.0


def test_a_command_of_a_dead_server_is_tried_within_the_bounds(server: EmbeddedServer) -> None:
    client = connected(server)
    kill_server(server)
    before, began = retries_counted(), time.monotonic()
    with pytest.raises(redis.ConnectionError):
        client.get("a")
    # connecting anew inside the command is no retry of its own
    assert retries_counted() == before + REDIS.attempts - 1
    assert time.monotonic() - began < (REDIS.attempts - 1) * REDIS.longest_pause + 1
    assert server.ensure()
    server.wait_until_ready()
    assert client.get("a") is None
    client.close()


def test_what_passes_is_counted_and_not_seen() -> None:
    before, calls = retries_counted(), itertools.count(1)

    def do() -> int:
        if (call := next(calls)) < 3:
            raise redis.TimeoutError("slow")
        return call

    assert PolicyRetry().call_with_retry(do, lambda error: None) == 3
    assert retries_counted() == before + 2


def test_a_server_that_hangs_is_given_up_by_time(server: EmbeddedServer) -> None:
    client = connect(RedisSettings(url=f"{server.url}?socket_timeout=0.3"))
    os.kill(server.server_pid, signal.SIGSTOP)
    try:
        client.connection_pool.reset()
        client.set_retry(PolicyRetry(Bounds(attempts=100, last_attempt_after=1.0, longest_pause=0.01)))
        began = time.monotonic()
        with pytest.raises(redis.TimeoutError):
            client.get("a")
        assert 0.9 < time.monotonic() - began < 3
    finally:
        os.kill(server.server_pid, signal.SIGCONT)
    client.close()


def test_a_wrong_password_is_not_tried_again(guarded: EmbeddedServer) -> None:
    before = retries_counted()
    refusal(Unavailable, url=guarded.url)
    assert retries_counted() == before


def test_a_refused_command_is_not_tried_again(server: EmbeddedServer) -> None:
    client = connected(server)
    before = retries_counted()
    with pytest.raises(redis.ResponseError):
        client.execute_command("NOSUCHCOMMAND")
    assert retries_counted() == before
    client.close()


def test_a_call_inside_a_call_is_not_tried_again_by_itself() -> None:
    policy = PolicyRetry(Bounds(attempts=3, longest_pause=0.0))
    calls = itertools.count(1)

    def do() -> None:
        raise redis.ConnectionError(f"call {next(calls)}")

    def connect_and_do() -> None:
        policy.call_with_retry(do, lambda error: None)

    with pytest.raises(redis.ConnectionError, match=r"^call 3$"):
        policy.call_with_retry(connect_and_do, lambda error: None)


@pytest.mark.parametrize("counted", [False, True])
def test_every_failure_is_handed_to_the_library(counted: bool) -> None:
    policy = PolicyRetry(Bounds(attempts=3, longest_pause=0.0))
    calls, failures = itertools.count(1), list[object]()

    def do() -> None:
        raise redis.ConnectionError(f"call {next(calls)}")

    def fail(error: Exception, number: int | None = None) -> None:
        failures.append((str(error), number))

    with pytest.raises(redis.ConnectionError, match="call 3"):
        policy.call_with_retry(do, fail, with_failure_count=counted)
    assert failures == [(f"call {n}", n if counted else None) for n in (1, 2, 3)]


def test_the_library_may_end_the_tries() -> None:
    policy, calls = PolicyRetry(), itertools.count(1)

    def do() -> None:
        raise redis.ConnectionError(f"call {next(calls)}")

    def fail(error: Exception) -> None:
        raise redis.ConnectionError("ended")

    with pytest.raises(redis.ConnectionError, match=r"^ended$"):
        policy.call_with_retry(do, fail)
    with pytest.raises(redis.ConnectionError, match=r"^call 2$"):
        policy.call_with_retry(do, fail, is_retryable=lambda error: False)
    # and the next call is tried again as ever
    quick = PolicyRetry(Bounds(attempts=2, longest_pause=0.0))
    with pytest.raises(redis.ConnectionError, match=r"^call 4$"):
        quick.call_with_retry(do, lambda error: None)


@pytest.mark.services
def test_debian_redis_wants_its_password() -> None:
    with debian_redis("--requirepass", SECRET) as url:
        refusal(Unavailable, url=url)
        client = connect(RedisSettings(url=url.replace("unix://", f"unix://:{SECRET}@")))
        assert client.ping()
        client.close()
