"""S3 over TLS: certificates are verified, and nothing is sent that an older server does not understand."""

import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.common.errors import StoreError
from penstock.store.s3 import S3Store
from services.s3_server import S3Server
from services.tls import TlsProxy


@pytest.fixture
def tls(s3_server: S3Server, clean_aws: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TlsProxy]:
    """An https endpoint in front of each server, which the environment names."""
    with TlsProxy(s3_server.url, tmp_path) as proxy:
        for name, value in s3_server.environment(proxy.url).items():
            clean_aws.setenv(name, value)
        yield proxy


@pytest.fixture
def store(s3_server: S3Server, tls: TlsProxy) -> S3Store:
    return S3Store(f"s3://{s3_server.make_bucket()}/x")


def test_an_unknown_certificate_is_refused_at_once(store: S3Store, tls: TlsProxy) -> None:
    with pytest.raises(StoreError) as refusal:
        store.probe()
    message = str(refusal.value)
    for word in (store.url, f"certificate of {tls.url} is not trusted", "AWS_CA_BUNDLE"):
        assert word in message
    assert "\n" not in message
    assert tls.sent == [], "nothing is sent to whom one does not trust"


@pytest.mark.parametrize("place", ["environment", "profile"])
def test_a_known_certificate_is_taken(
    store: S3Store, tls: TlsProxy, clean_aws: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    if place == "environment":
        clean_aws.setenv("AWS_CA_BUNDLE", str(tls.certificate))
    else:
        (tmp_path / "aws-config").write_text(f"[profile mine]\nca_bundle = {tls.certificate}\n")
        clean_aws.setenv("AWS_PROFILE", "mine")
    trusting = S3Store(store.url)
    trusting.probe()
    data = bytes(range(256)) * 4096
    assert trusting.create("a", data)
    assert not trusting.create("a", b"")
    trusting.put("b", data)
    assert trusting.get("a") == trusting.get("b") == data
    sent = b"".join(tls.sent)
    # Ceph 16 and others know no trailers
    assert b"UNSIGNED-PAYLOAD" in sent
    assert b"UNSIGNED-PAYLOAD-TRAILER" not in sent
    assert b"aws-chunked" not in sent


def test_another_authority_does_not_help(
    store: S3Store, clean_aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = ssl.get_default_verify_paths().cafile
    if other is None:
        (tmp_path / "other").mkdir()
        other = str(TlsProxy("http://127.0.0.1:1", tmp_path / "other").certificate)
    shutil.copy(other, tmp_path / "others.pem")
    clean_aws.setenv("AWS_CA_BUNDLE", str(tmp_path / "others.pem"))
    with pytest.raises(StoreError, match="AWS_CA_BUNDLE"):
        S3Store(store.url).probe()


def test_a_missing_authority_file_is_named(store: S3Store, clean_aws: pytest.MonkeyPatch) -> None:
    clean_aws.setenv("AWS_CA_BUNDLE", "/no/such/file.pem")
    with pytest.raises(StoreError, match="AWS_CA_BUNDLE") as refusal:
        S3Store(store.url).probe()
    assert "/no/such/file.pem" in str(refusal.value)
