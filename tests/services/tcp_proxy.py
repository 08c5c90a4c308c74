"""A proxy between an S3 client and its server that fails as networks and servers do.

It takes the client's TCP connections, knows the requests on them and does to each what its policy says: wait,
reset the connection before or inside the request, carry the request out and lose or cut the reply, or break
every connection and refuse new ones for a while. It keeps connections, as a real S3 endpoint does: what a
client does silently on a reused connection shows only there.

It runs in a thread (`TcpProxy`) or as a process of its own (`TcpProxyProcess`), which is

    python -m services.tcp_proxy --upstream HOST:PORT [--listen PORT] [--control PORT]
        [--seed S] [--chances JSON]

Its first line of output is {"listen": PORT, "control": PORT}; its last, after SIGTERM, says how often each
fault happened. On the control port every line is a JSON object and is answered by those counters: {} only
asks, {"chances": {...}} sets new chances, {"outage": SECONDS or null} starts an outage, {"restore": true}
ends it.
"""

import argparse
import asyncio
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from services.http_messages import Head, read_body, read_head
from services.processes import free_port, kill, start


class Fault(StrEnum):
    """What can happen to one request."""

    RESET_BEFORE = "reset_before"  # the connection is reset; the server hears nothing
    RESET_INSIDE = "reset_inside"  # the connection is reset; the server gets half of the request
    SWALLOW = "swallow"  # carried out; the reply is dropped and the connection closed
    TRUNCATE = "truncate"  # carried out; the connection is closed after half of the reply


@dataclass(frozen=True)
class Outage:
    """Every connection is reset and new ones are refused: for some seconds, or until `restore`."""

    seconds: float | None


@dataclass(frozen=True)
class Answer:
    """An S3 error is given; the server hears nothing."""

    status: int
    code: str


@dataclass(frozen=True)
class Request:
    """A request whose head has arrived. `nth` counts those of the same method and target, from 1."""

    method: str
    target: str
    head: Head
    nth: int

    @property
    def path(self) -> str:
        return urlsplit(self.target).path


class Policy:
    """Decides what happens to each request: nothing, here. Called by the proxy's thread."""

    def delay(self, request: Request) -> float:
        """Seconds for which the request waits first."""
        return 0.0

    def fault(self, request: Request) -> Fault | Outage | Answer | None:
        return None

    def edit(self, head: Head) -> Head:
        """The head that the server gets."""
        return head


@dataclass(frozen=True)
class Chances:
    """Probabilities per request of each fault (at most one happens) and, apart from them, of latency."""

    reset_before: float = 0.0
    reset_inside: float = 0.0
    swallow: float = 0.0
    truncate: float = 0.0
    outage: float = 0.0
    outage_seconds: float = 1.0
    latency: float = 0.0
    latency_seconds: float = 0.2
    """The longest; each is drawn evenly from 0 to this."""


@dataclass
class RandomFaults(Policy):
    """Faults drawn by chance. The draw is a function of the seed and the request (method, target, how often
    it came), so one request meets the same faults in every run, whatever the others do meanwhile."""

    seed: int = 0
    chances: Chances = field(default_factory=Chances)

    def delay(self, request: Request) -> float:
        draw = self._draws("latency", request)
        return draw.random() * self.chances.latency_seconds if draw.random() < self.chances.latency else 0.0

    def fault(self, request: Request) -> Fault | Outage | None:
        chances = self.chances
        left = self._draws("fault", request).random()
        for fault in Fault:
            left -= getattr(chances, fault.value)
            if left < 0:
                return fault
        return Outage(chances.outage_seconds) if left < chances.outage else None

    def _draws(self, what: str, request: Request) -> random.Random:
        return random.Random(f"{self.seed} {what} {request.method} {request.target} {request.nth}")


class _Proxy:
    """The proxy itself, inside an event loop."""

    def __init__(self, upstream: str, policy: Policy, port: int) -> None:
        self._host, _, upstream_port = upstream.rpartition(":")
        self._upstream_port = int(upstream_port)
        self._port = port
        self._policy = policy
        self._arrived: Counter[tuple[str, str]] = Counter()
        self.counters: Counter[str] = Counter()
        self._server: asyncio.Server | None = None
        self._restoring: asyncio.TimerHandle | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        """Take connections; nothing happens if they are taken already."""
        if self._restoring is not None:
            self._restoring.cancel()
            self._restoring = None
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)

    def outage(self, seconds: float | None) -> None:
        """Break every connection and refuse new ones, for some seconds or until `listen`."""
        self._refuse()
        self.counters["outage"] += 1
        if seconds is not None:
            loop = asyncio.get_running_loop()
            self._restoring = loop.call_later(seconds, lambda: self._spawn(self.listen()))

    async def stop(self) -> None:
        self._refuse()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _refuse(self) -> None:
        if self._restoring is not None:
            self._restoring.cancel()
            self._restoring = None
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._connections:
            _reset(writer)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._spawn(self._serve(reader, writer))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, request after request."""
        self._connections.add(writer)
        try:
            while (head := await read_head(reader)) is not None:
                if not await self._request(head, reader, writer):
                    break
        except (OSError, asyncio.IncompleteReadError):
            # The client is gone, or the server is: then the client is to see that, too.
            _reset(writer)
        finally:
            await self._close(writer)

    async def _request(self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Do with one request what the policy says; whether the connection is kept."""
        method, target, _ = head.first.split()
        self._arrived[method, target] += 1
        request = Request(method, target, head, self._arrived[method, target])
        if delay := self._policy.delay(request):
            self.counters["latency"] += 1
            await asyncio.sleep(delay)
        fault = self._policy.fault(request)
        if isinstance(fault, Outage):
            self.outage(fault.seconds)
            return False
        if fault is Fault.RESET_BEFORE:
            self.counters[fault] += 1
            _reset(writer)
            return False
        if head.get("expect").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is Fault.RESET_INSIDE:
            await self._send_half(head, reader)
            self.counters[fault] += 1
            _reset(writer)
            return False
        body = await read_body(reader, head)
        if isinstance(fault, Answer):
            self.counters["answer"] += 1
            writer.write(_error_reply(fault, with_body=method != "HEAD"))
            await writer.drain()
            return True
        status, reply = await self._carry_out(method, head, body)
        if fault is not None:
            self.counters[fault] += 1
            if method == "PUT" and head.get("if-none-match") and status < 300:
                self.counters["landed_create_unanswered"] += 1
        if fault is Fault.SWALLOW:
            return False
        if fault is Fault.TRUNCATE:
            reply = reply[: len(reply) // 2]
        writer.write(reply)
        await writer.drain()
        return fault is None and head.get("connection").lower() != "close"

    async def _carry_out(self, method: str, head: Head, body: bytes) -> tuple[int, bytes]:
        """The server's status and whole reply."""
        reader, writer = await self._connect()
        try:
            writer.write(self._policy.edit(head).framed(len(body)).encode() + body)
            reply = await read_head(reader)
            while reply is not None and reply.status < 200:
                reply = await read_head(reader)
            if reply is None:
                raise ConnectionResetError("the server ended the connection")
            if method == "HEAD" or reply.status in (204, 304):
                content, length = b"", reply.get("content-length") or "0"
            else:
                content = await read_body(reader, reply, to_the_end=True)
                length = str(len(content))
        finally:
            await self._close(writer)
        kept = Head("HTTP/1.1 " + reply.first.partition(" ")[2], reply.fields).framed(length)
        return reply.status, kept.encode() + content

    async def _send_half(self, head: Head, reader: asyncio.StreamReader) -> None:
        """Give the server the first half of a request, and then the end of the connection."""
        if length := int(head.get("content-length") or 0):
            sent = self._policy.edit(head).framed(length).encode() + await reader.readexactly(length // 2)
        else:
            # Not more: Python's servers take half of the header fields for all of them and carry that out.
            sent = head.first[: len(head.first) // 2].encode("latin-1")
        _, writer = await self._connect()
        try:
            writer.write(sent)
            await writer.drain()
        finally:
            await self._close(writer)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self._host, self._upstream_port)
        self._connections.add(writer)
        return reader, writer

    async def _close(self, writer: asyncio.StreamWriter) -> None:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        self._connections.discard(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, by RST."""
    raw = writer.get_extra_info("socket")
    if not writer.transport.is_closing():
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _error_reply(answer: Answer, *, with_body: bool) -> bytes:
    text = f"<Error><Code>{answer.code}</Code><Message>{answer.code} injected</Message></Error>".encode()
    head = Head(f"HTTP/1.1 {answer.status} injected", (("Content-Type", "application/xml"),))
    return head.framed(len(text)).encode() + (text if with_body else b"")


class TcpProxy:
    """A proxy at `url`, in front of the server at the URL `upstream`, in a thread of this process."""

    def __init__(self, upstream: str, policy: Policy | None = None) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._proxy = _Proxy(urlsplit(upstream).netloc, policy or Policy(), port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "TcpProxy":
        self._thread.start()
        self._run(self._proxy.listen)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._run(self._proxy.stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def faults(self) -> dict[str, int]:
        """How often each fault happened so far."""
        return dict(self._proxy.counters)

    def outage(self, seconds: float | None = None) -> None:
        """Break every connection and refuse new ones, for some seconds or until `restore`."""

        async def begin() -> None:
            self._proxy.outage(seconds)

        self._run(begin)

    def restore(self) -> None:
        """End an outage."""
        self._run(self._proxy.listen)

    def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        asyncio.run_coroutine_threadsafe(work(), self._loop).result()


class TcpProxyProcess:
    """A proxy at `url` with random faults, in a process of its own, for as long as the `with` block lasts.

    Args:
        upstream: the server's URL.
        seed: of the faults.
        chances: of the faults.
    """

    def __init__(self, upstream: str, seed: int = 0, chances: Chances | None = None) -> None:
        self._port, self._control_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._command = [
            *(sys.executable, "-m", "services.tcp_proxy", f"--upstream={urlsplit(upstream).netloc}"),
            *(f"--listen={self._port}", f"--control={self._control_port}", f"--seed={seed}"),
            f"--chances={json.dumps(asdict(chances or Chances()))}",
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "TcpProxyProcess":
        process = self._process = start(self._command, subprocess.PIPE)
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said.startswith(b"{"):
            kill(process)
            raise AssertionError(f"no proxy: {(said + process.stdout.read()).decode()}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kill(self._process)
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def faults(self) -> dict[str, int]:
        """How often each fault happened so far."""
        return self._control({})

    def set_chances(self, chances: Chances) -> None:
        """Use other chances from now on."""
        self._control({"chances": asdict(chances)})

    def outage(self, seconds: float | None = None) -> None:
        """Break every connection and refuse new ones, for some seconds or until `restore`."""
        self._control({"outage": seconds})

    def restore(self) -> None:
        """End an outage."""
        self._control({"restore": True})

    def stop(self) -> dict[str, int]:
        """End the process by SIGTERM; how often each fault happened in its life."""
        assert self._process is not None
        self._process.terminate()
        said, _ = self._process.communicate(timeout=30)
        counters: dict[str, int] = json.loads(said.splitlines()[-1])
        return counters

    def _control(self, order: dict[str, Any]) -> dict[str, int]:
        with (
            socket.create_connection(("127.0.0.1", self._control_port), timeout=30) as connection,
            connection.makefile("rw") as lines,
        ):
            print(json.dumps(order), file=lines, flush=True)
            counters: dict[str, int] = json.loads(lines.readline())
        return counters


async def _obey(
    proxy: _Proxy, policy: RandomFaults, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """One connection to the control port."""
    try:
        while line := await reader.readline():
            order = json.loads(line)
            if "chances" in order:
                policy.chances = Chances(**order["chances"])
            if "outage" in order:
                proxy.outage(order["outage"])
            if "restore" in order:
                await proxy.listen()
            writer.write(json.dumps(proxy.counters).encode() + b"\n")
            await writer.drain()
    finally:
        writer.close()


async def _serve_until_terminated(options: argparse.Namespace) -> None:
    policy = RandomFaults(options.seed, Chances(**json.loads(options.chances)))
    port = options.listen or free_port()
    proxy = _Proxy(options.upstream, policy, port)
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    control_port = options.control or free_port()
    control = await asyncio.start_server(
        lambda reader, writer: _obey(proxy, policy, reader, writer), "127.0.0.1", control_port
    )
    await proxy.listen()
    print(json.dumps({"listen": port, "control": control_port}), flush=True)
    await terminated.wait()
    control.close()
    await proxy.stop()
    print(json.dumps(proxy.counters), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A proxy that fails, in front of an S3 server.")
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--listen", type=int, default=0, metavar="PORT")
    parser.add_argument("--control", type=int, default=0, metavar="PORT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chances", default="{}", metavar="JSON")
    asyncio.run(_serve_until_terminated(parser.parse_args()))


if __name__ == "__main__":
    main()
