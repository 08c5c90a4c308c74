"""What processes share: their names, how they are asked to stop, whose turn it is."""

import fcntl
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable

from penstock.common.logs import LOGGER

SUPERVISED_VARIABLE = "PENSTOCK_SUPERVISED"
"""Set for a child whose standard input closes when its supervisor ends."""
STOP_SECONDS = 60.0
"""How long a process may take to stop before it is killed."""


def worker_name(kind: str) -> str:
    """A name unique to this process start, readable in status: kind-host-pid-random."""
    return f"{kind}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def stop_on_signals(again: Callable[[], None] | None = None) -> threading.Event:
    """An event set by SIGTERM or SIGINT: finish what is in hand and exit 0.

    Args:
        again: called in the main thread, between any two of its steps, if a second signal comes.
    """
    stop = threading.Event()

    def on_signal(*_: object) -> None:
        if stop.is_set() and again is not None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            again()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop


def follow_supervisor(seconds: float = STOP_SECONDS) -> None:
    """Under a supervisor, stop when it ends, as if it had sent SIGTERM; else do nothing.

    The supervisor holds the other end of our standard input, which the system closes even if it was
    killed with SIGKILL. It can no longer kill us if we do not stop within `seconds`: we do it ourselves.
    """
    if os.environ.get(SUPERVISED_VARIABLE):
        threading.Thread(target=_follow, args=(seconds,), name="supervisor", daemon=True).start()


def _follow(seconds: float) -> None:
    while os.read(0, 4096):
        pass
    LOGGER.warning("the supervisor has ended; stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
    LOGGER.warning("not stopped within %.0f s; exiting", seconds)
    os._exit(1)


def try_lock(file: int) -> bool:
    """Lock an open file for this process and those that inherit it; False if others hold the lock.

    The system takes the lock away when the last holder ends, however it ends. True on file systems
    without locks: there, nothing keeps a second process out.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        LOGGER.warning("no file locks here (%s); run only one penstock in this directory", error.strerror)
    return True
