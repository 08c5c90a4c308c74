"""What to make next: claims from the queue, which is kept in agreement with the store."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from penstock.common import metrics
from penstock.common.errors import DataError, Unavailable
from penstock.common.logs import LOGGER
from penstock.store.commits import list_commits
from penstock.store.index import index_block
from penstock.store.layout import commit_key
from penstock.store.queue import ChunkQueue
from penstock.store.retention import Retention
from penstock.store.writer import DatasetWriter

RECONCILE_SECONDS = 30.0
"""The queue is compared with the store this often, whatever happens."""
IDLE_SECONDS = 2.0
"""…and this often while there is nothing to claim."""
POLL_SECONDS = 0.5
"""Pause between looks at the queue while there is nothing to claim."""
REDIS_PATIENCE_SECONDS = 300.0
"""A queue silent for this long ends the producer."""
REMIND_SECONDS = 60.0
"""A producer that waits says for whom this often."""


@dataclass(frozen=True)
class Task:
    """A claimed chunk: to be made, or (`repair`) to be made again as it was committed."""

    index: int
    repair: bool = False


class Work:
    """Claims chunks, reconciling the queue with the store. Repairs come first, and no budget holds them up.

    Args:
        queue: where chunks to make are claimed.
        repairs: where chunks to make again are claimed.
        writer: the dataset.
        retention: says how far chunks may be made.
        beat: called whenever the queue answered.
    """

    def __init__(
        self,
        queue: ChunkQueue,
        repairs: ChunkQueue,
        writer: DatasetWriter,
        retention: Retention,
        beat: Callable[[], None],
    ) -> None:
        self.held: set[Task] = set()
        self.waiting = ""
        self.retention = retention
        self._queues = {False: queue, True: repairs}
        self._writer = writer
        self._beat = beat
        self._handing = threading.Lock()
        self._reconciled = -RECONCILE_SECONDS
        self._answered = time.monotonic()
        self._reminded = -REMIND_SECONDS
        self._complaint = ""

    def next(self, stop: threading.Event) -> Task | None:
        """Claim the next chunk, waiting if need be; None when all chunks are committed and whole."""
        while not stop.is_set():
            try:
                complete = self._reconcile()
                task, idle = self._take()
                self._answered = time.monotonic()
                self._beat()
            except redis.RedisError as error:
                self._survive(error)
                self._wait(stop, 1.0, "redis")
                continue
            if task is not None:
                return task
            if complete and idle:
                return None
            if self.retention.limit < self._writer.manifest.n_chunks:
                self._remind()
                self._wait(stop, POLL_SECONDS, "budget")
                self._advance()
            else:
                self._wait(stop, POLL_SECONDS, "claimed by others")
            self._reconciled = min(self._reconciled, time.monotonic() - RECONCILE_SECONDS + IDLE_SECONDS)
        return None

    def renew(self) -> None:
        """Prolong the leases of what is being made."""
        for task in list(self.held):
            self._queues[task.repair].renew(task.index)

    def done(self, task: Task) -> None:
        """A chunk of ours is committed, or whole again."""
        self.held.discard(task)
        self._queues[task.repair].done(task.index)

    def give_back(self, task: Task) -> None:
        """Let a chunk be claimed again, at once."""
        with self._handing:
            self.held.discard(task)
            self._queues[task.repair].release(task.index)

    def release(self) -> None:
        """Give everything back."""
        for task in list(self.held):
            self.give_back(task)

    def _take(self) -> tuple[Task | None, bool]:
        """Claim a chunk, and say whether none is held: what is given back meanwhile is not overlooked."""
        with self._handing:
            task = self._claim()
            if task is not None:
                self.held.add(task)
            return task, not self.held

    def _claim(self) -> Task | None:
        n_chunks = self._writer.manifest.n_chunks
        while (index := self._queues[True].claim(n_chunks)) is not None:
            if not self.retention.is_deleted(index):
                return Task(index, repair=True)
            self._queues[True].done(index)
        while (index := self._queues[False].claim(self.retention.limit)) is not None:
            if not self._writer.store.exists(commit_key(index)):
                return Task(index)
            self._queues[False].done(index)
        return None

    def _reconcile(self) -> bool:
        """Compare the queue with the store if it is time to; whether all chunks are committed."""
        if time.monotonic() - self._reconciled < RECONCILE_SECONDS:
            return False
        planned = self._writer.manifest.n_chunks
        committed = list_commits(self._writer.store, planned)
        complete = len(committed.indices) == planned
        self._queues[False].reconcile(planned, committed.indices)
        self._advance()
        # one producer at a time; but who ends leaves nothing undone
        if committed.unindexed and (self._queues[False].lease_index() or complete):
            for block in committed.unindexed:
                self._index(block)
        self._reconciled = time.monotonic()
        return complete

    def _index(self, block: int) -> None:
        writer = self._writer
        if index_block(writer.store, writer.manifest, block, writer.pool, self._beat):
            LOGGER.info("the commits of block %d are indexed", block)

    def _advance(self) -> None:
        try:
            self.retention.advance()
        except DataError as error:
            # nobody knows what a damaged reader still needs: nothing is deleted until it is repaired
            if str(error) != self._complaint:
                LOGGER.error("nothing can be deleted: %s", error)
            self._complaint = str(error)

    def _survive(self, error: redis.RedisError) -> None:
        silent = time.monotonic() - self._answered
        if silent > REDIS_PATIENCE_SECONDS:
            raise Unavailable(f"redis has not answered for {silent:.0f} s: {error}") from error
        LOGGER.warning("redis does not answer, trying again: %s", error)

    def _remind(self) -> None:
        if time.monotonic() - self._reminded > REMIND_SECONDS:
            self._reminded = time.monotonic()
            LOGGER.info("the budget is used up; waiting for %s", self.retention.waiting_for)

    def _wait(self, stop: threading.Event, seconds: float, reason: str) -> None:
        self.waiting = f"{reason}: {self.retention.waiting_for}" if reason == "budget" else reason
        started = time.monotonic()
        stop.wait(seconds)
        metrics.producer_blocked_seconds.labels(reason).inc(time.monotonic() - started)
        self.waiting = ""
