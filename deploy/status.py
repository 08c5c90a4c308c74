"""`penstock status`: where everything stands, once or live."""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from penstock.common.errors import PenstockError
from penstock.common.process import stop_on_signals
from penstock.deploy.config import Config
from penstock.deploy.progress import LINE_SECONDS, SHOWN, remaining
from penstock.deploy.survey import Survey, Surveyor
from penstock.deploy.survey_datasets import DatasetNow
from penstock.deploy.survey_runs import RunNow

SCREEN_SECONDS = 2.0
"""Pause between looks on a terminal."""
ORDER = ("running", "pending", "not submitted", "unreadable", "failed", "cancelled", "done")
"""Runs are shown in this order of their states: what still moves comes first."""


def survey(config: Config) -> Survey:
    """One look.

    Raises:
        PenstockError: the store does not answer, or refuses us.
    """
    return Surveyor(config).look()


def status_record(survey: Survey) -> dict[str, Any]:
    """What `status --json` prints."""
    return {
        "time": survey.time,
        "redis": {"up": survey.crew is not None, "error": survey.redis_error},
        "datasets": {url: asdict(dataset) for url, dataset in survey.datasets.items()},
        "runs": {name: asdict(run) for name, run in survey.runs.items()},
        "workers": survey.crew.workers if survey.crew else {},
    }


def status_lines(survey: Survey) -> Iterator[str]:
    """What `status` prints: a line for the whole, then one for each dataset, run and worker."""
    yield summary(survey)
    for dataset in survey.datasets.values():
        yield f"dataset {dataset.url}: {', '.join(_of_dataset(dataset))}"
    runs = in_order(survey)
    few = sum(len(run.figures or {}) for run in runs) <= SHOWN
    for run in runs:
        yield f"run {run.id}: {', '.join(_of_run(run, survey))}"
        for name, figures in (run.figures or {}).items() if few else ():
            shown = " ".join(f"{key} {value:.4g}" for key, value in sorted(figures.items()))
            yield f"  {name}: {shown}"
    workers = sorted(survey.crew.workers.items()) if survey.crew else []
    for worker, word in workers:
        told = {k: _brief(v) for k, v in word.items() if k != "figures" and v not in (None, "", [])}
        yield f"worker {worker}: {', '.join(f'{k} {v}' for k, v in told.items())}"
    down = f"down: {survey.redis_error}; what the store says above is right nevertheless"
    yield f"redis: {'up' if survey.crew else down}"


def summary(survey: Survey) -> str:
    """Everything in one line."""
    states = Counter(run.state for run in survey.runs.values())
    runs = ", ".join(f"{states[state]} {state}" for state in ORDER if states[state]) or "none"
    chunks = sum(dataset.committed for dataset in survey.datasets.values())
    planned = sum(dataset.planned or 0 for dataset in survey.datasets.values())
    workers = Counter(word.get("kind") for word in survey.crew.workers.values()) if survey.crew else None
    told = "redis is down"
    if workers is not None:
        told = f"{workers['producer']} producers, {workers['trainer']} trainers"
    clock = time.strftime("%H:%M:%S", time.localtime(survey.time))
    return f"{clock}  {chunks} of {planned} chunks; runs: {runs}; {told}"


def in_order(survey: Survey) -> list[RunNow]:
    """Runs that move first, then those that ended."""
    return sorted(survey.runs.values(), key=lambda run: (ORDER.index(run.state), run.id))


def _of_dataset(dataset: DatasetNow) -> Iterator[str]:
    if dataset.problem is not None:
        yield dataset.problem
        return
    if dataset.planned is None:
        yield "not planned yet"
        return
    yield f"{dataset.committed} of {dataset.planned} chunks"
    yield f"{dataset.committed_rows:,} of {dataset.rows:,} rows"
    if dataset.quarantined:
        yield f"{dataset.quarantined} quarantined"
    if dataset.committed < dataset.planned:
        if dataset.rows_per_second:
            yield f"{dataset.rows_per_second:,.0f} rows/s"
        yield remaining(dataset.seconds_left)
    if dataset.claims:
        yield f"{len(dataset.claims)} being made"
    if dataset.repairs:
        yield f"{dataset.repairs} to be made again"
    if dataset.blocked is not None:
        yield f"blocked: waiting for {dataset.blocked}"
    elif dataset.wanted and dataset.claims == {}:
        yield "waiting for a producer"


def _of_run(run: RunNow, survey: Survey) -> Iterator[str]:
    yield run.state
    if run.n_positions:
        share = f" ({run.live_rows / run.total_rows:.0%})" if run.total_rows else ""
        yield f"position {run.position} of {run.n_positions}"
        yield f"{run.live_rows:,} of {run.total_rows:,} rows{share}"
    if run.state in ("pending", "running"):
        if run.rows_per_second:
            yield f"{run.rows_per_second:,.0f} rows/s"
            yield remaining(run.seconds_left)
        if run.backlog is not None:
            yield f"{run.backlog} chunks to read"
    if run.head is not None and run.head_time is not None:
        yield f"head {run.head} {ago(survey.time - run.head_time)}"
    if run.holder:
        yield f"held by {run.holder}"
    if run.waiting_for:
        yield f"waiting for {run.waiting_for}"
    if run.reason:
        yield run.reason


def ago(seconds: float) -> str:
    """'12 s ago', '3 min ago', '2.1 h ago', '5 days ago'."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s ago"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min ago"
    return f"{seconds / 3600:.1f} h ago" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days ago"


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def print_status(config: Config, as_json: bool, show: Callable[[str], None]) -> None:
    """Look once and print."""
    found = survey(config)
    if as_json:
        show(json.dumps(status_record(found), indent=1))
        return
    for line in status_lines(found):
        show(line)


def watch(config: Config, as_json: bool, show: Callable[[str], None]) -> None:
    """Look until SIGINT or SIGTERM: a screen on a terminal, elsewhere a line now and then.

    With `as_json` a whole record per line. A store that does not answer is said, and asked again.
    """
    stop, surveyor = stop_on_signals(), Surveyor(config)
    if sys.stdout.isatty() and not as_json:
        _screen(surveyor, stop)
        return
    while not stop.is_set():
        try:
            found = surveyor.look()
        except PenstockError as error:
            print(f"status: {error}", file=sys.stderr, flush=True)
        else:
            show(json.dumps(status_record(found)) if as_json else summary(found))
        stop.wait(LINE_SECONDS)


def _screen(surveyor: Surveyor, stop: threading.Event) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(screen=True, auto_refresh=False) as live:
        while not stop.is_set():
            try:
                lines = list(status_lines(surveyor.look()))
            except PenstockError as error:
                lines = [f"status: {error}"]
            room = live.console.height - 1
            if len(lines) > room:
                lines = [*lines[: room - 2], f"… and {len(lines) - room + 1} more lines", lines[-1]]
            live.update(
                Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines)), refresh=True
            )
            stop.wait(SCREEN_SECONDS)
