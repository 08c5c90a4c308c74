"""Processes that create the same objects at the same moment, each with connections of its own."""

import multiprocessing
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Any

from penstock.store.objects import open_store

RACERS, ROUNDS = 4, 200


def key_of(turn: int) -> str:
    return f"race/{turn}"


def content_of(racer: int, turn: int) -> bytes:
    return b"%d %d " % (racer, turn) * 1000


def race(url: str) -> list[list[bool]]:
    """Who was told "created" in each round, by racer."""
    # Spawned: a forked s3fs refuses to work.
    context = multiprocessing.get_context("spawn")
    start, said = context.Barrier(RACERS), context.Queue()
    racers = [context.Process(target=_run, args=(url, number, start, said)) for number in range(RACERS)]
    for process in racers:
        process.start()
    try:
        told: dict[int, Any] = dict(said.get(timeout=240) for _ in racers)
        for process in racers:
            process.join(timeout=30)
    finally:
        for process in racers:
            process.kill()
    failures = {racer: answers for racer, answers in told.items() if isinstance(answers, str)}
    assert not failures, failures
    return [[told[racer][turn] for racer in range(RACERS)] for turn in range(ROUNDS)]


def _run(url: str, racer: int, start: Barrier, said: "Queue[tuple[int, list[bool] | str]]") -> None:
    try:
        store = open_store(url)
        answers = []
        for turn in range(ROUNDS):
            start.wait(timeout=120)
            answers.append(store.create(key_of(turn), content_of(racer, turn)))
        said.put((racer, answers))
    except BaseException as error:
        start.abort()
        said.put((racer, repr(error)))
