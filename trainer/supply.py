"""Where a worker learns that its next chunk is there: the feed, and the store when the feed is silent."""

import threading
from collections.abc import Callable

import redis

from penstock.common import metrics
from penstock.common.logs import LOGGER
from penstock.store.layout import commit_key
from penstock.store.objects import ObjectStore
from penstock.store.queue import Feed

BLOCK_MS = 500
"""How long one read of the feed waits: short, so that a stop is noticed."""


class Stopped(Exception):
    """The worker is stopping; nothing is wrong."""


class Supply:
    """Blocks until the chunk of a position is committed.

    The worker knows which (position, chunk) comes next. Lower entries in the feed are skipped; a higher
    one or another chunk means that the feed is wrong (Redis went back in time) and it is rebuilt. When
    the feed is silent although the commit exists, the worker feeds itself. Redis may be away: then
    only the store is asked.

    Args:
        store: the dataset's.
        beat: called whenever a poll was answered.
    """

    def __init__(
        self, feed: Feed, store: ObjectStore, stop: threading.Event, beat: Callable[[], None]
    ) -> None:
        self.waiting_for: int | None = None
        self._feed = feed
        self._store = store
        self._stop = stop
        self._beat = beat
        self._fed: dict[int, int] = {}

    def await_chunk(self, position: int, chunk: int) -> None:
        """Return once `chunk` is committed.

        Raises:
            Stopped: the worker is to stop.
        """
        self.waiting_for = chunk
        while not self._stop.is_set():
            if self._fed.pop(position, None) == chunk or self._poll(position, chunk):
                self.waiting_for = None
                return
        raise Stopped

    def _poll(self, position: int, chunk: int) -> bool:
        try:
            entries = self._feed.read(position, BLOCK_MS)
            self._fed = {p: c for p, c in entries if p > position}
            if entries and entries[0] == (position, chunk):
                self._beat()
                return True
            if entries:
                LOGGER.warning("feed %s does not match the run's order: rebuilding", self._feed.spec.key)
                metrics.queue_rebuilds.inc()
                self._feed.rebuild()
        except redis.RedisError as error:
            LOGGER.warning("the feed cannot be read, asking the store: %s", error)
            self._stop.wait(BLOCK_MS / 1000)
        return self._committed(chunk)

    def _committed(self, chunk: int) -> bool:
        there = self._store.exists(commit_key(chunk))
        self._beat()
        if there:
            self._feed_ahead()
        return there

    def _feed_ahead(self) -> None:
        try:
            self._feed.open()
            self._feed.advance(lambda index: self._store.exists(commit_key(index)))
        except redis.RedisError as error:
            LOGGER.warning("the feed cannot be advanced: %s", error)
