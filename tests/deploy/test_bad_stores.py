"""Object stores that cannot be used: one clear line for every command that would write, nothing written."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.deploy.cli import main
from penstock.store.layout import FORMAT_VERSION, MANIFEST
from penstock.store.objects import ObjectStore, open_store
from penstock.store.records import encode_record
from services.ceph import CephGateway
from services.command import called, small_config, write_config
from services.moto import MotoServer
from services.proxy import FaultProxy
from services.s3_server import S3Server

Spoil = Callable[[FaultProxy, pytest.MonkeyPatch], None]

WRITERS = ["corpus", "produce", "submit", "train", "run"]
PLACES = {"corpus": "corpus", "produce": "dataset", "submit": "runs", "train": "runs", "run": "runs"}
"""What is on the bad store; all else is well, on files."""


def always(status: int, code: str) -> Spoil:
    def spoil(proxy: FaultProxy, env: pytest.MonkeyPatch) -> None:
        proxy.answers = itertools.repeat((status, code))

    return spoil


def ignore_conditions(proxy: FaultProxy, env: pytest.MonkeyPatch) -> None:
    proxy.strip_if_none_match = True


def no_credentials(proxy: FaultProxy, env: pytest.MonkeyPatch) -> None:
    env.delenv("AWS_ACCESS_KEY_ID")
    env.delenv("AWS_SECRET_ACCESS_KEY")


FAULTS: dict[str, tuple[Spoil, list[str]]] = {
    "a wrong key": (always(403, "InvalidAccessKeyId"), ["InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"]),
    "a wrong secret": (
        always(403, "SignatureDoesNotMatch"),
        ["SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"],
    ),
    "an expired token": (always(400, "ExpiredToken"), ["ExpiredToken", "AWS_SESSION_TOKEN"]),
    "no credentials": (no_credentials, ["no usable credentials", "AWS_PROFILE"]),
    "no access": (always(403, "AccessDenied"), ["access denied", "s3:PutObject"]),
    "conditions ignored": (ignore_conditions, ["does not honour exclusive create", "use another server"]),
}


@pytest.fixture
def work(small_run: Path, tmp_path: Path, valkey_url: str) -> dict[str, Any]:
    """The config of an experiment whose corpus and dataset are there, with an external Redis."""
    config = small_config(tmp_path / "work")
    config["corpus"]["url"] = str(small_run / "corpus")
    config["dataset"]["url"] = str(small_run / "dataset")
    config["redis"] = {"url": valkey_url, "prefix": f"bad-{tmp_path.name}"}
    return config


def put_at(config: dict[str, Any], what: str, url: str) -> None:
    if what == "runs":
        config["runs_url"] = url
    else:
        config[what]["url"] = url


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    lines = [line for line in err.strip().splitlines() if line.startswith("error: ")]
    assert end.value.code == 2, err
    assert "Traceback" not in err + out
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", WRITERS)
def test_a_store_that_cannot_be_written(
    moto: MotoServer,
    bucket: str,
    proxy: FaultProxy,
    aws: pytest.MonkeyPatch,
    work: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    fault: str,
) -> None:
    spoil, words = FAULTS[fault]
    put_at(work, PLACES[command], f"s3://{bucket}/x")
    spoil(proxy, aws)
    line = refused(capsys, command, write_config(tmp_path / "config.yaml", work))
    for word in [f"s3://{bucket}/x", *words]:
        assert word in line
    assert moto.keys(bucket) == []


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.usefixtures("aws")
def test_a_missing_bucket(
    work: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    put_at(work, PLACES[command], "s3://no-such-bucket/x")
    line = refused(capsys, command, write_config(tmp_path / "config.yaml", work))
    assert "has no bucket no-such-bucket; create it or correct the URL" in line


@pytest.fixture
def remote(small_run: Path, bucket: str) -> ObjectStore:
    """A finished dataset on S3."""
    local, store = open_store(str(small_run / "dataset")), open_store(f"s3://{bucket}/dataset")
    for key, _ in local.list(""):
        if not key.startswith("provenance/"):
            store.create(key, local.get(key))
    return store


@pytest.fixture
def unchanged(moto: MotoServer, bucket: str, remote: ObjectStore) -> Iterator[None]:
    """Nothing may be written; what the test itself does to the manifest, it checks."""

    def stored() -> dict[str, bytes]:
        return {key: moto.read(bucket, key) for key in moto.keys(bucket) if "/manifest." not in key}

    before = stored()
    yield
    assert stored() == before


@pytest.mark.parametrize("command", ["produce", "submit", "run", "inspect", "verify"])
@pytest.mark.usefixtures("unchanged")
def test_a_dataset_of_a_newer_format(
    remote: ObjectStore,
    work: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    newer = remote.get_record(MANIFEST) | {"format_version": FORMAT_VERSION + 1, "more": [1]}
    remote.put_guarded(MANIFEST, newer)
    put_at(work, "dataset", remote.url)
    config = write_config(tmp_path / "config.yaml", work)
    line = refused(capsys, command, remote.url if command in ("inspect", "verify") else config)
    for word in (remote.url, f"format version {FORMAT_VERSION + 1}", "upgrade penstock"):
        assert word in line
    assert remote.get(MANIFEST) == encode_record(newer)


@pytest.mark.usefixtures("unchanged")
def test_status_tells_a_newer_format_beside_everything_else(
    remote: ObjectStore, work: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote.put_guarded(MANIFEST, remote.get_record(MANIFEST) | {"format_version": FORMAT_VERSION + 1})
    put_at(work, "dataset", remote.url)
    assert called("status", str(write_config(tmp_path / "config.yaml", work))) == 0
    told = capsys.readouterr().out
    for word in (remote.url, f"format version {FORMAT_VERSION + 1}", "upgrade penstock", "redis:"):
        assert word in told


@pytest.mark.parametrize("command", ["produce", pytest.param("run", marks=pytest.mark.long)])
@pytest.mark.usefixtures("unchanged")
def test_two_plans_at_one_url(
    remote: ObjectStore,
    work: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    manifest = remote.get(MANIFEST)
    put_at(work, "dataset", remote.url)
    work["dataset"]["seed"] = 7
    line = refused(capsys, command, write_config(tmp_path / "config.yaml", work))
    for word in (remote.url, "another dataset", "seed is 0 there and 7 here"):
        assert word in line
    assert remote.get(MANIFEST) == manifest


@pytest.mark.services
@pytest.mark.parametrize(
    ("access_key", "secret_key", "words"),
    [
        ("nobody", S3Server.secret_key, ["InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"]),
        (S3Server.access_key, "wrong", ["SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"]),
    ],
)
@pytest.mark.parametrize("command", ["corpus", "train"])
def test_wrong_credentials_on_ceph(
    ceph: CephGateway,
    clean_aws: pytest.MonkeyPatch,
    work: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    access_key: str,
    secret_key: str,
    words: list[str],
) -> None:
    bucket = ceph.make_bucket()
    for name, value in ceph.environment(access_key=access_key, secret_key=secret_key).items():
        clean_aws.setenv(name, value)
    put_at(work, PLACES[command], f"s3://{bucket}/x")
    line = refused(capsys, command, write_config(tmp_path / "config.yaml", work))
    for word in [f"s3://{bucket}/x", *words]:
        assert word in line
    assert ceph.keys(bucket) == []


@pytest.mark.services
@pytest.mark.parametrize("command", WRITERS)
def test_a_reader_who_writes_on_ceph(
    ceph: CephGateway,
    clean_aws: pytest.MonkeyPatch,
    work: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    bucket = ceph.make_bucket()
    for name, value in ceph.make_reader(bucket).items():
        clean_aws.setenv(name, value)
    put_at(work, PLACES[command], f"s3://{bucket}/x")
    line = refused(capsys, command, write_config(tmp_path / "config.yaml", work))
    for word in (f"s3://{bucket}/x", "access denied", "s3:PutObject"):
        assert word in line
    assert ceph.keys(bucket) == []
