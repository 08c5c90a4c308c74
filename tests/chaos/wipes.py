"""Redis as the harness sees it: looked at, wiped, killed and put back to an older state."""

import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from chaos.victims import runs, tell
from penstock.deploy.state import embedded_redis_url
from services.waiting import eventually

COPIES_KEPT = 3


class Queue:
    """The embedded server of the experiment in a work directory."""

    def __init__(self, workdir: Path, copies: Path) -> None:
        self._workdir = workdir
        self._copies = copies
        self._taken = 0

    def pid(self) -> int | None:
        """The server's own process id; None while it does not answer."""
        with _connected(self._workdir) as client:
            return None if client is None else int(client.info("server")["process_id"])
        return None

    def kill(self) -> bool:
        pid = self.pid()
        return pid is not None and tell(pid, signal.SIGKILL)

    def wipe(self) -> bool:
        with _connected(self._workdir) as client:
            return client is not None and bool(client.flushall())
        return False

    def word(self, pid: int) -> dict[str, Any]:
        """What the worker of a process id says of itself; empty if nothing is known.

        Leases would tell less: once wiped, those of working trainers do not come back.
        """
        with _connected(self._workdir) as client:
            for key in client.scan_iter(f"*:presence:*-{pid}-*") if client is not None else ():
                said: dict[str, Any] = json.loads(client.get(key) or "{}")
                return said
        return {}

    def copy(self) -> None:
        """Keep the server's files as they are now; they may be cut anywhere, as by a crash."""
        source = self._workdir / "valkey" / "appendonlydir"
        target = self._copies / str(self._taken)
        try:
            shutil.copytree(source, target)
        except (OSError, shutil.Error):  # a file was replaced meanwhile
            shutil.rmtree(target, ignore_errors=True)
            return
        self._taken += 1
        shutil.rmtree(self._copies / str(self._taken - 1 - COPIES_KEPT), ignore_errors=True)

    def has_copies(self) -> bool:
        return self._taken > 0

    def roll_back(self, random: random.Random, server: int) -> None:
        """Put one of the copies in place, once the server of a process id has ended."""
        eventually(lambda: not runs(server))
        place = self._workdir / "valkey" / "appendonlydir"
        shutil.rmtree(place)
        kept = range(max(0, self._taken - COPIES_KEPT), self._taken)
        shutil.copytree(self._copies / str(random.choice(kept)), place)


@contextmanager
def _connected(workdir: Path) -> Iterator[Any]:
    """A client, or None; ends silently if the server stops answering."""
    try:
        url = embedded_redis_url(workdir)
    except FileNotFoundError:  # removed between two looks
        url = None
    if url is None:
        yield None
        return
    with redis.Redis.from_url(url, protocol=2, decode_responses=True, socket_timeout=2.0) as client:
        try:
            yield client
        except redis.RedisError:
            return
