"""Connections that fail say why in one line, without the password; the embedded server keeps its data."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.common.embedded import EmbeddedServer
from penstock.common.errors import ConfigError, PenstockError, Unavailable
from penstock.common.redis import RedisSettings, connect, without_password
from services.valkey import connected, debian_redis, fresh_prefix

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
    server.process.kill()
    server.process.wait()
    assert server.ensure()
    server.wait_until_ready()
    assert client.get(key) == "kept"
    client.close()


def test_close_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    server.wait_until_ready()
    assert server.socket.exists()
    server.close()
    assert server.process.poll() == 0
    assert not server.socket.parent.exists()


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


@pytest.mark.services
def test_debian_redis_wants_its_password() -> None:
    with debian_redis("--requirepass", SECRET) as url:
        refusal(Unavailable, url=url)
        client = connect(RedisSettings(url=url.replace("unix://", f"unix://:{SECRET}@")))
        assert client.ping()
        client.close()
