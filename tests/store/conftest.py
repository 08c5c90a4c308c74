"""S3 for the store's tests: one moto server, a bucket and a clean AWS environment per test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.moto import MotoServer
from services.proxy import FaultProxy

pytest.register_assert_rewrite("contracts.objects")

SECRET = "not-to-be-seen-in-any-message"


@pytest.fixture(scope="session")
def moto() -> Iterator[MotoServer]:
    with MotoServer() as server:
        yield server


@pytest.fixture
def aws(moto: MotoServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The environment of a user of that server, and nothing of this machine's own."""
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    return monkeypatch


@pytest.fixture
def bucket(moto: MotoServer, aws: pytest.MonkeyPatch) -> str:
    return moto.make_bucket()


@pytest.fixture
def proxy(moto: MotoServer, aws: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the server, which the environment now names as the endpoint."""
    with FaultProxy(moto.url) as running:
        aws.setenv("AWS_ENDPOINT_URL", running.url)
        yield running
