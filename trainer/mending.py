"""What a worker does about a chunk that it cannot read: producers are asked to make it again."""

import threading
import time
from collections.abc import Sequence

import redis

from penstock.common.errors import DataError, Detached
from penstock.common.logs import LOGGER
from penstock.store.joined import JoinedDataset
from penstock.store.queue import ChunkQueue, Presence
from penstock.store.retention import detached_because

POLL_SECONDS = 1.0
"""Pause between looks at a repair that was asked for."""
ALONE_SECONDS = 120.0
"""How long a repair waits while no producer is there."""
TRIES = 5
"""Repairs of one chunk by which it must have become readable."""


class Stopped(Exception):
    """The worker is stopping; nothing is wrong."""


class Mender:
    """Asks for repairs and waits for them. Safe to use from several threads.

    Args:
        run_id: the run that reads.
        repairs: the queue of chunks to be made again, of each dataset that is read.
        presence: tells whether a producer is there.
    """

    def __init__(
        self,
        data: JoinedDataset,
        run_id: str,
        repairs: Sequence[ChunkQueue],
        presence: Presence,
        stop: threading.Event,
    ) -> None:
        self._data = data
        self._run = run_id
        self._repairs = repairs
        self._presence = presence
        self._stop = stop
        self._tries: dict[int, int] = {}

    def mend(self, chunk: int, error: DataError) -> None:
        """Return when a chunk may be readable again, or is quarantined.

        Raises:
            Detached: it is gone, because the run was detached.
            DataError: nobody can make it again.
            Stopped: the worker is to stop.
        """
        dataset, index = self._data.locate(chunk)
        because = detached_because(dataset.store, self._run)
        if because is not None:
            raise Detached(
                f"run {self._run} was detached from {dataset.url} ({because}) and chunk {index} is gone"
            )
        self._tries[chunk] = self._tries.get(chunk, 0) + 1
        if self._tries[chunk] > TRIES:
            raise type(error)(f"{error}; it was made again {TRIES} times and still cannot be read")
        name = self._data.name_of(chunk)
        LOGGER.warning("%s; asking for %s to be made again", error, name)
        self.ask(chunk)
        alone_since = time.monotonic()
        while not self._stop.wait(POLL_SECONDS):
            if not self._is_open(chunk):
                return
            if self.someone_produces(chunk):
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > ALONE_SECONDS:
                raise type(error)(
                    f"{error}; no producer is there to make {name} again: start one, or call "
                    "`penstock repair CONFIG`"
                )
        raise Stopped

    def ask(self, chunk: int) -> None:
        """Ask for a chunk to be made (again)."""
        queue, index = self._queue(chunk)
        try:
            queue.ask(index)
        except redis.RedisError as error:
            name = self._data.name_of(chunk)
            LOGGER.warning("the repair of %s cannot be asked for: %s", name, error)

    def someone_produces(self, chunk: int) -> bool:
        """Whether a producer of the dataset that holds a chunk has shown itself lately."""
        url = self._data.locate(chunk)[0].url
        try:
            words = self._presence.everyone().values()
        except redis.RedisError:
            return False
        return any(w.get("kind") == "producer" and w.get("dataset") == url for w in words)

    def _is_open(self, chunk: int) -> bool:
        queue, index = self._queue(chunk)
        try:
            return queue.is_open(index)
        except redis.RedisError:
            return True

    def _queue(self, chunk: int) -> tuple[ChunkQueue, int]:
        """Where the repair of a chunk is asked for, and as which index."""
        return self._repairs[self._data.part_of(chunk)], self._data.locate(chunk)[1]
