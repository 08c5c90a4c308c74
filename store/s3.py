"""Objects in an S3 bucket, through synchronous s3fs.

Exclusive create is `PUT` with `If-None-Match: *`. A reply can be lost after the object landed, and
every layer below repeats a PUT on its own (aiohttp does so silently on a reused connection), so a
creator may be told that its own object exists. Each create therefore writes a fresh token into the
object's metadata: on "exists", the object is ours if and only if it carries our token.

Credentials, region and endpoint come from wherever botocore finds them: the `AWS_*` environment
variables (`AWS_ENDPOINT_URL` or `AWS_ENDPOINT_URL_S3` for a server that is not Amazon's), profiles
and instance roles. Everything tried again is tried again here, by the policy of `common/retries.py`.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import s3fs
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from penstock.common import metrics
from penstock.common.errors import (
    DamagedObject,
    ObjectMissing,
    PenstockError,
    StoreError,
    Unavailable,
)
from penstock.common.retries import retrying
from penstock.store.objects import ObjectStore

_CONNECT_TIMEOUT = 5.0  # seconds
_READ_TIMEOUT = 30.0  # seconds without a byte, counted from the end of the upload

_TOKEN = "penstock-create"  # user metadata: who made the object; never part of its bytes

_TRANSIENT_STATUS = {408, 409, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable"}
_TRANSIENT_ERRORS = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    ResponseParserError,  # a load balancer's page in place of S3's XML
    boto.FlexibleChecksumError,
    aiohttp.ClientError,
    TimeoutError,
    ConnectionError,
)
_CREDENTIAL_CODES = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


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
            raise StoreError(f"{url}: not an object store URL; write s3://bucket/prefix")
        self._bucket = parts.netloc
        self._prefix = f"{path}/" if (path := parts.path.strip("/")) else ""
        self.url = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self._s3 = s3fs.S3FileSystem(
            # A cached instance would keep the endpoint and credentials of an earlier environment.
            skip_instance_cache=True,
            # A cached listing hides what other processes wrote.
            use_listings_cache=False,
            config_kwargs={
                "connect_timeout": _CONNECT_TIMEOUT,
                "read_timeout": _READ_TIMEOUT,
                "retries": {"total_max_attempts": 1},
            },
        )
        self._s3.retries = 1

    def _create(self, key: str, data: bytes) -> bool:
        return self._create_as(uuid.uuid4().hex, key, data)

    def _create_as(self, token: str, key: str, data: bytes) -> bool:
        def attempt() -> bool:
            try:
                self._s3.pipe_file(self._path(key), data, mode="create", Metadata={_TOKEN: token})
            except Exception as error:
                # s3fs raises FileExistsError only where the reply names the condition.
                if _status(error) != 412:
                    raise
            else:
                return True
            head = self._head(key)
            return head is not None and head["Metadata"].get(_TOKEN) == token

        return self._call("create", key, attempt)

    def put(self, key: str, data: bytes) -> None:
        self._call("put", key, lambda: self._s3.pipe_file(self._path(key), data))

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
                if _code(error) != "NoSuchKey":
                    raise

        self._call("delete", key, attempt)

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
            _log.warning("%s/%s: %s; trying again", self.url, key, _brief(error))

        try:
            return retrying(_is_transient, tell, self._sleep)(call)
        except Exception as error:
            explained = self._explain(key, error)
            if explained is None:
                raise
            raise explained from error

    def _explain(self, key: str, error: Exception) -> PenstockError | None:
        name, status, code = f"{self.url}/{key}", _status(error), _code(error)
        if isinstance(error, boto.FlexibleChecksumError):
            return DamagedObject(f"{name} is damaged: it fails the checksum the store keeps for it")
        if _is_transient(error):
            return Unavailable(
                f"{self.url}: {self._endpoint()} did not serve {key or 'a listing'} in several "
                f"tries ({_brief(error)}); check that it is up, and AWS_ENDPOINT_URL"
            )
        if isinstance(
            error,
            (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError),
        ):
            return StoreError(
                f"{self.url}: no usable credentials ({type(error).__name__}); "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        if code == "NoSuchBucket":
            return StoreError(
                f"{self.url}: {self._endpoint()} has no bucket {self._bucket}; create it or correct the URL"
            )
        if status == 404:
            return ObjectMissing(f"{name} is missing")
        if code in _CREDENTIAL_CODES:
            return StoreError(
                f"{self.url}: {self._endpoint()} refused the credentials ({code}); "
                "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the clock"
            )
        if status in (401, 403):
            return StoreError(
                f"{name}: access denied ({_brief(error)}); the credentials need s3:GetObject, "
                "s3:PutObject, s3:DeleteObject and s3:ListBucket"
            )
        if status == 501:
            return StoreError(
                f"{name}: {self._endpoint()} does not honour exclusive create (If-None-Match) "
                f"or another request ({_brief(error)}); use another server"
            )
        if status is not None:
            return StoreError(
                f"{name}: {self._endpoint()} refused the request ({_brief(error)}); "
                "check the URL, AWS_REGION and AWS_ENDPOINT_URL"
            )
        if isinstance(error, (boto.BotoCoreError, ValueError, OSError)):
            return StoreError(
                f"{self.url}: cannot be used as it is set up ({_brief(error)}); "
                "check AWS_ENDPOINT_URL, AWS_PROFILE and the AWS configuration files"
            )
        return None

    def _endpoint(self) -> str:
        # Only called once a request was answered or sent, so the client exists.
        return _without_secrets(str(self._s3.s3.meta.endpoint_url))


def _response(error: BaseException) -> dict[str, Any]:
    """S3's reply as botocore parsed it; s3fs hangs the botocore error below its own."""
    for candidate in (error, error.__cause__):
        if isinstance(response := getattr(candidate, "response", None), dict):
            return response
    return {}


def _status(error: BaseException) -> int | None:
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if status is not None else None


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _is_transient(error: BaseException) -> bool:
    if (status := _status(error)) is not None:
        return status in _TRANSIENT_STATUS or _code(error) in _TRANSIENT_CODES
    return isinstance(error, _TRANSIENT_ERRORS)


def _brief(error: BaseException) -> str:
    """A few words for a log line or a message: never a header, a body or a signature."""
    if (status := _status(error)) is not None:
        code = _code(error)
        return f"HTTP {status}" if code in ("", str(status)) else f"HTTP {status} {code}"
    if isinstance(error, _TRANSIENT_ERRORS):
        return type(error).__name__
    return _without_secrets(" ".join(str(error).split()) or type(error).__name__)


def _without_secrets(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)
