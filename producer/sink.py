"""Where finished chunks go: stored, committed, announced, while the next one is being computed."""

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import redis

from penstock.common import metrics
from penstock.common.errors import DataError
from penstock.common.logs import LOGGER
from penstock.common.redis import Client
from penstock.producer.work import Task, Work
from penstock.store.chunks import Chunk
from penstock.store.layout import FORMAT_VERSION, commit_key, quarantine_key
from penstock.store.queue import registered_feeds
from penstock.store.retention import delete_chunk
from penstock.store.writer import DatasetWriter

MISMATCHES = 3
"""Recomputations that are not what was committed, all by one producer, before a chunk is quarantined."""


class Sink:
    """Stores, commits and announces chunks in the background, one at a time.

    Args:
        writer: the dataset.
        work: told what is done.
        client: Redis, for the feeds of runs that read the dataset.
        worker: this process's name, for provenance.
        on_commit: called with (index, rows) after each commit made here.
        pool: does the work; a thread of its own by default.
    """

    def __init__(
        self,
        writer: DatasetWriter,
        work: Work,
        client: Client,
        feeds_key: str,
        worker: str,
        on_commit: Callable[[int, int], None],
        pool: Executor | None = None,
    ) -> None:
        self._writer = writer
        self._work = work
        self._redis = client
        self._feeds_key = feeds_key
        self._worker = worker
        self._on_commit = on_commit
        self._committed: set[int] = set()
        self._mismatches: dict[int, int] = {}
        self._pool = pool or ThreadPoolExecutor(1, thread_name_prefix="sink")
        self._pending: Future[None] | None = None

    def put(self, task: Task, chunk: Chunk) -> None:
        """Hand a chunk over; blocks while the one before it is still being stored.

        Raises whatever went wrong with the one before.
        """
        self._settle()
        self._pending = self._pool.submit(self._mend if task.repair else self._store, task, chunk)

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

    def _store(self, task: Task, chunk: Chunk) -> None:
        started = time.monotonic()
        commit, ours = self._writer.write(task.index, chunk, self._worker)
        seconds = time.monotonic() - started
        metrics.chunk_write_seconds.observe(seconds)
        if ours:
            metrics.chunks_committed.inc()
            metrics.producer_rows.inc(commit.rows)
            self._on_commit(task.index, commit.rows)
        self._clean_up(task.index)
        self._committed.add(task.index)
        self._tell(task)

    def _clean_up(self, index: int) -> None:
        """So slow that the chunk was made, read and deleted meanwhile: take our objects away again."""
        try:
            if not self._work.retention.is_needed(index):
                delete_chunk(self._writer.store, self._writer.specs, index)
        except DataError as error:
            # nobody knows what a damaged reader still needs
            LOGGER.error("chunk %d is not deleted: %s", index, error)

    def _mend(self, task: Task, chunk: Chunk) -> None:
        index = task.index
        if self._writer.mend(index, chunk):
            LOGGER.info("chunk %d is whole again", index)
            metrics.chunks_repaired.inc()
            self._mismatches.pop(index, None)
            self._clean_up(index)
        else:
            self._mismatches[index] = self._mismatches.get(index, 0) + 1
            LOGGER.error("chunk %d was made again and is not what was committed", index)
            if self._mismatches[index] < MISMATCHES:
                self._give_back(task)
                return
            self._quarantine(index)
        self._tell(task)

    def _quarantine(self, index: int) -> None:
        reason = f"{MISMATCHES} recomputations by {self._worker} are not what was committed"
        record = {"format_version": FORMAT_VERSION, "index": index, "reason": reason, "time": time.time()}
        self._writer.store.create_guarded(quarantine_key(index), record)
        LOGGER.error("chunk %d is quarantined: %s", index, reason)

    def _give_back(self, task: Task) -> None:
        try:
            self._work.give_back(task)
        except redis.RedisError as error:
            LOGGER.warning("the repair of chunk %d will be asked for again: %s", task.index, error)

    def _tell(self, task: Task) -> None:
        try:
            self._work.done(task)
            self._announce()
        except redis.RedisError as error:
            # the commit is what counts; workers find it in the store
            LOGGER.warning("chunk %d is stored but could not be announced: %s", task.index, error)

    def _announce(self) -> None:
        for feed in registered_feeds(self._redis, self._feeds_key):
            feed.advance(feed.spec.among_all(self._is_committed))

    def _is_committed(self, index: int) -> bool:
        if index not in self._committed and self._writer.store.exists(commit_key(index)):
            self._committed.add(index)
        return index in self._committed
