"""Creates that land and whose replies never arrive: the creator knows its object, and nobody else's."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.store.objects import ObjectStore, open_store
from penstock.store.s3 import S3Store
from penstock.store.writer import DatasetWriter
from services.s3_server import S3Server
from services.synthetic import SyntheticSource, make_manifest
from services.tcp_proxy import Fault, Policy, Request, TcpProxy


class FirstReplies(Policy):
    """Swallows the first reply to each create, or to each request of any kind."""

    def __init__(self) -> None:
        self.active = True
        self.creates_only = True
        self._known: set[str] = set()

    def fault(self, request: Request) -> Fault | None:
        token = request.head.get("x-amz-meta-penstock-create")
        name = token or f"{request.method} {request.target}"
        if not self.active or name in self._known or (self.creates_only and not token):
            return None
        self._known.add(name)
        return Fault.SWALLOW


@pytest.fixture
def policy() -> FirstReplies:
    return FirstReplies()


@pytest.fixture
def lossy(s3_server: S3Server, policy: FirstReplies, clean_aws: pytest.MonkeyPatch) -> Iterator[TcpProxy]:
    """A proxy with that policy, which the environment names as the endpoint."""
    with TcpProxy(s3_server.url, policy) as proxy:
        for name, value in s3_server.environment(proxy.url).items():
            clean_aws.setenv(name, value)
        yield proxy


@pytest.fixture
def store(s3_server: S3Server, lossy: TcpProxy) -> S3Store:
    return S3Store(f"s3://{s3_server.make_bucket()}/x")


RECORD = {"rows": 7, "text": "é"}


def create_bytes(store: ObjectStore, key: str, creator: int) -> bool:
    return store.create(key, b"%d" % creator * 70_000)


def create_record(store: ObjectStore, key: str, creator: int) -> bool:
    return store.create_record(key, RECORD | {"creator": creator})


def read_bytes(store: ObjectStore, key: str) -> int:
    data = store.get(key)
    assert data == data[:1] * 70_000
    return int(data[:1])


def read_record(store: ObjectStore, key: str) -> int:
    record = store.get_record(key)
    assert record == RECORD | {"creator": record["creator"]}
    return int(record["creator"])


Create = Callable[[ObjectStore, str, int], bool]
Read = Callable[[ObjectStore, str], int]
KINDS = pytest.mark.parametrize(
    ("create", "read"), [(create_bytes, read_bytes), (create_record, read_record)], ids=["bytes", "record"]
)
EVERY = pytest.mark.parametrize("creates_only", [True, False], ids=["creates", "every request"])


@KINDS
@EVERY
@pytest.mark.parametrize("warm", [False, True], ids=["new connection", "reused connection"])
def test_a_creator_whose_first_reply_was_swallowed_made_its_object(
    lossy: TcpProxy,
    policy: FirstReplies,
    store: S3Store,
    create: Create,
    read: Read,
    creates_only: bool,
    warm: bool,
) -> None:
    policy.creates_only = creates_only
    if warm:
        policy.active = False
        store.exists("other")
        policy.active = True
    assert create(store, "a", 1) is True
    assert lossy.faults()["landed_create_unanswered"] == 1
    assert create(S3Store(store.url), "a", 2) is False
    assert create(store, "a", 1) is False, "equal content is still not this call's object"
    assert read(store, "a") == 1
    assert [key for key, _ in store.list("")] == ["a"]


@KINDS
@EVERY
@pytest.mark.parametrize("clients", ["one", "two"])
def test_a_race_under_swallowed_replies_has_one_winner(
    lossy: TcpProxy,
    policy: FirstReplies,
    store: S3Store,
    create: Create,
    read: Read,
    creates_only: bool,
    clients: str,
) -> None:
    policy.creates_only = creates_only
    stores = [store, store if clients == "one" else S3Store(store.url)]
    rounds = 5
    start = threading.Barrier(2)

    def race(creator: int, key: str) -> bool:
        start.wait()
        return create(stores[creator], key, creator)

    with ThreadPoolExecutor(2) as pool:
        for turn in range(rounds):
            made = list(pool.map(race, range(2), [f"{turn}"] * 2))
            assert made.count(True) == 1
            assert read(store, f"{turn}") == made.index(True)
    assert lossy.faults()["landed_create_unanswered"] == rounds
    assert lossy.faults()["swallow"] >= 2 * rounds
    assert sorted(key for key, _ in store.list("")) == [str(turn) for turn in range(rounds)]


def test_a_dataset_written_under_swallowed_replies_is_the_same(
    lossy: TcpProxy, store: S3Store, tmp_path: Path
) -> None:
    """Every create of a whole dataset loses its first reply; not a byte differs."""
    undisturbed = open_store(str(tmp_path))
    for target in (undisturbed, store):
        manifest = make_manifest()
        source = SyntheticSource(manifest)
        writer = DatasetWriter(target, manifest)
        for index in range(manifest.n_chunks):
            _, made = writer.write(index, source.chunk(index))
            assert made
        writer.close()
    assert contents(store) == contents(undisturbed)
    assert lossy.faults()["landed_create_unanswered"] == len(contents(undisturbed))


def contents(store: ObjectStore) -> dict[str, bytes]:
    return {key: store.get(key) for key, _ in store.list("")}
