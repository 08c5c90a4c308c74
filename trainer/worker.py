"""The worker: leases a pending run, carries it on, gives it back. It keeps nothing of its own."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import redis

from penstock.common import metrics
from penstock.common.errors import (
    ConfigError,
    DataError,
    Detached,
    Diverged,
    Fenced,
    OtherFormat,
    PenstockError,
    RunFailed,
    Unavailable,
)
from penstock.common.health import Health
from penstock.common.heartbeat import Heartbeat
from penstock.common.logs import LOGGER, tell_about
from penstock.store.heads import barren_takeovers, newest_head
from penstock.store.loader import WindowReader
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
from penstock.trainer.config import RunConfig, load_run_config
from penstock.trainer.initial import load_initial
from penstock.trainer.lineage import Lineage, take_over
from penstock.trainer.loop import Outcome, train
from penstock.trainer.mending import Mender, Stopped
from penstock.trainer.observer import RECONCILE_SECONDS, RunObserver, Voice
from penstock.trainer.pending import reconcile_runs, unfinished_runs
from penstock.trainer.supply import Supply
from penstock.trainer.workplace import Workplace, check_environment, forgiving, set_up_strict

IDLE_SECONDS = 0.5
"""Pause between looks at the queue while no run is free."""
REDIS_PATIENCE_SECONDS = 300.0
"""A queue silent for this long ends the worker."""
ASIDE_SECONDS = 30.0
"""A run that could not be carried on is not tried again by this worker for so long."""
TRIES = 3
"""Attempts at a run, in a row, before a draining worker ends with what is wrong with it."""
MAX_TAKEOVERS = 20
"""Workers in a row that may take a run over without getting it further; then it has failed."""


class Aside:
    """Runs that this worker could not carry on, and why: others may do better, and so may it, later."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._errors: dict[str, list[PenstockError]] = {}

    def put(self, run_id: str, error: PenstockError) -> None:
        self._until[run_id] = time.monotonic() + ASIDE_SECONDS
        self._errors.setdefault(run_id, []).append(error)

    def forget(self, run_id: str) -> None:
        self._errors.pop(run_id, None)

    def now(self) -> list[str]:
        """Runs not to be tried yet."""
        return [run_id for run_id, until in self._until.items() if time.monotonic() < until]

    def hopeless(self) -> dict[str, PenstockError]:
        """Run id -> its last error, for runs that were tried often enough."""
        return {run_id: errors[-1] for run_id, errors in self._errors.items() if len(errors) >= TRIES}


def work(place: Workplace, health: Health, stop: threading.Event, drain: bool) -> None:
    """Carry runs on until `stop` is set or, with `drain`, until none is left that has not ended.

    Raises:
        PenstockError: with `drain`, what keeps the runs that are left from being carried on.
        Unavailable: Redis has been silent for too long.
    """
    queue = RunQueue(
        place.client, place.redis.prefix, place.runs.url, place.worker, place.redis.lease_seconds
    )
    voice = Voice(place)
    leased: list[str] = []

    def renew() -> None:
        voice.say()
        for run_id in leased:
            queue.renew(run_id)

    heartbeat = place.heartbeat(renew, place.redis.lease_seconds, health)
    aside = Aside()
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
                run_id = queue.lease(aside.now())
                answered = time.monotonic()
                # the store is asked, which costs more, only when the queue has no run for us
                if run_id is None and drain and _drained(place.runs, queue, aside):
                    return
            except redis.RedisError as error:
                if time.monotonic() - answered > REDIS_PATIENCE_SECONDS:
                    raise Unavailable(f"redis does not answer: {error}") from error
                LOGGER.warning("redis does not answer, trying again: %s", error)
                stop.wait(1.0)
                continue
            if run_id is None:
                stop.wait(IDLE_SECONDS)
                continue
            leased.append(run_id)
            tell_about(run=run_id)
            voice.say(run=run_id)
            try:
                carry_on(place, queue, run_id, heartbeat, voice, stop)
                aside.forget(run_id)
            except Fenced as error:
                metrics.sae_fenced.inc()
                LOGGER.warning("%s", error)
            except RunFailed as error:
                reason = "not finite" if isinstance(error, Diverged) else "given up"
                metrics.sae_run_failed_timestamp_seconds.labels(run_id, reason).set(time.time())
                LOGGER.error("%s", error)
            except (DataError, ConfigError, OtherFormat) as error:
                LOGGER.error("run %s cannot be carried on: %s", run_id, error)
                aside.put(run_id, error)
            finally:
                leased.clear()
                voice.say(run=None, rows=None, figures=None, waiting_for=None)
                forgiving(partial(queue.release, run_id))
                tell_about(run=None)
    finally:
        heartbeat.close()
        voice.leave()


def _drained(runs: ObjectStore, queue: RunQueue, aside: Aside) -> bool:
    """Whether no run is left that this worker could ever carry on."""
    hopeless = aside.hopeless()
    if set(queue.pending()) - set(hopeless):
        return False
    unfinished = unfinished_runs(runs)
    wrong = hopeless | unfinished.damaged
    if set(unfinished.positions) - set(wrong):
        return False
    for error in wrong.values():
        raise error
    return True


def carry_on(
    place: Workplace,
    queue: RunQueue,
    run_id: str,
    heartbeat: Heartbeat,
    voice: Voice,
    stop: threading.Event,
) -> Outcome | None:
    """Take a run over and train it; None if it had ended already.

    Raises:
        Fenced, RunFailed
        DataError, ConfigError, OtherFormat: it cannot be carried on here or now.
    """
    config = load_run_config(place.runs, run_id)
    strict = config.settings.strict
    set_up_strict(strict, place)
    environment = place.environment(strict)
    check_environment(place.runs, run_id, environment, strict)
    data = place.open_data(config)
    lineage = _take_over(place, queue, config, environment, heartbeat, stop)
    if lineage is None:
        if not stop.is_set():
            _forget(place, queue, config)
        return None
    group = place.group(config, place.device)
    group.restore(lineage.head, lineage.load() or load_initial(place.runs, run_id, config.initial))
    leave = threading.Event()
    presence = Presence(place.client, place.redis.prefix, place.worker)
    mender = Mender(data, run_id, _chunk_queues(place, config, repairs=True), presence, leave)
    feed, register = _open_feed(place, config, _feed_spec(queue, config, lineage))
    supply = Supply(feed, data, mender, register, leave, heartbeat.beat)
    reader = WindowReader(data, config.hooks, config.order, supply)
    loader = place.loader(reader, config.order.window_starting_at(group.position))
    observer = RunObserver(queue, feed, heartbeat, voice, supply, group, place, stop)
    if lineage.head.n > 0:
        voice.gauges.taken_over(run_id, lineage.takeover.time)
    outcome: Outcome | None = None
    try:
        outcome = train(group, lineage, loader, observer, stop)
    except Stopped:
        outcome = "stopped"
    except Diverged:
        _forget(place, queue, config)
        raise
    except Detached as error:
        raise _failed(place, queue, config, lineage, str(error)) from error
    finally:
        if outcome != "done":
            voice.gauges.forget()
        leave.set()
        loader.close()
    LOGGER.info("run %s: %s at position %d, step %d", run_id, outcome, group.position, group.step)
    if outcome == "done":
        _forget(place, queue, config)
    return outcome


def _take_over(
    place: Workplace,
    queue: RunQueue,
    config: RunConfig,
    environment: dict[str, Any],
    heartbeat: Heartbeat,
    stop: threading.Event,
) -> Lineage | None:
    """Take a run over, slower the more workers did so in vain; None if it has ended or we are to stop.

    Raises:
        RunFailed: too many did.
    """
    run_id, start = config.run_id, config.start
    barren = barren_takeovers(place.runs, run_id, newest_head(place.runs, run_id))
    for _ in range(backoff_seconds(barren)):
        heartbeat.beat()
        if stop.wait(1.0):
            return None
    lineage = take_over(place.runs, run_id, environment, start)
    if lineage is None:
        return None
    if barren >= MAX_TAKEOVERS:
        where = f"position {lineage.head.position}"
        reason = f"{barren} workers in a row took it over at {where} and got no further; see their logs"
        raise _failed(place, queue, config, lineage, reason)
    if lineage.head.n > 0:
        metrics.sae_takeovers.inc()
    LOGGER.info(
        "run %s: taken over at position %d of %d, step %d",
        *(run_id, lineage.head.position, config.order.n_positions, lineage.head.step),
    )
    return lineage


def backoff_seconds(barren: int) -> int:
    """Pause before a takeover, by how many before it were in vain: 0, 0, 0, 1, 2, 4, … 30 seconds."""
    return 0 if barren < 3 else min(30, 2 ** (barren - 3))


def _failed(place: Workplace, queue: RunQueue, config: RunConfig, lineage: Lineage, reason: str) -> RunFailed:
    """End a run that nobody can carry on."""
    lineage.end("failed", reason)
    _forget(place, queue, config)
    return RunFailed(f"run {config.run_id}: {reason}")


def _forget(place: Workplace, queue: RunQueue, config: RunConfig) -> None:
    """A run has ended: nothing in Redis needs to speak of it."""
    forgiving(lambda: queue.remove(config.run_id))
    forgiving(lambda: _remove_feed(place, config))


def _feed_spec(queue: RunQueue, config: RunConfig, lineage: Lineage) -> FeedSpec:
    order = config.order
    return FeedSpec(
        key=queue.feed_key(config.run_id, lineage.takeover.n),
        start=lineage.head.position,
        sizes=order.sizes,
        epochs=order.epochs,
        window_chunks=order.window_chunks,
        seed=order.seed,
    )


def _open_feed(place: Workplace, config: RunConfig, spec: FeedSpec) -> tuple[Feed, Callable[[], None]]:
    """The feed of a lineage, in place of the one before, and what lets all producers know of it."""
    feed, queues = Feed(place.client, spec), _chunk_queues(place, config)

    def register() -> None:
        for part, chunks in enumerate(queues):
            register_feed(place.client, chunks.feeds_key, config.run_id, replace(spec, part=part))

    forgiving(lambda: _remove_feed(place, config))
    forgiving(feed.open)
    forgiving(register)
    return feed, register


def _remove_feed(place: Workplace, config: RunConfig) -> None:
    for chunks in _chunk_queues(place, config):
        remove_feed(place.client, chunks.feeds_key, config.run_id)


def _chunk_queues(place: Workplace, config: RunConfig, repairs: bool = False) -> list[ChunkQueue]:
    """The queue of each dataset that a run reads."""
    client, prefix, lease = place.client, place.redis.prefix, place.redis.lease_seconds
    return [
        ChunkQueue(client, prefix, pin.url, pin.manifest_digest, place.worker, lease, repairs)
        for pin in config.datasets
    ]
