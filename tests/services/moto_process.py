"""moto's S3 server in a process of its own, for clients in other processes.

moto keeps its objects in memory, so a killed one has lost everything. What a client sees of a server that
dies and returns with its state is had in two ways: `pause` stops it in the middle of whatever it does, and
an outage of the proxy in front of it (services/tcp_proxy.py) breaks every connection and refuses new ones.
"""

import argparse
import os
import signal
import subprocess
import sys
from types import TracebackType
from urllib.parse import urlsplit

from services.moto import moto_server
from services.processes import free_port, kill, listens, start
from services.s3_server import S3Server
from services.waiting import eventually


class MotoProcess(S3Server):
    """An S3 endpoint at `url` for as long as the `with` block lasts."""

    def __init__(self) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "MotoProcess":
        command = [sys.executable, "-m", "services.moto_process", str(urlsplit(self.url).port)]
        process = self._process = start(command)
        try:
            eventually(lambda: process.poll() is not None or listens(self.url), 60.0)
            assert process.poll() is None, f"moto ended with {process.returncode}"
        except BaseException:
            kill(process)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kill(self._process)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def pause(self) -> None:
        """Stop it: connections are still taken, by the kernel, and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Go on where it stopped: requests that were sent meanwhile are still carried out."""
        os.kill(self.pid, signal.SIGCONT)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    moto_server(parser.parse_args().port).serve_forever()


if __name__ == "__main__":
    main()
