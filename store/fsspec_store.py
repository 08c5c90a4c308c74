"""Objects on other services, through the fsspec package for each.

Reading asks little of a service. Writing asks for an exclusive create that is one request and makes the
object whole, and that is known of few: where a file system looks first and then writes, or lets others see
half an object, workers would overwrite each other. `WRITABLE` lists those whose packages send one conditional
request (gcsfs: `ifGenerationMatch=0`, adlfs: `If-None-Match: *`); `probe` races four creates to see that it
is honoured.

Unlike S3's and the local one, this create may call its own object somebody else's, when a reply was lost
below. Whoever calls it settles by content, so no work depends on it.
"""

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import fsspec

from penstock.common import metrics
from penstock.common.errors import ObjectMissing, PenstockError, StoreError, Unavailable
from penstock.common.logs import LOGGER
from penstock.common.retries import retrying
from penstock.store.objects import ObjectStore

WRITABLE = {"gs", "gcs", "az", "abfs", "abfss", "memory"}
READABLE = {*WRITABLE, "http", "https", "hf"}

_RACERS, _RACES = 4, 3
_PASSING = (TimeoutError, ConnectionError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_MEMORY = threading.RLock()
"""memory:// lives in this process, and its file system does nothing atomically."""

_T = TypeVar("_T")


class FsspecStore(ObjectStore):
    """Objects below a URL whose scheme is in `READABLE`.

    Raises:
        StoreError: the scheme is not, its package is not installed, or the URL carries a secret.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        # a key would follow a query; before an @ stands a token, but for containers of Azure
        web = parts.scheme in ("http", "https")
        if parts.password is not None or (web and (parts.username is not None or parts.query)):
            raise StoreError("a URL carries no credentials; use the settings of the service's own tools")
        self._scheme = parts.scheme
        self.url = url.rstrip("/")
        if self._scheme not in READABLE:
            raise StoreError(
                f"{url}: no object store for {self._scheme}:// (use a path, file://, s3:// or one of "
                f"{', '.join(sorted(READABLE))})"
            )
        try:
            # Cached instances keep old credentials, cached listings hide what other processes wrote.
            options = {"skip_instance_cache": True, "use_listings_cache": False}
            self._fs, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise StoreError(f"{url}: {self._scheme}:// needs another package ({error})") from error
        except Exception as error:
            raise StoreError(f"{url}: cannot be used as it is set up ({_brief(error)})") from error
        self._root = root.rstrip("/")

    def _create(self, key: str, data: bytes) -> bool:
        self._need_writable()

        def attempt() -> bool:
            try:
                self._fs.pipe_file(self._path(key), data, mode="create")
            except FileExistsError:
                return False
            return True

        return self._call("create", key, attempt)

    def put(self, key: str, data: bytes) -> None:
        self._need_writable()
        self._call("put", key, lambda: self._fs.pipe_file(self._path(key), data))

    def get(self, key: str) -> bytes:
        return self._call("get", key, lambda: bytes(self._fs.cat_file(self._path(key))))

    def exists(self, key: str) -> bool:
        return self._call("head", key, lambda: bool(self._fs.isfile(self._path(key))))

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        base = self._path(prefix).rstrip("/")

        def attempt() -> dict[str, Any]:
            try:
                found: dict[str, Any] = self._fs.find(base, detail=True)
            except _MISSING:
                return {}
            return found

        for name, about in self._call("list", prefix, attempt).items():
            key = name.removeprefix(self._root).strip("/")
            if key and not name.endswith("/"):
                yield key, int(about.get("size") or 0)

    def delete(self, key: str) -> None:
        self._need_writable()
        with contextlib.suppress(ObjectMissing):
            self._call("delete", key, lambda: self._fs.rm_file(self._path(key)))

    def probe(self) -> None:
        with ThreadPoolExecutor(_RACERS) as pool:
            for _ in range(_RACES):
                self._race(pool)

    def _race(self, pool: ThreadPoolExecutor) -> None:
        key = f".probe-{uuid.uuid4().hex}"
        start = threading.Barrier(_RACERS)

        def create(racer: int) -> bool:
            start.wait()
            return self._create(key, b"%d" % racer)

        try:
            made = list(pool.map(create, range(_RACERS)))
            again = self._create(key, b"again")
            # none says "made" where the winner's reply was lost
            if again or made.count(True) > 1 or (any(made) and self.get(key) != b"%d" % made.index(True)):
                raise StoreError(
                    f"{self.url}: does not honour exclusive create, so workers would overwrite each other; "
                    "use another service"
                )
        finally:
            self.delete(key)

    def _need_writable(self) -> None:
        if self._scheme not in WRITABLE:
            raise StoreError(
                f"{self.url}: {self._scheme}:// is for reading only: it has no exclusive create; write to a "
                "path, s3://, gs:// or abfs://"
            )

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _call(self, op: str, key: str, call: Callable[[], _T]) -> _T:
        def tell(error: BaseException) -> None:
            metrics.object_retries.labels(op).inc()
            LOGGER.warning("%s/%s: %s; trying again", self.url, key, type(error).__name__)

        try:
            with _MEMORY if self._scheme == "memory" else contextlib.nullcontext():
                return retrying(lambda error: isinstance(error, _PASSING), tell)(call)
        except _MISSING as error:
            raise ObjectMissing(f"{self.url}/{key} is missing") from error
        except PenstockError:
            raise
        except _PASSING as error:
            raise Unavailable(
                f"{self.url}: did not serve {key or 'a listing'} in several tries ({type(error).__name__})"
            ) from error
        except Exception as error:
            raise StoreError(f"{self.url}/{key}: {op} was refused ({_brief(error)})") from error


def _brief(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
