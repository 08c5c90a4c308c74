"""Each process's own HTTP port: /metrics, /livez (its own loop only) and /readyz."""

import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from penstock.common.errors import ConfigError
from penstock.common.logs import LOGGER
from penstock.common.metrics import REGISTRY

STALLED_AFTER_SECONDS = 300.0
"""A loop that has not beaten for this long is not alive."""


class Health:
    """What the probes answer. The process's loop calls `beat`; `ready` is set when it can work."""

    def __init__(self) -> None:
        self.ready = False
        self._last_beat = time.monotonic()

    def beat(self) -> None:
        self._last_beat = time.monotonic()

    @property
    def alive(self) -> bool:
        return time.monotonic() - self._last_beat < STALLED_AFTER_SECONDS


class HealthServer:
    """Serves a `Health` and the metrics registry until closed.

    Args:
        port: TCP port; 0 takes a free one, −1 serves nothing.
    """

    def __init__(self, health: Health, host: str, port: int) -> None:
        self.port = -1
        if port < 0:
            self._server = None
            return
        try:
            self._server = _Server((host, port), _handler(health))
        except OSError as error:
            raise ConfigError(
                f"metrics.port: cannot listen on {host}:{port}: {error.strerror}; choose another port"
            ) from error
        self.port = self._server.server_address[1]
        # a short poll, so that closing does not hold a stopping process up
        serve = partial(self._server.serve_forever, poll_interval=0.05)
        threading.Thread(target=serve, name="health", daemon=True).start()

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no matter; its traceback would stand between the lines of the log."""
        LOGGER.debug("answering %s failed", client_address, exc_info=True)


def _handler(health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?", 1)[0]
            if path == "/metrics":
                self._answer(200, generate_latest(REGISTRY), CONTENT_TYPE_LATEST)
            elif path == "/livez":
                self._probe(health.alive, "the loop has stalled")
            elif path == "/readyz":
                self._probe(health.ready, "not ready yet")
            else:
                self._answer(404, b"try /metrics, /livez or /readyz\n", "text/plain")

        def _probe(self, well: bool, complaint: str) -> None:
            self._answer(200 if well else 503, b"ok\n" if well else f"{complaint}\n".encode(), "text/plain")

        def _answer(self, status: int, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes are not worth a line each."""

    return Handler
