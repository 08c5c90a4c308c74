"""What the training loop is seen by: metrics, heartbeats, status, and the queue's picture of the run."""

import threading
import time
from typing import TYPE_CHECKING, Any

import redis

from penstock.common import metrics
from penstock.common.errors import PenstockError
from penstock.common.heartbeat import Heartbeat
from penstock.common.logs import LOGGER
from penstock.store.heads import Head, newest_head
from penstock.store.queue import Feed, Presence, RunQueue
from penstock.trainer.gauges import RunGauges
from penstock.trainer.group import Group
from penstock.trainer.pending import reconcile_runs
from penstock.trainer.supply import Supply
from penstock.trainer.workplace import Workplace, forgiving

if TYPE_CHECKING:
    from penstock.trainer.judging.splicing.live import LiveEvaluation

RECONCILE_SECONDS = 15.0
"""The queue of runs is compared with the store this often."""


class Voice:
    """What the worker says of itself, for status and progress, and of its run, for /metrics."""

    def __init__(self, place: Workplace) -> None:
        self.gauges = RunGauges()
        self._presence = Presence(place.client, place.redis.prefix, place.worker)
        self._seconds = 3 * place.redis.lease_seconds
        self._word: dict[str, Any] = {"kind": "trainer", "port": place.port, "run": None}

    def say(self, **changes: Any) -> None:
        self._word |= changes
        forgiving(lambda: self._presence.tell(self._word, self._seconds))

    def leave(self) -> None:
        forgiving(self._presence.leave)


class RunObserver:
    """Metrics, heartbeats and the queue's picture of a run."""

    def __init__(
        self,
        queue: RunQueue,
        feed: Feed,
        heartbeat: Heartbeat,
        voice: Voice,
        supply: Supply,
        group: Group,
        place: Workplace,
        stop: threading.Event,
    ) -> None:
        self._queue = queue
        self._feed = feed
        self._heartbeat = heartbeat
        self._voice = voice
        self._supply = supply
        self._run = group.config.run_id
        self._rows_seen = group.rows
        self._place, self._runs, self._stop = place, place.runs, stop
        self._reconciled = time.monotonic()
        voice.gauges.begin(group.config)
        voice.gauges.figures(self._run, group.figures)
        if place.live is not None:
            place.live.begin(group.config)

    def stepped(self, group: Group, seconds: float) -> None:
        self._heartbeat.beat()
        metrics.sae_step_seconds.observe(seconds)
        metrics.sae_steps.labels(self._run).inc()

    def waited(self, group: Group, seconds: float) -> None:
        metrics.sae_data_wait_seconds.labels(self._run).inc(seconds)
        if seconds > 0.1:
            self._voice.say(waiting_for=self._supply.waiting_for)

    def window_ended(self, group: Group, seconds: float) -> None:
        metrics.sae_window_seconds.observe(seconds)
        metrics.sae_train_rows.labels(self._run).inc(group.rows - self._rows_seen)
        self._rows_seen = group.rows
        self._voice.gauges.figures(self._run, group.figures)
        self._voice.say(rows=group.rows, figures=group.figures, waiting_for=None)

    def committed(self, group: Group, head: Head, seconds: float) -> None:
        self._heartbeat.beat()
        metrics.sae_head_commit_seconds.observe(seconds)
        LOGGER.info("head %d at position %d of run %s", head.n, head.position, self._run)
        forgiving(lambda: self._queue.add(self._run, head.position))
        forgiving(lambda: self._feed.trim(head.position))
        live = self._place.live
        if live is not None and live.due(group) and not self._stop.is_set():
            self._look_inside(live, group, head)

    def _look_inside(self, live: "LiveEvaluation", group: Group, head: Head) -> None:
        """Publish what the SAEs are worth inside the model, unless the run was lost meanwhile."""
        started = time.monotonic()

        def going() -> bool:
            self._heartbeat.beat()
            return not self._stop.is_set()

        figures = live.figures(group, going)
        if figures is None:
            return
        if self._lost(head):
            LOGGER.warning("run %s is another worker's now; its evaluation is discarded", self._run)
            return
        seconds = time.monotonic() - started
        LOGGER.info("run %s evaluated inside the model in %.1f s", self._run, seconds)
        self._voice.gauges.inside_model(self._run, figures)

    def _lost(self, head: Head) -> bool:
        """Whether somebody else has the run: a lease of theirs says so, or a head that follows ours."""
        try:
            holder = self._queue.holder(self._run)
            newest = newest_head(self._runs, self._run)
        except (redis.RedisError, PenstockError) as error:
            LOGGER.warning("run %s: nobody tells whether it is still held: %s", self._run, error)
            return True
        return holder not in (None, self._place.worker) or newest is None or newest.n != head.n

    def should_hand_over(self, group: Group) -> bool:
        try:
            if time.monotonic() - self._reconciled > RECONCILE_SECONDS:
                reconcile_runs(self._runs, self._queue)
                self._reconciled = time.monotonic()
            for run_id, position in self._queue.pending().items():
                if position < group.position and self._queue.holder(run_id) is None:
                    return True
        except redis.RedisError:
            return False
        return False
