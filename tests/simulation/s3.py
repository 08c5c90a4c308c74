"""S3 in memory, below the real `S3Store`.

`MemoryS3` stands where s3fs does. `S3Store` is used as it is, so its exclusive create, its tokens, its
reading of errors and its retries are under test. Every request gives way before it takes effect and
again before its reply arrives, which is where it may fail.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

from botocore import exceptions as boto
from s3fs.errors import translate_boto_error

from penstock.store import s3 as store_module
from penstock.store.s3 import S3Store
from simulation.faults import Faults, failing_first
from simulation.scheduler import WALL_START, Scheduler

ENDPOINT = "http://s3.simulated"

_REFUSALS = [
    (503, "SlowDown"),
    (500, "InternalError"),
    (409, "ConditionalRequestConflict"),
    (0, "connection refused"),
    (0, "timeout"),
]
"""What a request that is refused is told."""

_T = TypeVar("_T")


class Object(NamedTuple):
    """A stored object."""

    data: bytes
    metadata: dict[str, str]
    modified: float


@dataclass(frozen=True)
class Mutation:
    """A change of one object. Keys are `<bucket>/<key>`; None stands for no object."""

    time: float
    process: str
    key: str
    old: bytes | None
    new: bytes | None


WriteObserver = Callable[[str, bytes | None, bytes, str], None]
DeleteObserver = Callable[[str, bytes, str], None]


class MemoryS3:
    """All buckets; every bucket exists.

    Attributes:
        objects: `<bucket>/<key>` -> object. For looking; change it to damage something.
        history: all changes, oldest first.
        on_write: called with (key, old, new, process) after each write.
        on_delete: called with (key, old, process) after each removal. Errors of both end the simulation,
            even where the code under test would catch them.
        page_size: keys per listing request.
    """

    def __init__(self, scheduler: Scheduler, faults: Faults | None = None) -> None:
        self.scheduler = scheduler
        self.faults = faults or Faults(scheduler)
        self.objects: dict[str, Object] = {}
        self.history: list[Mutation] = []
        self.on_write: list[WriteObserver] = []
        self.on_delete: list[DeleteObserver] = []
        self.page_size = 1000
        self.lock = threading.Lock()  # for threads outside of any simulation
        self._file_system = _FileSystem(self)

    def store(self, url: str) -> S3Store:
        """A store at an `s3://` URL. Whoever calls it is whose requests these are."""
        module: Any = store_module
        before = module.s3fs, module._session
        module.s3fs = SimpleNamespace(S3FileSystem=lambda **options: self._file_system)
        module._session = lambda: None
        try:
            store = _Store(url)
        finally:
            module.s3fs, module._session = before
        # the class took time.sleep before anybody could replace it
        store._sleep = self.scheduler.sleep
        return store

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Whatever opens an `s3://` URL gets a store here."""
        module: Any = store_module
        before, module.S3Store = module.S3Store, self.store
        try:
            yield
        finally:
            module.S3Store = before

    def write(self, name: str, data: bytes, metadata: dict[str, str], process: str) -> None:
        """Make or replace an object, at once."""
        found = self.objects.get(name)
        old = None if found is None else found.data
        self.objects[name] = Object(data, metadata, self.scheduler.clock)
        self.history.append(Mutation(self.scheduler.clock, process, name, old, data))
        for observer in self.on_write:
            self._observe(observer, name, old, data, process)

    def remove(self, name: str, process: str) -> None:
        """Remove an object, at once."""
        found = self.objects.pop(name, None)
        if found is not None:
            self.history.append(Mutation(self.scheduler.clock, process, name, found.data, None))
            for observer in self.on_delete:
                self._observe(observer, name, found.data, process)

    def _observe(self, observer: Callable[..., None], *arguments: object) -> None:
        try:
            observer(*arguments)
        except BaseException as error:
            self.scheduler.fail(error)
            raise


class _Store(S3Store):
    """The real store, which asks its retry policy only once something failed."""

    def _call(self, op: str, key: str, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except Exception as error:
            failure = error
        return super()._call(op, key, failing_first(failure, call))


class _FileSystem:
    """The part of s3fs that `S3Store` calls, raising what s3fs raises."""

    def __init__(self, memory: MemoryS3) -> None:
        self.retries = 1
        self.s3 = SimpleNamespace(meta=SimpleNamespace(endpoint_url=ENDPOINT))
        self.loop = SimpleNamespace(set_exception_handler=lambda handler: None)
        self._memory = memory
        self._scheduler = memory.scheduler

    def pipe_file(
        self,
        path: str,
        value: bytes,
        mode: str = "overwrite",
        ChecksumCRC32C: str = "",
        Metadata: dict[str, str] | None = None,
    ) -> None:
        memory, process = self._memory, self._process()

        def effect() -> None:
            if mode == "create" and path in memory.objects:
                raise _answer(412, "PreconditionFailed", "PutObject", Condition="If-None-Match")
            memory.write(path, bytes(value), Metadata or {}, process)

        self._request("create" if mode == "create" else "put", path, effect, writes=True)

    def cat_file(self, path: str, **options: Any) -> bytes:
        def effect() -> bytes:
            found = self._memory.objects.get(path)
            if found is None:
                raise _answer(404, "NoSuchKey", "GetObject")
            return found.data

        return self._request("get", path, effect)

    def call_s3(self, method: str, **request: Any) -> dict[str, Any]:
        known: dict[str, Callable[..., dict[str, Any]]] = {
            "head_object": self._head_object,
            "list_objects_v2": self._list_objects,
            "delete_object": self._delete_object,
        }
        return known[method](**request)

    def _head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        path = f"{Bucket}/{Key}"

        def effect() -> dict[str, Any]:
            found = self._memory.objects.get(path)
            if found is None:
                raise _answer(404, "404", "HeadObject")
            return {
                "ContentLength": len(found.data),
                "LastModified": _moment(found.modified),
                "Metadata": dict(found.metadata),
            }

        return self._request("head", path, effect)

    def _list_objects(
        self,
        Bucket: str,
        Prefix: str = "",
        ContinuationToken: str = "",
        StartAfter: str = "",
        MaxKeys: int | None = None,
        Delimiter: str = "",
    ) -> dict[str, Any]:
        start, after = f"{Bucket}/{Prefix}", f"{Bucket}/{max(ContinuationToken, StartAfter, Prefix)}"

        def effect() -> dict[str, Any]:
            objects = self._memory.objects
            names = sorted(name for name in objects if name.startswith(start))
            if after != start:
                names = [name for name in names if name > after]
            if Delimiter:
                below = (name.removeprefix(start).split(Delimiter) for name in names)
                folders = sorted({parts[0] for parts in below if len(parts) > 1})
                return {"CommonPrefixes": [{"Prefix": f"{Prefix}{name}{Delimiter}"} for name in folders]}
            size = min(MaxKeys or self._memory.page_size, self._memory.page_size)
            page = {
                "Contents": [
                    {"Key": name[len(Bucket) + 1 :], "Size": len(objects[name].data)} for name in names[:size]
                ],
                "IsTruncated": len(names) > size,
            }
            if len(names) > size:
                page["NextContinuationToken"] = names[size - 1][len(Bucket) + 1 :]
            return page

        return self._request("list", start, effect)

    def _delete_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        path, process = f"{Bucket}/{Key}", self._process()

        def effect() -> dict[str, Any]:
            self._memory.remove(path, process)
            return {}

        return self._request("delete", path, effect, writes=True)

    def _process(self) -> str:
        actor = self._scheduler.actor
        return "*" if actor is None else actor.process.name

    def _request(self, op: str, path: str, effect: Callable[[], _T], writes: bool = False) -> _T:
        scheduler, faults = self._scheduler, self._memory.faults
        scheduler.request((op, path))
        outcome = faults.outcome()
        if outcome == "slow":
            scheduler.sleep(faults.slowness(), f"slow {op} {path}")
        elif outcome == "late" and writes:
            scheduler.note(f"late {op} {path}")
            scheduler.later(faults.lateness(), lambda: _land(effect))
            raise _timeout()
        elif outcome in ("refused", "late"):
            status, code = scheduler.random.choice(_REFUSALS)
            scheduler.note(f"{code} for {op} {path}")
            raise _refusal(status, code, op)
        try:
            with self._memory.lock:
                result = effect()
        except OSError:  # an answer; its way back is as long
            scheduler.pause((op, "answers an error"))
            raise
        scheduler.pause((op, "done"))
        if outcome == "lost":
            scheduler.note(f"lost reply of {op} {path}")
            raise boto.ConnectionClosedError(endpoint_url=ENDPOINT)
        return result


def _land(effect: Callable[[], object]) -> None:
    """A write whose sender no longer listens."""
    with suppress(OSError):
        effect()


def _answer(status: int, code: str, operation: str, **more: str) -> OSError:
    """What s3fs makes of an error that S3 answers."""
    response = {
        "Error": {"Code": code, "Message": code, **more},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return cast(OSError, translate_boto_error(boto.ClientError(response, operation)))


def _refusal(status: int, code: str, operation: str) -> Exception:
    if status:
        return _answer(status, code, operation)
    return _timeout() if code == "timeout" else boto.EndpointConnectionError(endpoint_url=ENDPOINT)


def _timeout() -> Exception:
    return cast(Exception, boto.ReadTimeoutError(endpoint_url=ENDPOINT))


def _moment(clock: float) -> datetime:
    return datetime.fromtimestamp(WALL_START + clock, UTC)
