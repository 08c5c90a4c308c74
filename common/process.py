"""What a long-running process shares: its name and how it is asked to stop."""

import os
import signal
import socket
import threading
import uuid


def worker_name(kind: str) -> str:
    """A name unique to this process start, readable in status: kind-host-pid-random."""
    return f"{kind}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def stop_on_signals() -> threading.Event:
    """An event set by SIGTERM or SIGINT: finish what is in hand and exit 0."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
