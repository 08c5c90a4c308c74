"""The produce loop: claimed index → tokens → activations → chunk → objects → commit → announce.

Any number of producers work on one dataset. Leases keep them from making the same chunk; when a lease
is wrong (a slow producer, a lost Redis) a chunk is made twice and the first writer wins.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import redis

from penstock.common import metrics
from penstock.common.errors import Unavailable
from penstock.common.logs import LOGGER
from penstock.common.redis import Client
from penstock.producer.source import Source
from penstock.store.commits import committed_indices
from penstock.store.dataset import Chunk, DatasetWriter
from penstock.store.layout import commit_key, provenance_key
from penstock.store.queue import ChunkQueue, registered_feeds
from penstock.store.records import encode_record

RECONCILE_SECONDS = 30.0
"""The queue is compared with the store this often, whatever happens."""
REDIS_PATIENCE_SECONDS = 300.0
"""A queue silent for this long ends the producer."""


def produce(work: "Work", source: Source, sink: "Sink", stop: threading.Event) -> None:
    """Make chunks until the dataset is complete or `stop` is set."""
    while not stop.is_set():
        index = work.next(stop)
        if index is None:
            break
        chunk = source.chunk(index)
        sink.put(index, chunk)
    sink.finish()


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
