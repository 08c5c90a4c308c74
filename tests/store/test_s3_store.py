"""The S3 backend: the contract on moto, and what a failing endpoint turns into."""

import base64
import itertools
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import aiohttp
import google_crc32c
import pytest

from contracts.objects import SharedStoreContract
from penstock.common.errors import ObjectMissing, PenstockError, StoreError, Unavailable
from penstock.common.metrics import REGISTRY
from penstock.common.retries import ATTEMPTS, LONGEST_PAUSE
from penstock.store.objects import ObjectStore, open_store
from penstock.store.s3 import S3Store
from services.moto import MotoServer
from services.proxy import FaultProxy

SECRET = "not-to-be-seen-in-any-message"


@pytest.fixture
def store(bucket: str) -> S3Store:
    return S3Store(f"s3://{bucket}/some/prefix")


class TestS3Store(SharedStoreContract):
    @pytest.fixture(autouse=True)
    def _server(self, moto: MotoServer) -> None:
        self.moto = moto

    def read_raw(self, store: ObjectStore, key: str) -> bytes:
        bucket, prefix = store.url.removeprefix("s3://").split("/", 1)
        return self.moto.read(bucket, quote(f"{prefix}/{key}"))


def test_prefixes_are_apart(bucket: str) -> None:
    whole, one, other = (S3Store(f"s3://{bucket}{path}") for path in ("", "/a", "/ab/"))
    one.create("x", b"1")
    other.create("x", b"22")
    assert other.url == f"s3://{bucket}/ab"
    assert list(one.list("")) == [("x", 1)]
    assert sorted(whole.list("")) == [("a/x", 1), ("ab/x", 2)]


def test_a_listing_of_several_pages_is_whole(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    for number in range(7):
        store.create(f"{number}", b"")
    assert [key for key, _ in store.list("")] == [str(number) for number in range(7)]


def test_listings_are_never_stale(store: S3Store) -> None:
    assert list(store.list("")) == []
    assert not store.exists("a/b")
    S3Store(store.url).create("a/b", b"1")
    assert list(store.list("")) == [("a/b", 1)]
    assert store.exists("a/b")


@pytest.mark.parametrize("place", ["AWS_ENDPOINT_URL_S3", "profile"])
def test_the_endpoint_comes_from_where_botocore_looks(
    bucket: str, moto: MotoServer, aws: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    aws.delenv("AWS_ENDPOINT_URL")
    if place == "profile":
        (tmp_path / "aws-config").write_text(f"[profile mine]\nendpoint_url = {moto.url}\n")
        aws.setenv("AWS_PROFILE", "mine")
    else:
        aws.setenv(place, moto.url)
    store = open_store(f"s3://{bucket}/x")
    assert store.create("a", b"1")
    assert moto.read(bucket, "x/a") == b"1"


def test_credentials_come_from_a_profile(
    bucket: str, moto: MotoServer, aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws.delenv(name)
    (tmp_path / "aws-config").write_text(f"[profile mine]\nendpoint_url = {moto.url}\n")
    (tmp_path / "aws-credentials").write_text(
        f"[mine]\naws_access_key_id = {moto.access_key}\naws_secret_access_key = {moto.secret_key}\n"
    )
    aws.setenv("AWS_PROFILE", "mine")
    store = open_store(f"s3://{bucket}/x")
    assert store.create("a", b"1")
    assert moto.read(bucket, "x/a") == b"1"


@pytest.mark.parametrize("write", ["create", "put"])
def test_what_is_sent_carries_its_checksum_and_is_not_hashed_besides(
    proxy: FaultProxy, store: S3Store, write: str
) -> None:
    data = bytes(range(256)) * 100
    getattr(store, write)("a", data)
    head = proxy.heads[-1]
    crc32c = google_crc32c.value(data).to_bytes(4, "big")
    assert base64.b64decode(head.get("x-amz-checksum-crc32c")) == crc32c
    assert head.get("x-amz-content-sha256") == "UNSIGNED-PAYLOAD"
    assert "x-amz-checksum-crc32c" in head.get("authorization")
    assert head.get("x-amz-trailer") == head.get("content-md5") == ""
    assert head.get("if-none-match") == ("*" if write == "create" else "")


def test_what_arrives_damaged_is_sent_again(proxy: FaultProxy, store: S3Store) -> None:
    proxy.answers = iter([(400, "BadDigest")] * 2)
    assert store.create("a", b"1") is True
    assert proxy.puts("a") == 3


def test_a_large_object_goes_in_parts(proxy: FaultProxy, store: S3Store) -> None:
    """A checkpoint may be of any size."""
    data = bytes(range(256)) * 4096 * 101
    store.put("a", data)
    assert proxy.puts("a") == 3
    assert store.get("a") == data


# A reply that was lost


@pytest.mark.parametrize("lost", [1, 2, 3])
@pytest.mark.parametrize("warm", [False, True], ids=["new connection", "reused connection"])
def test_a_create_whose_reply_was_lost_knows_its_own_object(
    proxy: FaultProxy, store: S3Store, lost: int, warm: bool
) -> None:
    if warm:
        store.exists("a")
    proxy.lost_put_replies = lost
    assert store.create("a", b"1") is True
    assert proxy.puts("a") == lost + 1
    assert list(store.list("")) == [("a", 1)]


def test_a_lost_reply_does_not_claim_the_equal_object_of_another(proxy: FaultProxy, store: S3Store) -> None:
    assert S3Store(store.url).create("a", b"1")
    proxy.lost_put_replies = 1
    assert store.create("a", b"1") is False


def test_a_412_that_does_not_name_the_condition_means_exists(proxy: FaultProxy, store: S3Store) -> None:
    store.create("a", b"1")
    proxy.answers = iter([(412, "PreconditionFailed")])
    assert store.create("a", b"2") is False


# Trying again


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (500, "InternalError"),
        (502, "BadGateway"),
        (400, "RequestTimeout"),
        (409, "ConditionalRequestConflict"),
        (409, "OperationAborted"),
    ],
)
def test_a_passing_refusal_is_waited_out(proxy: FaultProxy, store: S3Store, status: int, code: str) -> None:
    proxy.answers = iter([(status, code)] * 2)
    assert store.create("a", b"1") is True
    assert proxy.puts("a") == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.put("a", b"1"),
        lambda store: store.get("a") == b"1",
        lambda store: store.exists("a"),
        lambda store: list(store.list("")) == [("a", 1)],
        lambda store: store.delete("a"),
    ],
    ids=["put", "get", "exists", "list", "delete"],
)
def test_every_call_waits_a_503_out(
    proxy: FaultProxy, store: S3Store, call: Callable[[S3Store], object]
) -> None:
    store.create("a", b"1")
    proxy.answers = iter([(503, "SlowDown")] * 2)
    before = len(proxy.requests)
    assert call(store) in (True, None)
    assert len(proxy.requests) == before + 3


def test_a_cut_download_is_read_again(proxy: FaultProxy, store: S3Store) -> None:
    data = bytes(range(256)) * 4096
    store.put("a", data)
    proxy.cut_get_replies = 2
    assert store.get("a") == data


def test_endless_503_is_unavailable(
    proxy: FaultProxy, store: S3Store, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.answers = itertools.repeat((503, "SlowDown"))
    with caplog.at_level(logging.WARNING, "penstock"), pytest.raises(Unavailable) as failure:
        store.get("a")
    check_message(failure.value, store.url, proxy.url, "HTTP 503 SlowDown", "AWS_ENDPOINT_URL")
    assert [record.message for record in caplog.records] == [
        f"{store.url}/a: HTTP 503 SlowDown; trying again"
    ] * (len(proxy.requests) - 1)


def test_pauses_may_be_simulated_and_every_retry_is_counted(proxy: FaultProxy, store: S3Store) -> None:
    pauses: list[float] = []
    store._sleep = pauses.append
    before = retries_counted("get")
    proxy.answers = itertools.repeat((503, "SlowDown"))
    with pytest.raises(Unavailable):
        store.get("a")
    assert len(proxy.requests) == ATTEMPTS
    assert len(pauses) == ATTEMPTS - 1
    assert all(0 <= pause <= LONGEST_PAUSE for pause in pauses)
    assert retries_counted("get") == before + ATTEMPTS - 1
    assert S3Store(store.url)._sleep is time.sleep


def test_what_is_not_tried_again_is_not_counted(proxy: FaultProxy, store: S3Store) -> None:
    before = retries_counted("put")
    store.put("a", b"1")
    proxy.answers = iter([(403, "AccessDenied")])
    with pytest.raises(StoreError):
        store.put("a", b"1")
    assert retries_counted("put") == before


def test_an_endpoint_that_is_down_is_unavailable_soon(bucket: str, aws: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    aws.setenv("AWS_ENDPOINT_URL", url)
    store = S3Store(f"s3://{bucket}/x")
    begin = time.monotonic()
    with pytest.raises(Unavailable) as failure:
        store.probe()
    assert time.monotonic() - begin < 15
    check_message(failure.value, store.url, url, "AWS_ENDPOINT_URL")


# Refusals that trying again does not help


@pytest.mark.parametrize("strip", ["strip_if_none_match", "strip_metadata"])
def test_probe_refuses_an_endpoint_that_cannot_settle_a_create(
    proxy: FaultProxy, store: S3Store, strip: str
) -> None:
    setattr(proxy, strip, True)
    with pytest.raises(StoreError) as refusal:
        store.probe()
    what = {
        "strip_if_none_match": "does not honour exclusive create (If-None-Match)",
        "strip_metadata": "does not keep object metadata",
    }[strip]
    check_message(refusal.value, store.url, proxy.url, what, "use another server")
    assert list(store.list("")) == []


def test_an_endpoint_that_does_not_know_the_condition_is_refused(proxy: FaultProxy, store: S3Store) -> None:
    proxy.answers = iter([(501, "NotImplemented")])
    with pytest.raises(StoreError) as refusal:
        store.probe()
    check_message(refusal.value, "does not honour exclusive create (If-None-Match)", store.url)


def test_a_missing_bucket_is_named(aws: pytest.MonkeyPatch) -> None:
    store = S3Store("s3://no-such-bucket/x")
    calls: list[Callable[[], object]] = [
        store.probe,
        lambda: store.put("a", b""),
        lambda: store.get("a"),
        lambda: list(store.list("")),
    ]
    for call in calls:
        with pytest.raises(StoreError) as refusal:
            call()
        check_message(refusal.value, store.url, "no bucket no-such-bucket", "create it")


@pytest.mark.parametrize(
    ("status", "code", "what"),
    [
        (403, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        (400, "ExpiredToken", "AWS_ACCESS_KEY_ID"),
        (403, "RequestTimeTooSkewed", "the clock"),
        (403, "AccessDenied", "s3:PutObject"),
        (400, "AuthorizationHeaderMalformed", "AWS_DEFAULT_REGION"),
    ],
)
def test_refused_credentials_are_told_at_once(
    proxy: FaultProxy, store: S3Store, status: int, code: str, what: str
) -> None:
    proxy.answers = itertools.repeat((status, code))
    with pytest.raises(StoreError) as refusal:
        store.create("a", b"1")
    check_message(refusal.value, store.url, code, what)
    assert len(proxy.requests) == 1


def test_a_denied_head_is_no_absence(proxy: FaultProxy, store: S3Store) -> None:
    proxy.answers = itertools.repeat((403, "AccessDenied"))
    with pytest.raises(StoreError, match="access denied"):
        store.exists("a")


def test_no_credentials(bucket: str, aws: pytest.MonkeyPatch) -> None:
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    store = S3Store(f"s3://{bucket}/x")
    with pytest.raises(StoreError) as refusal:
        store.probe()
    check_message(refusal.value, store.url, "AWS_ACCESS_KEY_ID", "AWS_PROFILE")


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("AWS_PROFILE", "nobody", "nobody"),
        ("AWS_ENDPOINT_URL", "not a url", "AWS_ENDPOINT_URL"),
        ("AWS_ENDPOINT_URL", f"http://user:{SECRET}@", "AWS_ENDPOINT_URL"),
    ],
)
def test_a_wrong_setting_is_named(
    bucket: str, aws: pytest.MonkeyPatch, name: str, value: str, what: str
) -> None:
    aws.setenv(name, value)
    store = S3Store(f"s3://{bucket}/x")
    with pytest.raises(StoreError) as refusal:
        store.probe()
    check_message(refusal.value, store.url, what)


@pytest.mark.parametrize("url", ["s3://", "s3:///key", "s3://bucket/a?b=c", f"s3://user:{SECRET}@bucket/a"])
def test_a_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(StoreError) as refusal:
        open_store(url)
    check_message(refusal.value, "s3://")


def test_a_missing_object_is_no_setting_to_fix(store: S3Store) -> None:
    with pytest.raises(ObjectMissing) as failure:
        store.get("a")
    assert str(failure.value) == f"{store.url}/a is missing"


def test_s3_is_imported_only_for_s3() -> None:
    code = (
        "import sys; from penstock.store.objects import open_store; open_store('.');"
        "print([name for name in ('s3fs', 'botocore', 'aiohttp') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def check_message(error: PenstockError, *parts: str) -> None:
    message = str(error)
    for part in parts:
        assert part in message
    assert "\n" not in message
    assert SECRET not in message


def retries_counted(op: str) -> float:
    return REGISTRY.get_sample_value("penstock_object_retries_total", {"op": op}) or 0.0


def test_what_a_failed_request_leaves_behind_is_no_error_of_its_own(
    store: S3Store, caplog: pytest.LogCaptureFixture
) -> None:
    """aiohttp's own tasks end with errors that nobody asks for; faults of other kinds stay to be seen."""

    def ended_with(error: Exception) -> list[str]:
        caplog.clear()
        context = {"message": "Task exception was never retrieved", "exception": error}
        store._s3.loop.call_exception_handler(context)
        return [record.levelname for record in caplog.records if record.levelno > logging.DEBUG]

    assert ended_with(aiohttp.ClientOSError(104, "Connection reset by peer")) == []
    assert ended_with(ConnectionResetError("Cannot write to closing transport")) == []
    assert ended_with(ValueError("a fault")) == ["ERROR"]
