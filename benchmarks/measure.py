"""Interleaved timing: contenders take turns, so that whatever slows the machine slows all of them.

A *case* is one contender of ours and the limits that it is compared with. In each round every contender
works once, one right after the other; ratios are taken within a round before their range is quoted.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

WARM_UPS = 2
"""Rounds run and thrown away."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Time of ours ÷ time of a limit: 1 is as fast as the limit, 2 takes twice as long."""

    of_medians: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Case:
    """What was measured.

    Attributes:
        title: one line saying what is done.
        unit: "ms" for the time of one round, else "<things>/s".
        amount: things done in one round, for rates.
        seconds: by contender, one figure per round; the first contender is ours.
        notes: further figures, one line each.
    """

    benchmark: str
    title: str
    unit: str
    amount: int
    threads: int
    seconds: dict[str, list[float]]
    notes: list[str] = field(default_factory=list)

    @property
    def ours(self) -> str:
        return next(iter(self.seconds))

    @property
    def limits(self) -> list[str]:
        return list(self.seconds)[1:]

    def figure(self, contender: str) -> float:
        """Median over the rounds, in `unit`."""
        median = statistics.median(self.seconds[contender])
        return median * 1000 if self.unit == "ms" else self.amount / median

    def ratio(self, limit: str) -> Ratio:
        ours, other = self.seconds[self.ours], self.seconds[limit]
        pairwise = [a / b for a, b in zip(ours, other, strict=True)]
        return Ratio(statistics.median(ours) / statistics.median(other), min(pairwise), max(pairwise))


def take_turns(contenders: dict[str, Work], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round; who begins changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(WARM_UPS + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            elapsed = _timed(contenders[name], device)
            if number >= WARM_UPS:
                seconds[name].append(elapsed)
    return seconds


def _timed(work: Work, device: torch.device) -> float:
    _synchronise(device)
    started = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
