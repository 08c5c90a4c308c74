"""Objects in an S3 bucket, through synchronous s3fs.

Exclusive create is `PUT` with `If-None-Match: *`. A reply can be lost after the object landed, and
every layer below repeats a PUT on its own (aiohttp does so silently on a reused connection), so a
creator may be told that its own object exists. Each create therefore writes a fresh token into the
object's metadata: on "exists", the object is ours if and only if it carries our token.

Stored bytes carry checksums of their own, which every reader compares, so replies are not checked a second
time. What is sent carries its crc32c in a header, which servers that know it compare before they store; the
payload is not hashed for the signature besides (docs/decisions/015-s3-client.md has the figures).

Credentials, region and endpoint come from wherever botocore finds them: the `AWS_*` environment
variables (`AWS_ENDPOINT_URL` or `AWS_ENDPOINT_URL_S3` for a server that is not Amazon's), profiles
and instance roles. Everything tried again is tried again here, by the policy of `common/retries.py`.
"""

import asyncio
import base64
import functools
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiobotocore.session
import aiohttp
import google_crc32c
import s3fs

from penstock.common import metrics
from penstock.common.errors import StoreError
from penstock.common.redact import redact
from penstock.common.retries import retrying
from penstock.store.objects import ObjectStore
from penstock.store.s3_errors import Where, brief, code, explain, is_transient, status, without_secrets

_CONNECT_TIMEOUT = 5.0  # seconds
_READ_TIMEOUT = 30.0  # seconds without a byte, counted from the end of the upload

_TOKEN = "penstock-create"  # user metadata: who made the object; never part of its bytes

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@functools.cache
def _descriptions() -> object:
    """What botocore knows of services, read once: half of what opening another store would take."""
    return aiobotocore.session.AioSession().get_component("data_loader")


def _session() -> aiobotocore.session.AioSession:
    """A session of its own for each store: it keeps the credentials that it once found."""
    session = aiobotocore.session.AioSession()
    session.register_component("data_loader", _descriptions())
    return session


def _left_behind(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A task of a failed request ended with an error: the request itself told whoever asked."""
    if isinstance(context.get("exception"), (aiohttp.ClientError, OSError)):
        _log.debug("%s: %r", context["message"], context["exception"])
    else:
        loop.default_exception_handler(context)


class S3Store(ObjectStore):
    """Objects below `s3://bucket/prefix`.

    Raises:
        StoreError: the URL is not of that form.
    """

    _sleep: Callable[[float], None] = staticmethod(time.sleep)
    """How pauses between attempts are made; replaced where time is simulated."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if "@" in parts.netloc:
            # The URL is not repeated: what stands before the @ is a secret.
            raise StoreError(
                "an s3:// URL carries no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
            )
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise StoreError(f"{redact(url)}: not an object store URL; write s3://bucket/prefix")
        self._bucket = parts.netloc
        self._prefix = f"{path}/" if (path := parts.path.strip("/")) else ""
        self.url = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self._s3 = s3fs.S3FileSystem(
            session=_session(),
            # A cached instance would keep the endpoint and credentials of an earlier environment.
            skip_instance_cache=True,
            # A cached listing hides what other processes wrote.
            use_listings_cache=False,
            config_kwargs={
                "connect_timeout": _CONNECT_TIMEOUT,
                "read_timeout": _READ_TIMEOUT,
                "retries": {"total_max_attempts": 1},
                # The defaults cost a quarter of an upload's speed, and over TLS send chunks with trailers,
                # which servers of a few years ago do not understand.
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "s3": {"payload_signing_enabled": False},
            },
        )
        self._s3.retries = 1
        self._s3.loop.set_exception_handler(_left_behind)

    def _create(self, key: str, data: bytes) -> bool:
        return self._create_as(uuid.uuid4().hex, key, data)

    def _create_as(self, token: str, key: str, data: bytes) -> bool:
        def attempt() -> bool:
            try:
                self._send(key, data, mode="create", Metadata={_TOKEN: token})
            except Exception as error:
                # s3fs raises FileExistsError only where the reply names the condition.
                if status(error) != 412:
                    raise
            else:
                return True
            head = self._head(key)
            return head is not None and head["Metadata"].get(_TOKEN) == token

        return self._call("create", key, attempt)

    def put(self, key: str, data: bytes) -> None:
        self._call("put", key, lambda: self._send(key, data))

    def get(self, key: str) -> bytes:
        # One stream is one request: more of them ask for the size first.
        path = self._path(key)
        data: bytes = self._call("get", key, lambda: self._s3.cat_file(path, max_concurrency=1))
        return data

    def exists(self, key: str) -> bool:
        return self._call("head", key, lambda: self._head(key)) is not None

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        for page in self._pages(prefix):
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # a console's "folder", not an object of ours
                    yield entry["Key"].removeprefix(self._prefix), entry["Size"]

    def folders(self, prefix: str) -> set[str]:
        found = (
            entry for page in self._pages(prefix, Delimiter="/") for entry in page.get("CommonPrefixes", ())
        )
        return {entry["Prefix"].removeprefix(self._prefix + prefix).rstrip("/") for entry in found}

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        request = {"Bucket": self._bucket, "Prefix": self._prefix + prefix, **options}
        while True:
            page = self._call("list", prefix, lambda: self._s3.call_s3("list_objects_v2", **request))
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        def attempt() -> None:
            try:
                self._s3.call_s3("delete_object", Bucket=self._bucket, Key=self._prefix + key)
            except Exception as error:
                if code(error) != "NoSuchKey":
                    raise

        self._call("delete", key, attempt)

    def make_bucket(self) -> tuple[str, bool]:
        """Create this store's bucket unless it is there; its URL, and whether it is new.

        Raises:
            StoreError: the server or the credentials do not allow it.
        """

        def attempt() -> bool:
            try:
                self._s3.call_s3("head_bucket", Bucket=self._bucket)
            except FileNotFoundError:
                region = self._s3.s3.meta.region_name
                # Amazon wants the region to be said, unless it is the first one, which must not be
                where = {} if region in (None, "us-east-1", "aws-global") else {"LocationConstraint": region}
                more = {"CreateBucketConfiguration": where} if where else {}
                try:
                    self._s3.call_s3("create_bucket", Bucket=self._bucket, **more)
                except FileExistsError:  # by another, in between
                    return False
                return True
            return False

        return f"s3://{self._bucket}", self._call("create", self._bucket, attempt)

    def probe(self) -> None:
        key, token = f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex
        first = self._create_as(token, key, b"1")
        try:
            recognised = self._create_as(token, key, b"2")
            second = self._create(key, b"3")
            if not first or second or self.get(key) != b"1":
                raise StoreError(
                    f"{self.url}: {self._endpoint()} does not honour exclusive create "
                    "(If-None-Match), so workers would overwrite each other; use another server"
                )
            if not recognised:
                raise StoreError(
                    f"{self.url}: {self._endpoint()} does not keep object metadata, which settles "
                    "a create whose reply was lost; use another server"
                )
        finally:
            self.delete(key)

    def _send(self, key: str, data: bytes, **options: Any) -> None:
        checksum = base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
        self._s3.pipe_file(self._path(key), data, ChecksumCRC32C=checksum, **options)

    def _path(self, key: str) -> str:
        return f"{self._bucket}/{self._prefix}{key}"

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = self._s3.call_s3(
                "head_object", Bucket=self._bucket, Key=self._prefix + key
            )
        except FileNotFoundError:
            return None
        return head

    def _call(self, op: str, key: str, call: Callable[[], _T]) -> _T:
        """Call, again while that may help; then one clear error in place of the library's."""

        def tell(error: BaseException) -> None:
            metrics.object_retries.labels(op).inc()
            _log.warning("%s/%s: %s; trying again", self.url, key, brief(error))

        try:
            return retrying(is_transient, tell, self._sleep)(call)
        except Exception as error:
            where = Where(self.url, self._bucket, key, self._endpoint)
            explained = explain(error, where)
            if explained is None:
                raise
            raise explained from error

    def _endpoint(self) -> str:
        # Only called once a request was answered or sent, so the client exists.
        return without_secrets(str(self._s3.s3.meta.endpoint_url))
