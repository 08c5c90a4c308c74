"""Which chunk to make next: claims from the queue, which is kept in agreement with the store."""

import threading
import time
from collections.abc import Callable

import redis

from penstock.common import metrics
from penstock.common.errors import Unavailable
from penstock.common.logs import LOGGER
from penstock.store.commits import committed_indices
from penstock.store.dataset import DatasetWriter
from penstock.store.layout import commit_key
from penstock.store.queue import ChunkQueue

RECONCILE_SECONDS = 30.0
"""The queue is compared with the store this often, whatever happens."""
REDIS_PATIENCE_SECONDS = 300.0
"""A queue silent for this long ends the producer."""


class Work:
    """Claims chunk indices, reconciling the queue with the store.

    Args:
        queue: where indices are claimed.
        writer: the dataset.
        beat: called whenever the queue answered.
    """

    def __init__(self, queue: ChunkQueue, writer: DatasetWriter, beat: Callable[[], None]) -> None:
        self.held: set[int] = set()
        self.waiting = ""
        self._queue = queue
        self._writer = writer
        self._beat = beat
        self._reconciled = -RECONCILE_SECONDS
        self._answered = time.monotonic()

    def next(self, stop: threading.Event) -> int | None:
        """Claim the next index, waiting for others' claims; None when all chunks are committed."""
        while not stop.is_set():
            try:
                if self._complete():
                    return None
                index = self._queue.claim(self._writer.manifest.n_chunks)
                self._answered = time.monotonic()
                self._beat()
                if index is not None and self._writer.store.exists(commit_key(index)):
                    self._queue.done(index)
                    continue
            except redis.RedisError as error:
                self._survive(error)
                self._wait(stop, 1.0, "redis")
                continue
            if index is None:
                self._wait(stop, 0.5, "claimed by others")
                self._reconciled = -RECONCILE_SECONDS
            else:
                self.held.add(index)
                return index
        return None

    def renew(self) -> None:
        """Prolong the leases of what is being made."""
        for index in list(self.held):
            self._queue.renew(index)

    def done(self, index: int) -> None:
        """A chunk of ours is committed."""
        self.held.discard(index)
        self._queue.done(index)

    def release(self) -> None:
        """Give everything back."""
        for index in list(self.held):
            self._queue.release(index)

    def _complete(self) -> bool:
        if time.monotonic() - self._reconciled < RECONCILE_SECONDS:
            return False
        planned = self._writer.manifest.n_chunks
        committed = committed_indices(self._writer.store, planned)
        if len(committed) == planned:
            return True
        self._queue.reconcile(planned, committed)
        self._reconciled = time.monotonic()
        return False

    def _survive(self, error: redis.RedisError) -> None:
        silent = time.monotonic() - self._answered
        if silent > REDIS_PATIENCE_SECONDS:
            raise Unavailable(f"redis has not answered for {silent:.0f} s: {error}") from error
        LOGGER.warning("redis does not answer, trying again: %s", error)

    def _wait(self, stop: threading.Event, seconds: float, reason: str) -> None:
        self.waiting = reason
        started = time.monotonic()
        stop.wait(seconds)
        metrics.producer_blocked_seconds.labels(reason).inc(time.monotonic() - started)
        self.waiting = ""
