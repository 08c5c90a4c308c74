"""Rounds of disturbed experiments until all faults are used up, each compared with an undisturbed one."""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from chaos.compare import Facts, Verdict, gather, judge
from chaos.disturbed import PACE, Disturbed, Failed, Plan, Say, Tally
from chaos.settings import CHUNKS
from chaos.stores import Files, open_place, scratch


@dataclass(frozen=True)
class Options:
    """See `python -m chaos --help`; `chunks` and `pace` are of a light experiment."""

    kills: int
    seed: int = 0
    store: str = "local"
    source: str = "light"
    keep: bool = False
    chunks: int = CHUNKS
    pace: dict[str, str] = field(default_factory=lambda: dict(PACE))


@dataclass
class Result:
    """What all rounds together came to."""

    verdicts: list[Verdict] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        whole = all(verdict.clean for verdict in self.verdicts) and bool(self.verdicts)
        return whole and not self.failed and not any(tally.left_behind for tally in self.tallies)

    @property
    def kills(self) -> int:
        return sum(tally.kills for tally in self.tallies)

    def line(self) -> str:
        """The last line."""
        verdicts, tallies = self.verdicts, self.tallies
        dataset = any(verdict.dataset for verdict in verdicts) or self.failed
        weights = any(verdict.weights for verdict in verdicts) or self.failed
        faults = sum(len(verdict.faults) for verdict in verdicts) + len(self.failed)
        return " ".join(
            [
                f"kills={self.kills}",
                f"dataset={'different' if dataset else 'identical'}",
                f"weights={'different' if weights else 'identical'}",
                f"rows_lost={sum(verdict.rows_lost for verdict in verdicts)}",
                f"rows_repeated={sum(verdict.rows_repeated for verdict in verdicts)}",
                f"fenced={sum(tally.fenced for tally in tallies)}",
                f"takeovers={sum(verdict.takeovers for verdict in verdicts)}",
                f"restarts={sum(tally.restarts for tally in tallies)}",
                f"faults={faults}",
                f"left_behind={sum(len(tally.left_behind) for tally in tallies)}",
                f"rounds={len(tallies)}",
                f"seconds={self.seconds:.0f}",
            ]
        )


def campaign(options: Options, reference: Facts | None = None) -> Result:
    """Disturb experiments until all faults are used up; what is said goes to standard output."""
    started = time.monotonic()
    draw, result = random.Random(options.seed), Result()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:7.1f} {line}", flush=True)

    say(f"seed {options.seed}, {options.kills} kills, store {options.store}, source {options.source}")
    with (
        scratch(lambda: options.keep or not result.ok) as directory,
        open_place(options.store, options.seed) as place,
    ):
        reference = reference or undisturbed(directory, options, say)
        while (result.kills < options.kills or not result.tallies) and not result.failed:
            left = options.kills - result.kills
            plan = Plan(options.source, left, options.pace, chunks=options.chunks)
            disturbed = Disturbed(directory, f"round-{len(result.tallies)}", plan, place, draw, say)
            _one_round(disturbed, reference, result, say)
        if place.faults():
            say(f"small faults between processes and store: {place.faults()}")
        result.seconds = time.monotonic() - started
    return result


def undisturbed(directory: Path, options: Options, say: Say) -> Facts:
    """The same experiment on local files, at full speed and left alone."""
    plan = Plan(options.source, kills=0, pace={}, trainers=1, chunks=options.chunks)
    reference = Disturbed(directory, "reference", plan, Files(), random.Random(0), say)
    try:
        reference.carry_out()
    except BaseException:
        print(reference.tails())
        raise
    facts = gather(reference.dataset_url, reference.runs_url)
    say(f"reference: {len(facts.dataset)} objects, {len(facts.weights)} checkpoint files")
    return facts


def _one_round(disturbed: Disturbed, reference: Facts, result: Result, say: Say) -> None:
    result.tallies.append(disturbed.tally)
    say(f"{disturbed.directory.name} begins, trainers: {disturbed.trainers}")
    started = time.monotonic()
    try:
        disturbed.carry_out()
    except Failed as failure:
        result.failed.append(str(failure))
        say(f"failed: {failure}\n{disturbed.tails()}")
        return
    verdict = judge(reference, disturbed.dataset_url, disturbed.runs_url)
    result.verdicts.append(verdict)
    for line in verdict.lines() + disturbed.tally.left_behind:
        say(line)
    word = "as it should be" if verdict.clean else "NOT as it should be"
    say(f"{disturbed.directory.name}: {word}, after {time.monotonic() - started:.0f} s")
