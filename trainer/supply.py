"""Where a worker learns that its next chunk is there: the feed, and the store when the feed is silent."""

import threading
import time
from collections.abc import Callable

import redis

from penstock.common import metrics
from penstock.common.errors import DataError
from penstock.common.logs import LOGGER
from penstock.store.joined import JoinedDataset
from penstock.store.queue import Feed
from penstock.trainer.mending import Mender, Stopped

BLOCK_MS = 500
"""How long one read of the feed waits: short, so that a stop is noticed."""
REMIND_SECONDS = 60.0
"""A worker that waits for a chunk says so this often."""


class Supply:
    """Blocks until the chunk of a position is committed.

    The worker knows which (position, chunk) comes next. Lower entries in the feed are skipped; a higher
    one or another chunk means that the feed is wrong (Redis went back in time) and it is rebuilt. When
    the feed is silent although the commit exists, the worker feeds itself. Redis may be away: then
    only the store is asked.

    A producer knows its own dataset only, so it stops feeding before another one's chunk. The feed is silent
    then, and the worker goes on by itself.

    Args:
        data: the run's.
        mender: has chunks made that are missing or damaged.
        register: lets producers know of the feed, as often as may be needed.
        beat: called whenever a poll was answered.
    """

    def __init__(
        self,
        feed: Feed,
        data: JoinedDataset,
        mender: Mender,
        register: Callable[[], None],
        stop: threading.Event,
        beat: Callable[[], None],
    ) -> None:
        self.waiting_for: str | None = None
        """The chunk that the worker waits for, as messages call it."""
        self._feed = feed
        self._data = data
        self._mender = mender
        self._register = register
        self._stop = stop
        self._beat = beat
        self._fed: dict[int, int] = {}

    def await_chunk(self, position: int, chunk: int) -> None:
        """Return once `chunk` is committed.

        Raises:
            Stopped: the worker is to stop.
        """
        self.waiting_for = self._data.name_of(chunk)
        reminded = time.monotonic()
        while not self._stop.is_set():
            if self.is_there(position, chunk):
                self.waiting_for = None
                return
            if time.monotonic() - reminded > REMIND_SECONDS:
                reminded = time.monotonic()
                self._remind(chunk)
        raise Stopped

    def is_there(self, position: int, chunk: int) -> bool:
        """Whether the chunk of a position is committed: one look, which may block for a moment."""
        return self._fed.pop(position, None) == chunk or self._poll(position, chunk)

    def mend(self, chunk: int, error: DataError) -> None:
        """See `Mender.mend`."""
        self._mender.mend(chunk, error)
        self._beat()

    def _remind(self, chunk: int) -> None:
        name = self._data.name_of(chunk)
        if self._mender.someone_produces(chunk):
            LOGGER.info("waiting for %s, which producers have yet to make", name)
        else:
            LOGGER.warning("waiting for %s, and no producer is there: start one", name)
            self._mender.ask(chunk)

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
                self._fed = {}
                self._feed.rebuild(position)
        except redis.RedisError as error:
            LOGGER.warning("the feed cannot be read, asking the store: %s", error)
            self._stop.wait(BLOCK_MS / 1000)
        return self._committed(chunk)

    def _committed(self, chunk: int) -> bool:
        there = self._data.is_committed(chunk)
        self._beat()
        if there:
            self._feed_ahead()
        return there

    def _feed_ahead(self) -> None:
        try:
            self._feed.open()
            # Redis may have lost it with everything else
            self._register()
            self._feed.advance(self._data.is_committed)
        except redis.RedisError as error:
            LOGGER.warning("the feed cannot be advanced: %s", error)
