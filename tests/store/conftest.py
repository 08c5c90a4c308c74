"""S3 for the store's tests: a server per session, a bucket and a clean AWS environment per test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.ceph import CephGateway
from services.moto import MotoServer
from services.proxy import FaultProxy
from services.s3_server import S3Server


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
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
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
