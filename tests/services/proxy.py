"""An HTTP proxy that fails on request: lost and cut replies, refusals, a dropped header.

It speaks HTTP/1.1 with kept connections, as a real S3 endpoint does: what a client does silently
on a reused connection shows only there.
"""

import http.client
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class FaultProxy:
    """Stands in front of the server at `upstream`. Set the fault attributes between calls."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.requests: list[tuple[str, str]] = []
        """(method, path) of every request that arrived."""
        self.answers: Iterator[tuple[int, str]] = iter(())
        """(status, S3 error code) given in place of forwarding, one per request until used up."""
        self.strip_if_none_match = False
        self.strip_metadata = False
        self.lost_put_replies = 0
        """Close the connection after this many forwarded PUTs instead of answering."""
        self.cut_get_replies = 0
        """Send only half of this many GET bodies."""
        self._lock = threading.Lock()

    def __enter__(self) -> "FaultProxy":
        proxy = self

        class Handler(_Handler):
            faults = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def puts(self, key: str) -> int:
        """How many PUTs of an object arrived."""
        with self._lock:
            return sum(m == "PUT" and p.endswith(f"/{key}") for m, p in self.requests)

    def arrived(self, method: str, path: str) -> tuple[int, str] | None:
        with self._lock:
            self.requests.append((method, path))
            return next(self.answers, None)

    def take(self, fault: str) -> bool:
        """Use up one of a counted fault."""
        with self._lock:
            left: int = getattr(self, fault)
            setattr(self, fault, max(0, left - 1))
            return left > 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: FaultProxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        faults = self.faults
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if answer := faults.arrived(self.command, urlsplit(self.path).path):
            status, code = answer
            text = f"<Error><Code>{code}</Code><Message>{code} injected</Message></Error>"
            return self._reply(status, {"Content-Type": "application/xml"}, text.encode())
        headers = dict(self.headers.items())
        for name in list(headers):
            if (name.lower() == "if-none-match" and faults.strip_if_none_match) or (
                name.lower().startswith("x-amz-meta-") and faults.strip_metadata
            ):
                del headers[name]
        upstream = http.client.HTTPConnection(faults.upstream)
        try:
            upstream.request(self.command, self.path, body, headers)
            reply = upstream.getresponse()
            content = reply.read()
        finally:
            upstream.close()
        if self.command == "PUT" and faults.take("lost_put_replies"):
            return self._hang_up()
        kept = {k: v for k, v in reply.getheaders() if k.lower() not in _HOP_BY_HOP}
        length = reply.getheader("Content-Length") if self.command == "HEAD" else None
        self._reply(reply.status, kept, content, length)

    def _reply(self, status: int, headers: dict[str, str], content: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command == "GET" and status == 200 and self.faults.take("cut_get_replies"):
            self.wfile.write(content[: len(content) // 2])
            return self._hang_up()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve
