"""Learning rates and sparsities that are tried for a contender, and what comes of it."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click

from benchmarks.quality.contenders import Contender
from benchmarks.quality.laboratory import Laboratory, Result

TARGET = 32
"""Features active per row, on average."""
FIRST_RATE = 4e-3
RATES = 5
SPARSITIES = 4
MET = 0.01
"""Difference in L0, relative, that is taken for none."""
CLOSE = 1.5
"""L0 of two trainings over each other, for a line through them to be trusted."""
SEEDS = 3


@dataclass(frozen=True)
class Reading:
    """Explained variance on both halves at the wanted L0, what was told for it, and the nearest training."""

    chosen_by: float
    explained: float
    asked: tuple[float, ...]
    nearest: Result


def read_at_target(
    laboratory: Laboratory, contender: Contender, lr: float, seed: int, begin: tuple[float, ...]
) -> Reading | None:
    """Train until the wanted L0 is met or lies between two trainings; None where it was not reached.

    Args:
        begin: sparsities to try first: what served another learning rate or seed.
    """
    tried: dict[float, Result] = {}
    for number in range(SPARSITIES):
        asked = begin[number] if number < len(begin) else _next_sparsity(contender, tried)
        if asked in tried:
            break
        tried[asked] = laboratory.train(contender, lr, seed, asked)
        nearest = min(tried, key=lambda value: abs(tried[value].l0 - TARGET))
        if abs(tried[nearest].l0 / TARGET - 1) <= MET:
            return Reading(tried[nearest].chosen_by, tried[nearest].explained, (nearest,), tried[nearest])
        below, above = _beside(tried)
        if below is not None and above is not None and tried[above].l0 <= CLOSE * tried[below].l0:
            break
    below, above = _beside(tried)
    if below is None or above is None or tried[below].l0 == 0:
        return None
    low, high = tried[below], tried[above]
    share = math.log(TARGET / low.l0) / math.log(high.l0 / low.l0)
    return Reading(
        low.chosen_by + share * (high.chosen_by - low.chosen_by),
        low.explained + share * (high.explained - low.explained),
        (below, above),
        tried[nearest],
    )


def _beside(tried: dict[float, Result]) -> tuple[float | None, float | None]:
    """What was told for the largest L0 up to the wanted one, and for the smallest above it."""
    below = max((v for v, r in tried.items() if r.l0 <= TARGET), key=lambda v: tried[v].l0, default=None)
    above = min((v for v, r in tried.items() if r.l0 > TARGET), key=lambda v: tried[v].l0, default=None)
    return below, above


def _next_sparsity(contender: Contender, tried: dict[float, Result]) -> float:
    """A guess of what gives the wanted L0; a little beyond it until that lies between two."""
    if not tried:
        return TARGET if contender.first is None else contender.first
    below, above = _beside(tried)
    if contender.first is None:
        if below is not None and above is not None:
            return round((below + above) / 2)
        value, result = max(tried.items(), key=lambda x: -abs(x[1].l0 - TARGET))
        wanted = value * TARGET / max(1.0, result.l0)
        return math.ceil(wanted) if result.l0 < TARGET else math.floor(wanted)
    if below is not None and above is not None:
        return math.sqrt(below * above)
    if above is not None:
        return above * min(4.0, max(1.15, 1.1 * tried[above].l0 / TARGET))
    assert below is not None
    return below / min(4.0, max(1.15, 1.1 * TARGET / max(1.0, tried[below].l0)))


def best_rate(laboratory: Laboratory, contender: Contender) -> tuple[float, Reading] | None:
    """The learning rate that does best with the first seed; None where no training reached the wanted L0."""
    tried: dict[float, Reading | None] = {}
    begin: tuple[float, ...] = ()
    lr: float | None = FIRST_RATE
    best: tuple[float, Reading] | None = None
    while lr is not None and len(tried) < RATES:
        reading = tried[lr] = read_at_target(laboratory, contender, lr, 0, begin)
        if reading is not None:
            begin = reading.asked
            if best is None or reading.chosen_by > best[1].chosen_by:
                best = lr, reading
        middle = FIRST_RATE if best is None else best[0]
        lr = next((rate for rate in (2 * middle, middle / 2) if rate not in tried), None)
    return best


def compete(laboratory: Laboratory, contenders: list[Contender]) -> Iterator[dict[str, Any]]:
    """A line per contender."""
    for contender in contenders:
        found = best_rate(laboratory, contender)
        if found is None:
            click.echo(f"{contender}: L0 {TARGET} was not reached")
            continue
        lr, reading = found
        readings = [reading]
        for seed in range(1, SEEDS):
            other = read_at_target(laboratory, contender, lr, seed, reading.asked)
            if other is not None:
                readings.append(other)
        yield {
            "kind": contender.kind,
            "library": contender.library,
            "as": contender.as_called_there,
            "lr": lr,
            "explained": [reading.explained for reading in readings],
            "median": statistics.median(reading.explained for reading in readings),
            "l0": statistics.median(reading.nearest.l0 for reading in readings),
            "alive": statistics.median(reading.nearest.alive for reading in readings),
            "seconds": statistics.median(reading.nearest.seconds for reading in readings),
        }
