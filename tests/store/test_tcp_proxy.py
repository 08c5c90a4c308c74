"""The proxy that fails at random, and the servers behind it: each fault is what it says it is."""

import http.client
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from penstock.store.s3 import S3Store
from services.http_messages import Head
from services.moto import MotoServer
from services.moto_process import MotoProcess
from services.processes import free_port, listens
from services.s3_server import S3Server
from services.tcp_proxy import (
    Chances,
    Fault,
    Outage,
    Policy,
    RandomFaults,
    Request,
    TcpProxy,
    TcpProxyProcess,
)
from services.waiting import eventually

DATA = bytes(range(256)) * 1024


class Script(Policy):
    """The faults given, one per request, and then none."""

    def __init__(self) -> None:
        self.faults: list[Fault | Outage] = []

    def fault(self, request: Request) -> Fault | Outage | None:
        return self.faults.pop(0) if self.faults else None


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def proxy(s3_server: S3Server, script: Script, clean_aws: pytest.MonkeyPatch) -> Iterator[TcpProxy]:
    with TcpProxy(s3_server.url, script) as running:
        for name, value in s3_server.environment(running.url).items():
            clean_aws.setenv(name, value)
        yield running


@pytest.fixture
def store(s3_server: S3Server, proxy: TcpProxy) -> S3Store:
    return S3Store(f"s3://{s3_server.make_bucket()}/x")


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_happens_once_and_is_got_over(
    proxy: TcpProxy, script: Script, store: S3Store, fault: Fault
) -> None:
    script.faults = [fault]
    assert store.create("a", DATA) is True
    script.faults = [fault]
    assert store.get("a") == DATA
    assert proxy.faults()[fault] == 2
    assert proxy.faults().get("landed_create_unanswered", 0) == (fault in (Fault.SWALLOW, Fault.TRUNCATE))
    assert list(store.list("")) == [("a", len(DATA))]


@pytest.mark.parametrize("fault", [Fault.RESET_BEFORE, Fault.RESET_INSIDE])
@pytest.mark.parametrize("data", [b"", b"1", DATA], ids=["empty", "one byte", "large"])
def test_a_request_that_was_reset_did_not_land(
    s3_server: S3Server, script: Script, store: S3Store, fault: Fault, data: bytes
) -> None:
    script.faults = [fault] * 100
    request = {"Bucket": store.url.split("/")[2], "Key": "x/a", "Body": data}
    with pytest.raises(Exception, match=r"[Cc]onnect"):
        store._s3.call_s3("put_object", **request)
    script.faults.clear()
    assert not store.exists("a")
    assert store.create("a", data) is True
    assert store.get("a") == data


def test_an_outage_refuses_everybody_until_it_ends(proxy: TcpProxy, script: Script, store: S3Store) -> None:
    store.create("a", b"1")
    proxy.outage()
    assert not listens(proxy.url)
    proxy.restore()
    assert store.get("a") == b"1"
    script.faults = [Outage(0.2)]
    assert store.get("a") == b"1"
    assert proxy.faults()["outage"] == 2


def test_a_server_that_is_down_looks_down_through_the_proxy() -> None:
    with TcpProxy(f"http://127.0.0.1:{free_port()}") as proxy, pytest.raises(ConnectionResetError):
        get(proxy.url)


def test_bodies_in_chunks_arrive_whole(moto: MotoServer) -> None:
    bucket = moto.make_bucket()
    with TcpProxy(moto.url) as proxy, closing(connect(proxy.url)) as connection:
        pieces = [DATA[:1000], DATA[1000:1001], DATA[1001:]]
        headers = {"x-amz-acl": "public-read", "Transfer-Encoding": "chunked"}
        connection.request("PUT", f"/{bucket}/a", iter(pieces), headers, encode_chunked=True)
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 200
    assert moto.read(bucket, "a") == DATA


def test_faults_are_a_function_of_seed_and_request() -> None:
    chances = Chances(reset_before=0.1, reset_inside=0.1, swallow=0.2, truncate=0.1, outage=0.1, latency=0.5)
    requests = [
        Request(method, f"/bucket/{number}", Head("", ()), nth)
        for method in ("PUT", "GET")
        for number in range(500)
        for nth in (1, 2)
    ]

    def drawn(seed: int, order: list[Request]) -> list[object]:
        policy = RandomFaults(seed, chances)
        met = {id(request): (policy.fault(request), policy.delay(request)) for request in order}
        return [met[id(request)] for request in requests]

    faults = drawn(1, requests)
    assert faults == drawn(1, requests[::-1])
    assert faults != drawn(2, requests)
    policy = RandomFaults(1, chances)
    counted = [policy.fault(request) for request in requests]
    shares: list[tuple[Fault | Outage | None, int]] = [
        (Fault.SWALLOW, 400),
        (Fault.TRUNCATE, 200),
        (Outage(1.0), 200),
        (None, 800),
    ]
    for fault, expected in shares:
        assert abs(counted.count(fault) - expected) < 80
    late = [delay for request in requests if (delay := policy.delay(request))]
    assert abs(len(late) - 1000) < 100
    assert 0 < min(late) < max(late) <= chances.latency_seconds


def test_the_process_counts_obeys_and_reports_at_its_end(clean_aws: pytest.MonkeyPatch) -> None:
    swallow = Chances(swallow=1.0)
    with MotoProcess() as server, TcpProxyProcess(server.url, seed=3, chances=swallow) as proxy:
        for name, value in server.environment(proxy.url).items():
            clean_aws.setenv(name, value)
        url = f"s3://{server.make_bucket()}"
        with pytest.raises(http.client.RemoteDisconnected):
            get(proxy.url)
        assert proxy.faults() == {"swallow": 1}
        proxy.set_chances(Chances(latency=1.0, latency_seconds=0.01))
        store = S3Store(url)
        assert store.create("a", b"1")
        proxy.outage()
        assert not listens(proxy.url)
        proxy.restore()
        assert store.get("a") == b"1"
        counters = proxy.stop()
        assert counters.pop("latency") >= 2
        assert counters == {"swallow": 1, "outage": 1}


def test_a_paused_server_carries_out_what_was_sent_meanwhile() -> None:
    with MotoProcess() as server:
        bucket = server.make_bucket()
        server.pause()
        with closing(connect(server.url)) as connection:
            connection.request("PUT", f"/{bucket}/a", b"1", {"x-amz-acl": "public-read"})
            connection.sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.getresponse()
        server.resume()
        eventually(lambda: b"<Key>a</Key>" in server.read(bucket, ""))


def test_servers_end_with_the_process_that_started_them() -> None:
    """Even one that is killed leaves none behind."""
    code = (
        "from services.moto_process import MotoProcess; from services.tcp_proxy import TcpProxyProcess\n"
        "with MotoProcess() as server, TcpProxyProcess(server.url) as proxy:\n"
        "    print(server.url, proxy.url, flush=True); input()"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert started.stdout is not None
        urls = started.stdout.readline().split()
        assert len(urls) == 2
        assert all(map(listens, urls))
    finally:
        started.kill()
        started.communicate()
    eventually(lambda: not any(map(listens, urls)))


def get(url: str) -> None:
    with closing(connect(url)) as connection:
        connection.request("GET", "/")
        connection.getresponse()


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
