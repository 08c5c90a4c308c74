"""What the tests of several rooms share: Redis servers, one start per session."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings

from penstock.common.embedded import EmbeddedServer
from penstock.common.logs import LOGGER
from penstock.common.redis import Client, RedisSettings, connect
from services.valkey import debian_redis, fresh_prefix, valkey_server

pytest.register_assert_rewrite("contracts.objects", "contracts.race")

# libraries that tests load raise the root logger's level
LOGGER.setLevel(logging.INFO)

# a loaded machine is slow, which is no fault; what is found must be found again
settings.register_profile("penstock", deadline=None, derandomize=True)
settings.load_profile("penstock")


@pytest.fixture(scope="session")
def valkey() -> Iterator[EmbeddedServer]:
    """The embedded server, shared: keep to your own prefix."""
    with valkey_server() as server:
        yield server


@pytest.fixture(scope="session", params=["valkey", pytest.param("redis", marks=pytest.mark.services)])
def redis_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each server that we have, in turn."""
    if request.param == "valkey":
        yield request.getfixturevalue("valkey").url
    else:
        with debian_redis() as url:
            yield url


@pytest.fixture
def client(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A connected client."""
    for name in ("PENSTOCK_REDIS_URL", "PENSTOCK_REDIS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    connection = connect(RedisSettings(url=redis_url))
    yield connection
    connection.close()


@pytest.fixture
def prefix() -> str:
    """A key prefix that no other test uses."""
    return fresh_prefix()
