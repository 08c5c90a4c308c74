"""moto's S3 server in this process, with buckets made over plain HTTP."""

import threading
import urllib.request
import uuid
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class _QuietHandler(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: object) -> None:
        pass


class MotoServer:
    """An S3 endpoint at `url` for as long as the `with` block lasts."""

    url: str

    def __enter__(self) -> "MotoServer":
        application = DomainDispatcherApplication(create_backend_app)
        writing = threading.Lock()

        def serialised(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            # moto checks If-None-Match and stores in two steps; a real server does it in one.
            if environ["REQUEST_METHOD"] != "PUT":
                reply: Iterable[bytes] = application(environ, start_response)
                return reply
            with writing:
                return list(application(environ, start_response))

        self._server = make_server("127.0.0.1", 0, serialised, threaded=True, request_handler=_QuietHandler)
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

    def make_bucket(self) -> str:
        """A new, empty bucket; its name."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        urllib.request.urlopen(request).close()
        return name

    def read(self, bucket: str, key: str) -> bytes:
        """An object's bytes, without any S3 library."""
        # moto takes any signature, but a private bucket wants one.
        signature = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/day/us-east-1/s3/x"}
        request = urllib.request.Request(f"{self.url}/{bucket}/{key}", headers=signature)
        with urllib.request.urlopen(request) as reply:
            return bytes(reply.read())
