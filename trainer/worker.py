"""The worker: leases a pending run, carries it on, gives it back. It keeps nothing of its own."""

import threading
import time
from functools import partial

import redis

from penstock.common import metrics
from penstock.common.errors import Diverged, Fenced, Unavailable
from penstock.common.health import Health
from penstock.common.heartbeat import Heartbeat
from penstock.common.logs import LOGGER
from penstock.store.dataset import Dataset
from penstock.store.layout import reader_key
from penstock.store.loader import WindowLoader
from penstock.store.queue import ChunkQueue, Feed, FeedSpec, RunQueue, register_feed, remove_feed
from penstock.trainer.config import RunConfig, load_run_config, open_pinned
from penstock.trainer.group import Group
from penstock.trainer.lineage import Lineage, take_over
from penstock.trainer.loop import Outcome, train
from penstock.trainer.observer import RECONCILE_SECONDS, RunObserver, Voice
from penstock.trainer.pending import reconcile_runs, unfinished_runs
from penstock.trainer.supply import Stopped, Supply
from penstock.trainer.workplace import Workplace, check_environment, forgiving, set_up_strict

IDLE_SECONDS = 0.5
"""Pause between looks at the queue while no run is free."""
REDIS_PATIENCE_SECONDS = 300.0
"""A queue silent for this long ends the worker."""


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
                forgiving(partial(queue.release, run_id))
    finally:
        heartbeat.close()
        voice.leave()


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
    check_environment(place.runs, run_id, environment, strict)
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
    forgiving(lambda: queue.remove(config.run_id))
    forgiving(lambda: remove_feed(place.client, _feeds_key(place, config), config.run_id))


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
    forgiving(lambda: remove_feed(place.client, feeds_key, config.run_id))
    forgiving(feed.open)
    forgiving(lambda: register_feed(place.client, feeds_key, config.run_id, spec))
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
