"""moto's S3 server in this process."""

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from services.s3_server import S3Server


class _QuietHandler(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: object) -> None:
        pass


def moto_server(port: int = 0) -> BaseWSGIServer:
    """moto, listening but not yet serving."""
    application = DomainDispatcherApplication(create_backend_app)
    writing = threading.Lock()

    def serialised(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        # moto checks If-None-Match and stores in two steps; a real server does it in one.
        if environ["REQUEST_METHOD"] != "PUT":
            reply: Iterable[bytes] = application(environ, start_response)
            return reply
        with writing:
            return list(application(environ, start_response))

    return make_server("127.0.0.1", port, serialised, threaded=True, request_handler=_QuietHandler)


class MotoServer(S3Server):
    """An S3 endpoint at `url` for as long as the `with` block lasts."""

    def __enter__(self) -> "MotoServer":
        self._server = moto_server()
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
