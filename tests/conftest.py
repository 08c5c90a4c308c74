"""What the tests of several rooms share: Redis and S3 servers, one start per session."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from penstock.common.embedded import EmbeddedServer
from penstock.common.logs import LOGGER
from penstock.common.redis import Client, RedisSettings, connect
from services.ceph import CephGateway
from services.moto import MotoServer
from services.proxy import FaultProxy
from services.s3_server import S3Server
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


@pytest.fixture(scope="session")
def moto() -> Iterator[MotoServer]:
    with MotoServer() as server:
        yield server


@pytest.fixture(scope="session")
def ceph() -> Iterator[CephGateway]:
    """Real S3; a test that kills it starts it again."""
    with CephGateway() as server:
        yield server


@pytest.fixture(scope="session", params=["moto", pytest.param("ceph", marks=pytest.mark.services)])
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    """Each S3 server that we have, in turn."""
    server: S3Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def clean_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Nothing of this machine's own AWS settings."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    return monkeypatch


@pytest.fixture
def aws(moto: MotoServer, clean_aws: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a user of moto."""
    for name, value in moto.environment().items():
        clean_aws.setenv(name, value)
    return clean_aws


@pytest.fixture
def bucket(moto: MotoServer, aws: pytest.MonkeyPatch) -> str:
    return moto.make_bucket()


@pytest.fixture
def proxy(moto: MotoServer, aws: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the server, which the environment now names as the endpoint."""
    with FaultProxy(moto.url) as running:
        aws.setenv("AWS_ENDPOINT_URL", running.url)
        yield running
