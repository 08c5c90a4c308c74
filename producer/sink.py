"""Where finished chunks go: stored, committed, announced, while the next one is being computed."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import redis

from penstock.common import metrics
from penstock.common.logs import LOGGER
from penstock.common.redis import Client
from penstock.producer.work import Work
from penstock.store.dataset import Chunk, DatasetWriter
from penstock.store.layout import commit_key, provenance_key
from penstock.store.queue import registered_feeds
from penstock.store.records import encode_record


class Sink:
    """Stores, commits and announces chunks in the background, one at a time.

    Args:
        writer: the dataset.
        work: told what is done.
        client: Redis, for the feeds of runs that read the dataset.
        worker: this process's name, for provenance.
        on_commit: called with (index, rows) after each commit made here.
    """

    def __init__(
        self,
        writer: DatasetWriter,
        work: Work,
        client: Client,
        feeds_key: str,
        worker: str,
        on_commit: Callable[[int, int], None],
    ) -> None:
        self._writer = writer
        self._work = work
        self._redis = client
        self._feeds_key = feeds_key
        self._worker = worker
        self._on_commit = on_commit
        self._committed: set[int] = set()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sink")
        self._pending: Future[None] | None = None

    def put(self, index: int, chunk: Chunk) -> None:
        """Hand a chunk over; blocks while the one before it is still being stored.

        Raises whatever went wrong with the one before.
        """
        self._settle()
        self._pending = self._pool.submit(self._store, index, chunk)

    def finish(self) -> None:
        """Wait for the last chunk."""
        self._settle()
        self._pool.shutdown()

    def _settle(self) -> None:
        if self._pending is not None:
            started = time.monotonic()
            self._pending.result()
            self._pending = None
            waited = time.monotonic() - started
            metrics.producer_blocked_seconds.labels("store").inc(waited)

    def _store(self, index: int, chunk: Chunk) -> None:
        started = time.monotonic()
        commit, ours = self._writer.write(index, chunk)
        seconds = time.monotonic() - started
        metrics.chunk_write_seconds.observe(seconds)
        if ours:
            metrics.chunks_committed.inc()
            metrics.producer_rows.inc(commit.rows)
            self._writer.store.put(
                provenance_key(index, self._worker),
                encode_record({"index": index, "worker": self._worker, "time": time.time()}),
            )
            self._on_commit(index, commit.rows)
        self._committed.add(index)
        try:
            self._work.done(index)
            self._announce()
        except redis.RedisError as error:
            # the commit is what counts; workers find it in the store
            LOGGER.warning("chunk %d is committed but could not be announced: %s", index, error)

    def _announce(self) -> None:
        for feed in registered_feeds(self._redis, self._feeds_key):
            feed.advance(self._is_committed)

    def _is_committed(self, index: int) -> bool:
        if index not in self._committed and self._writer.store.exists(commit_key(index)):
            self._committed.add(index)
        return index in self._committed
