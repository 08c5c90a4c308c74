"""`penstock bucket`."""

import uuid

import pytest

from services.command import assert_one_clear_line, called, penstock
from services.moto import MotoServer


@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize("region", ["us-east-1", "eu-west-1"])
def test_it_is_made_once(
    moto: MotoServer, region: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", region)
    name = f"made-{uuid.uuid4().hex[:8]}"
    assert called("bucket", f"s3://{name}/below") == 0
    assert capsys.readouterr().out == f"s3://{name} created\n"
    assert moto.keys(name) == []
    assert called("bucket", f"s3://{name}") == 0
    assert capsys.readouterr().out == f"s3://{name} was there before\n"


def test_what_is_no_bucket_is_refused() -> None:
    assert_one_clear_line(penstock("bucket", "somewhere/else"), "somewhere/else", "s3://bucket")


def test_a_server_that_cannot_be_is_refused(moto: MotoServer) -> None:
    environment = moto.environment() | {"AWS_ENDPOINT_URL": "not a url"}
    assert_one_clear_line(penstock("bucket", "s3://some", env=environment), "s3://some", "AWS_ENDPOINT_URL")
