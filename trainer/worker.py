"""The worker: leases a pending run, carries it on, gives it back. It keeps nothing of its own."""

import os
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis
import torch

from penstock.common import metrics
from penstock.common.errors import ConfigError, Diverged, Fenced, Unavailable
from penstock.common.health import Health
from penstock.common.heartbeat import Heartbeat
from penstock.common.logs import LOGGER
from penstock.common.redis import Client, RedisSettings
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.layout import reader_key
from penstock.store.loader import WindowLoader
from penstock.store.objects import ObjectStore
from penstock.store.queue import (
    ChunkQueue,
    Feed,
    FeedSpec,
    Presence,
    RunQueue,
    register_feed,
    remove_feed,
)
from penstock.trainer.config import RunConfig, load_run_config, run_ids
from penstock.trainer.group import Group
from penstock.trainer.lineage import Head, Lineage, newest_head, take_over
from penstock.trainer.loop import Outcome, train
from penstock.trainer.supply import Stopped, Supply

IDLE_SECONDS = 0.5
"""Pause between looks at the queue while no run is free."""
RECONCILE_SECONDS = 15.0
"""The queue of runs is compared with the store this often."""
REDIS_PATIENCE_SECONDS = 300.0
"""A queue silent for this long ends the worker."""


@dataclass(frozen=True)
class Workplace:
    """What a worker needs: where runs are, Redis, itself and its device."""

    runs: ObjectStore
    client: Client
    redis: RedisSettings
    worker: str
    device: torch.device
    threads: int | None
    port: int

    def environment(self, strict: bool) -> dict[str, Any]:
        """What the bits of a training depend on."""
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
            "device": _device_kind(self.device),
            "strict": strict,
        }


def work(place: Workplace, health: Health, stop: threading.Event, drain: bool) -> None:
    """Carry runs on until `stop` is set or, with `drain`, until none is left that has not ended."""
    queue = RunQueue(
        place.client, place.redis.prefix, place.runs.url, place.worker, place.redis.lease_seconds
    )
    voice = Voice(place)
    leased: list[str] = []

    def renew() -> None:
        voice.say()
        for run_id in leased:
            queue.renew(run_id)

    heartbeat = Heartbeat(renew, place.redis.lease_seconds, health)
    reconciled, answered = float("-inf"), time.monotonic()
    health.ready = True
    try:
        while not stop.is_set():
            heartbeat.beat()
            try:
                if time.monotonic() - reconciled > RECONCILE_SECONDS:
                    reconcile_runs(place.runs, queue)
                    reconciled = time.monotonic()
                    voice.say()
                run_id = queue.lease()
                answered = time.monotonic()
            except redis.RedisError as error:
                if time.monotonic() - answered > REDIS_PATIENCE_SECONDS:
                    raise Unavailable(f"redis does not answer: {error}") from error
                LOGGER.warning("redis does not answer, trying again: %s", error)
                stop.wait(1.0)
                continue
            if run_id is None:
                # the store is asked, which costs more, only when the queue knows of no run
                if drain and not queue.pending() and not unfinished_runs(place.runs):
                    return
                stop.wait(IDLE_SECONDS)
                continue
            leased.append(run_id)
            voice.say(run=run_id)
            try:
                carry_on(place, queue, run_id, heartbeat, voice, stop)
            except Fenced as error:
                metrics.sae_fenced.inc()
                LOGGER.warning("%s", error)
            except Diverged as error:
                LOGGER.error("%s", error)
            finally:
                leased.clear()
                voice.say(run=None, rows=None, figures=None, waiting_for=None)
                _forgiving(partial(queue.release, run_id))
    finally:
        heartbeat.close()
        voice.leave()


class Voice:
    """What the worker says of itself, for status and progress."""

    def __init__(self, place: Workplace) -> None:
        self._presence = Presence(place.client, place.redis.prefix, place.worker)
        self._seconds = 3 * place.redis.lease_seconds
        self._word: dict[str, Any] = {"kind": "trainer", "port": place.port, "run": None}

    def say(self, **changes: Any) -> None:
        self._word |= changes
        _forgiving(lambda: self._presence.tell(self._word, self._seconds))

    def leave(self) -> None:
        _forgiving(self._presence.leave)


def carry_on(
    place: Workplace,
    queue: RunQueue,
    run_id: str,
    heartbeat: Heartbeat,
    voice: Voice,
    stop: threading.Event,
) -> Outcome | None:
    """Take a run over and train it; None if it had ended already."""
    config = load_run_config(place.runs, run_id)
    strict = config.settings.strict
    set_up_strict(strict, place)
    environment = place.environment(strict)
    _check_environment(place.runs, run_id, environment, strict)
    dataset = open_pinned(config)
    lineage = take_over(place.runs, run_id, environment)
    if lineage is None:
        _forget(place, queue, config)
        return None
    if lineage.head.n > 0:
        metrics.sae_takeovers.inc()
    LOGGER.info(
        "run %s: taken over at position %d of %d, step %d",
        *(run_id, lineage.head.position, config.order.n_positions, lineage.head.step),
    )
    group = Group(config, place.device)
    group.restore(lineage.head, lineage.load())
    feed = _open_feed(place, queue, config, dataset, lineage)
    leave = threading.Event()
    supply = Supply(feed, dataset.store, leave, heartbeat.beat)
    first = config.order.window_starting_at(group.position)
    loader = WindowLoader(dataset, config.hooks, config.order, first, supply.await_chunk)
    observer = RunObserver(queue, feed, heartbeat, voice, supply, group, place.runs)
    try:
        outcome = train(group, lineage, loader, observer, stop)
    except Stopped:
        outcome = "stopped"
    except Diverged:
        _forget(place, queue, config)
        raise
    finally:
        leave.set()
        loader.close()
    LOGGER.info("run %s: %s at position %d, step %d", run_id, outcome, group.position, group.step)
    if outcome == "done":
        _forget(place, queue, config)
    return outcome


def _forget(place: Workplace, queue: RunQueue, config: RunConfig) -> None:
    """A run has ended: nothing in Redis needs to speak of it."""
    _forgiving(lambda: queue.remove(config.run_id))
    _forgiving(lambda: remove_feed(place.client, _feeds_key(place, config), config.run_id))


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
        runs: ObjectStore,
    ) -> None:
        self._queue = queue
        self._feed = feed
        self._heartbeat = heartbeat
        self._voice = voice
        self._supply = supply
        self._run = group.config.run_id
        self._rows_seen = group.rows
        self._runs = runs
        self._reconciled = time.monotonic()
        for sae in group.config.settings.saes:
            metrics.sae_dead_window_rows.labels(self._run, sae.name).set(sae.dead_after_rows)
        show_figures(self._run, group.figures)

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
        show_figures(self._run, group.figures)
        self._voice.say(rows=group.rows, figures=group.figures, waiting_for=None)
        _forgiving(lambda: metrics.backlog_chunks.labels(self._run).set(self._feed.length()))

    def committed(self, group: Group, head: Head, seconds: float) -> None:
        self._heartbeat.beat()
        metrics.sae_head_commit_seconds.observe(seconds)
        _forgiving(lambda: self._queue.add(self._run, head.position))
        _forgiving(lambda: self._feed.trim(head.position))

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


def show_figures(run_id: str, figures: dict[str, dict[str, float]]) -> None:
    """Set the gauges of a run to the figures of its last window: the same that its head records."""
    for sae, values in figures.items():
        for name, value in values.items():
            if name == "l0":
                metrics.sae_l0.labels(run_id, sae).set(value)
            elif name == "dead_features":
                metrics.sae_dead_features.labels(run_id, sae).set(value)
            elif name == "explained_variance":
                metrics.sae_explained_variance.labels(run_id, sae).set(value)
            else:
                component = "total" if name == "loss" else name
                metrics.sae_loss.labels(run_id, sae, component).set(value)


def reconcile_runs(runs: ObjectStore, queue: RunQueue) -> None:
    """Make the queue of pending runs say what the store says."""
    unfinished = unfinished_runs(runs)
    for run_id, position in unfinished.items():
        queue.add(run_id, position)
    for run_id in queue.pending():
        if run_id not in unfinished:
            queue.remove(run_id)


def unfinished_runs(runs: ObjectStore) -> dict[str, int]:
    """Run id -> position of its newest head, for runs that have not ended."""
    found = {}
    for run_id in run_ids(runs):
        head = newest_head(runs, run_id)
        if head is None or not head.terminal:
            found[run_id] = 0 if head is None else head.position
    return found


def open_pinned(config: RunConfig) -> Dataset:
    """Open a run's dataset and check that it is the one pinned.

    Raises:
        ConfigError: another dataset is at that URL now.
    """
    dataset = open_dataset(config.dataset.url)
    if dataset.manifest.digest != config.dataset.manifest_digest:
        raise ConfigError(
            f"run {config.run_id}: the dataset at {config.dataset.url} is not the one it was submitted "
            "with (its manifest differs); restore that dataset or submit the run again"
        )
    return dataset


def set_up_strict(strict: bool, place: Workplace) -> None:
    """Threads and algorithms: `strict` means one CPU thread and deterministic kernels."""
    if place.device.type == "cpu":
        threads = 1 if strict else place.threads
        if threads:
            torch.set_num_threads(threads)
    if strict:
        # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(strict)


def _check_environment(runs: ObjectStore, run_id: str, environment: dict[str, Any], strict: bool) -> None:
    head = newest_head(runs, run_id)
    if head is None or not head.checkpoint or head.environment == environment:
        return
    differing = ", ".join(
        f"{key} was {head.environment.get(key)} and is {value}"
        for key, value in environment.items()
        if head.environment.get(key) != value
    )
    if strict:
        raise ConfigError(f"run {run_id} is strict and began elsewhere: {differing}; resume it there")
    LOGGER.warning("run %s: %s; its weights will not be bit-identical to one machine's", run_id, differing)


def _open_feed(
    place: Workplace, queue: RunQueue, config: RunConfig, dataset: Dataset, lineage: Lineage
) -> Feed:
    order = config.order
    spec = FeedSpec(
        key=queue.feed_key(config.run_id, lineage.takeover.n),
        start=lineage.head.position,
        n_chunks=order.n_chunks,
        epochs=order.epochs,
        window_chunks=order.window_chunks,
        seed=order.seed,
    )
    feed = Feed(place.client, spec)
    feeds_key = _feeds_key(place, config)
    _forgiving(lambda: remove_feed(place.client, feeds_key, config.run_id))
    _forgiving(feed.open)
    _forgiving(lambda: register_feed(place.client, feeds_key, config.run_id, spec))
    if not dataset.store.exists(reader_key(config.run_id)):
        LOGGER.warning("run %s is not registered as a reader of %s", config.run_id, dataset.url)
    return feed


def _feeds_key(place: Workplace, config: RunConfig) -> str:
    queue = ChunkQueue(
        place.client,
        place.redis.prefix,
        config.dataset.url,
        config.dataset.manifest_digest,
        place.worker,
        place.redis.lease_seconds,
    )
    return queue.feeds_key


def _device_kind(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def _forgiving(action: Any) -> None:
    """Do something that only helps others: if Redis is away, reconciling makes up for it later."""
    try:
        action()
    except redis.RedisError as error:
        LOGGER.warning("redis: %s", error)
