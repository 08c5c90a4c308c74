"""Objects on S3: our store, s3fs with its defaults, and obstore, against servers on this machine.

Chunk-sized objects (32 MiB) are created and read by 1, 2, 4 and 8 threads at a time, as the writer and the
loader do, and small ones (1 kB) one after the other, as commits are. Every create is conditional and carries
a token in its metadata. A round of large creates includes deleting them, for the server's sake.

The servers are those of the tests: moto always, Ceph's gateway where it is installed. They share the cores
with their clients, so what a client saves in computation shows twice. obstore is left out where it is not
installed; it is no requirement of ours.
"""

import importlib.util
import itertools
import os
import shutil
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Case, Work, take_turns

LARGE, SMALL = 32 * 1024 * 1024, 1000
STREAMS = (1, 2, 4, 8)
TOKEN = "benchmark-create"


def run(quick: bool, device: torch.device) -> list[Case]:
    """Per server: creates and gets of large objects for each number of streams, then of small ones."""
    # the servers live beside the tests that need them
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    cases: list[Case] = []
    for name, server in _servers():
        with server() as running, _environment(running.environment()):
            clients = _clients(running)
            for streams in (1, 4) if quick else STREAMS:
                cases += _large(name, clients, streams, 2 if quick else 3, device)
            cases += _small(name, clients, 2 if quick else 3, device)
    return cases


class _Client(ABC):
    """One way to speak to a bucket."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def get(self, key: str) -> bytes: ...


class _Ours(_Client):
    def __init__(self, bucket: str) -> None:
        from penstock.store.s3 import S3Store

        self.store = S3Store(f"s3://{bucket}")

    def create(self, key: str, data: bytes) -> None:
        if not self.store.create(key, data):
            raise RuntimeError(f"{key} was there already")

    def get(self, key: str) -> bytes:
        return self.store.get(key)


class _S3fs(_Client):
    def __init__(self, bucket: str) -> None:
        import s3fs

        self._bucket = bucket
        self._s3: Any = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)

    def create(self, key: str, data: bytes) -> None:
        token = {TOKEN: uuid.uuid4().hex}
        self._s3.pipe_file(f"{self._bucket}/{key}", data, mode="create", Metadata=token)

    def get(self, key: str) -> bytes:
        data: bytes = self._s3.cat_file(f"{self._bucket}/{key}", max_concurrency=1)
        return data


class _Obstore(_Client):
    """With `unsigned`, the payload is not hashed for the signature, as it is not by ours."""

    def __init__(self, bucket: str, environment: dict[str, str], unsigned: bool) -> None:
        import obstore

        self._obstore: Any = obstore
        self._store: Any = obstore.store.S3Store(
            bucket,
            config={
                "endpoint": environment["AWS_ENDPOINT_URL"],
                "region": environment["AWS_DEFAULT_REGION"],
                "access_key_id": environment["AWS_ACCESS_KEY_ID"],
                "secret_access_key": environment["AWS_SECRET_ACCESS_KEY"],
                "virtual_hosted_style_request": False,
                "unsigned_payload": unsigned,
            },
            client_options={"allow_http": True},
        )

    def create(self, key: str, data: bytes) -> None:
        token = {TOKEN: uuid.uuid4().hex}
        self._obstore.put(self._store, key, data, mode="create", use_multipart=False, attributes=token)

    def get(self, key: str) -> bytes:
        return bytes(self._obstore.get(self._store, key).bytes().to_bytes())


def _clients(server: Any) -> dict[str, _Client]:
    """Ours first."""
    bucket, environment = server.make_bucket(), server.environment()
    clients: dict[str, _Client] = {"S3Store": _Ours(bucket), "s3fs, its defaults": _S3fs(bucket)}
    if importlib.util.find_spec("obstore"):
        clients["obstore"] = _Obstore(bucket, environment, unsigned=False)
        clients["obstore, unsigned"] = _Obstore(bucket, environment, unsigned=True)
    return clients


def _large(
    server: str, clients: dict[str, _Client], streams: int, rounds: int, device: torch.device
) -> Iterator[Case]:
    n = max(2, streams)
    data = os.urandom(LARGE)
    ours = clients["S3Store"]
    assert isinstance(ours, _Ours)
    store = ours.store
    store.put("read", data)

    def creates(client: _Client) -> Callable[[int], None]:
        def one(_: int) -> None:
            key = f"large/{uuid.uuid4().hex}"
            client.create(key, data)
            store.delete(key)

        return one

    def gets(client: _Client) -> Callable[[int], None]:
        def one(_: int) -> None:
            if len(client.get("read")) != LARGE:
                raise RuntimeError("a part is missing")

        return one

    with ThreadPoolExecutor(streams) as pool:

        def side_by_side(one: Callable[[int], None]) -> Work:
            return lambda: list(pool.map(one, range(n)))

        for what, work in (("create", creates), ("get", gets)):
            contenders = {name: side_by_side(work(client)) for name, client in clients.items()}
            seconds = take_turns(contenders, rounds, device)
            title = f"{server}: {what} {n} objects of 32 MiB, {streams} at a time"
            yield Case("objects", title, "MiB/s", n * LARGE // 2**20, streams, seconds)


def _small(server: str, clients: dict[str, _Client], rounds: int, device: torch.device) -> Iterator[Case]:
    n = 50
    data = os.urandom(SMALL)
    number = itertools.count()
    next(iter(clients.values())).create("small", data)

    def create(client: _Client) -> Work:
        return lambda: [client.create(f"small/{next(number)}", data) for _ in range(n)]

    def get(client: _Client) -> Work:
        return lambda: [client.get("small") for _ in range(n)]

    for what, work in (("create", create), ("get", get)):
        contenders = {name: work(client) for name, client in clients.items()}
        seconds = take_turns(contenders, rounds, device)
        title = f"{server}: {what} {n} objects of 1 kB, one after the other"
        yield Case("objects", title, "objects/s", n, 1, seconds)


def _servers() -> Iterator[tuple[str, Callable[[], Any]]]:
    from services.ceph import CephGateway
    from services.moto_process import MotoProcess

    yield "moto", MotoProcess
    if shutil.which("ceph-osd") and shutil.which("radosgw"):
        yield "ceph", CephGateway


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
