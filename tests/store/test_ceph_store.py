"""The S3 backend on a real server: the contract, races, and servers that are killed."""

import itertools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import quote

import pytest

from contracts.objects import SharedStoreContract
from penstock.common.errors import Unavailable
from penstock.store.objects import ObjectStore
from penstock.store.s3 import S3Store
from services.ceph import CephGateway
from services.waiting import eventually

pytestmark = pytest.mark.services


@pytest.fixture
def store(ceph: CephGateway, clean_aws: pytest.MonkeyPatch) -> S3Store:
    for name, value in ceph.environment().items():
        clean_aws.setenv(name, value)
    return S3Store(f"s3://{ceph.make_bucket()}/some/prefix")


class TestCephStore(SharedStoreContract):
    @pytest.fixture(autouse=True)
    def _server(self, ceph: CephGateway) -> None:
        self.ceph = ceph

    def read_raw(self, store: ObjectStore, key: str) -> bytes:
        return read_raw(self.ceph, store, key)


def test_a_listing_of_several_pages_is_whole(store: S3Store) -> None:
    names = [f"{number:03}" for number in range(120)]  # a page holds 50
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda name: store.create(name, b""), names))
    assert sorted(store.list("")) == [(name, 0) for name in names]


def test_what_was_acknowledged_outlives_a_killed_gateway(ceph: CephGateway, store: S3Store) -> None:
    """Creates and gets go on while the gateway is killed four times; they only take longer."""
    writers, kills = 4, 4
    acknowledged: dict[str, bytes] = {}
    unknown: set[str] = set()
    stop = threading.Event()

    def write(writer: int) -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            key, data = f"{writer}/{number}", b"%d-%d " % (writer, number) * 10_000
            try:
                made = store.create(key, data)
            except Unavailable:
                unknown.add(key)  # it may have landed
                continue
            assert made, f"{key} is nobody else's"
            acknowledged[key] = data
            try:
                assert store.get(key) == data
            except Unavailable:
                unknown.add(key)

    with ThreadPoolExecutor(writers) as pool:
        working = [pool.submit(write, writer) for writer in range(writers)]
        try:
            for _ in range(kills):
                wait_for_more(acknowledged, working)
                ceph.kill_gateway()
                ceph.start_gateway()
        finally:
            stop.set()
        for worker in working:
            worker.result()
    # A pause is drawn from zero upwards, so a request's six tries can, if rarely, all fall into one kill.
    assert len(unknown) < kills
    sizes = dict(store.list(""))
    for key, data in acknowledged.items():
        assert sizes.pop(key) == len(data)
        assert read_raw(ceph, store, key) == data
    assert sizes.keys() <= unknown


def test_a_create_waits_for_a_gateway_that_returns(ceph: CephGateway, store: S3Store) -> None:
    store.exists("a")
    ceph.kill_gateway()
    with ThreadPoolExecutor(1) as pool:
        try:
            begin = time.monotonic()
            making = pool.submit(store.create, "a", b"1")
        finally:
            ceph.start_gateway()
        assert making.result() is True
    assert time.monotonic() - begin < 30
    assert read_raw(ceph, store, "a") == b"1"


def test_what_was_acknowledged_outlives_a_power_cut(ceph: CephGateway, store: S3Store) -> None:
    data = {f"{number}": b"%d" % number * 50_000 for number in range(12)}
    for key, content in data.items():
        assert store.create(key, content)
    ceph.kill_all()
    ceph.start_all()
    assert {key: store.get(key) for key in data} == data
    assert not store.create("0", b"again")
    assert sorted(store.list("")) == sorted((key, len(content)) for key, content in data.items())


def wait_for_more(acknowledged: dict[str, bytes], working: list["Future[None]"]) -> None:
    enough = len(acknowledged) + 20
    eventually(lambda: len(acknowledged) >= enough or any(worker.done() for worker in working))


def read_raw(ceph: CephGateway, store: ObjectStore, key: str) -> bytes:
    bucket, prefix = store.url.removeprefix("s3://").split("/", 1)
    return ceph.read(bucket, quote(f"{prefix}/{key}"))
