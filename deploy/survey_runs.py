"""One run, as the store has it: its config, its newest head, and how much it has to read."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from penstock.common.errors import DataError, ObjectMissing, OtherFormat
from penstock.deploy.survey_datasets import Seen
from penstock.store.heads import TERMINAL, Head, links, newest_head
from penstock.store.objects import ObjectStore
from penstock.trainer.config import RunConfig, load_run_config

ENDED = frozenset(TERMINAL)
STATES = ("pending", "running", "done", "failed", "cancelled", "unreadable")
"""What a submitted run can be: no head yet, the status of its newest head, or damaged."""


@dataclass(frozen=True)
class RunNow:
    """A run at one look.

    Attributes:
        state: one of `STATES`, or `not submitted`.
        datasets: URLs of what it reads.
        position, n_positions: chunks trained on by its newest head, and in all.
        step, total_steps, rows, total_rows: steps and rows, likewise.
        backlog: chunks stored next in its reading order; None where that is not known.
        next_head: chunks to train on from the newest head to the next.
        head, head_time, head_seconds: number and time of the newest head; how long the newest progress head
            took since its parent, and how many rows it brought.
        figures: per SAE, of the newest head's last window.
        reason: why it ended, or what is wrong.
        live_rows: rows trained on as its worker says; those of the head otherwise.
        holder: the worker that has it. waiting_for: what it waits for.
        rows_per_second, seconds_left: None where they are not known.
    """

    id: str
    state: str
    datasets: tuple[str, ...] = ()
    position: int = 0
    n_positions: int = 0
    step: int = 0
    total_steps: int = 0
    rows: int = 0
    total_rows: int = 0
    backlog: int | None = None
    next_head: int = 0
    head: int | None = None
    head_time: float | None = None
    head_seconds: float | None = None
    head_rows: int = 0
    figures: dict[str, dict[str, float]] | None = None
    reason: str | None = None
    live_rows: int = 0
    holder: str | None = None
    waiting_for: str | None = None
    rows_per_second: float | None = None
    seconds_left: float | None = None

    def rate_of_head(self, now: float) -> float | None:
        """Rows per second up to the newest head, unless that is long ago."""
        if not self.head_seconds or self.head_time is None or not self.head_rows:
            return None
        late = now - self.head_time > 60 + 5 * self.head_seconds
        return None if late else self.head_rows / self.head_seconds


@dataclass
class RunKnown:
    """What is remembered of a run between looks."""

    config: RunConfig
    total_rows: int
    total_steps: int
    head: Head | None = None
    progress: tuple[float, int] | None = None
    """Seconds and rows of the newest progress head since its parent."""


def look_at_run(runs: ObjectStore, run_id: str, known: dict[str, RunKnown]) -> RunNow | None:
    """Look at what may have changed; None if there is no run of that id.

    Raises:
        PenstockError: the store does not answer.
    """
    try:
        if run_id not in known:
            config = load_run_config(runs, run_id)
            known[run_id] = RunKnown(_lean(config), config.total_rows(), config.total_steps())
        it = known[run_id]
        if it.head is None or not it.head.terminal:
            head = newest_head(runs, run_id, it.head)
            if head is not None and (it.head is None or head.n > it.head.n):
                # how fast a run was that has ended is of no use any more
                it.progress = it.progress if head.terminal else _progress(runs, run_id, head)
                it.head = head
    except ObjectMissing as error:
        # a folder that holds no config is no run; a config whose head is gone is a damaged one
        return None if run_id not in known else RunNow(run_id, "unreadable", reason=str(error))
    except (DataError, OtherFormat) as error:
        return RunNow(run_id, "unreadable", reason=str(error))
    return _now(run_id, it)


def _lean(config: RunConfig) -> RunConfig:
    """Without the rows of each chunk: there may be many chunks, and many runs are remembered."""
    pins = [pin.model_copy(update={"rows": []}) for pin in config.datasets]
    return config.model_copy(update={"datasets": pins})


def _progress(runs: ObjectStore, run_id: str, head: Head) -> tuple[float, int] | None:
    """How long the lineage's newest progress head took, and the rows that it brought; None if it has none.

    Takeovers in a row are few: a run ends as failed before there are many.
    """
    for link, parent in pairwise(links(runs, run_id, head)):
        if link.kind == "progress":
            return link.time - parent.time, link.rows - parent.rows
    return None


def _now(run_id: str, it: RunKnown) -> RunNow:
    head, config = it.head, it.config
    seconds, rows = it.progress or (None, 0)
    position = head.position if head else config.start
    interval = config.settings.head_interval * config.order.window_chunks
    return RunNow(
        id=run_id,
        state="pending" if head is None else head.status,
        datasets=tuple(config.dataset_urls),
        position=position,
        n_positions=config.order.n_positions,
        step=head.step if head else 0,
        total_steps=it.total_steps,
        rows=head.rows if head else 0,
        total_rows=it.total_rows,
        next_head=max(0, min(interval, config.order.n_positions - position)),
        head=head.n if head else None,
        head_time=head.time if head else None,
        head_seconds=seconds,
        head_rows=rows,
        figures=head.metrics if head else {},
        reason=head.reason if head else None,
        live_rows=head.rows if head else 0,
    )


def with_backlog(run: RunNow, known: RunKnown, seen: dict[str, Seen]) -> RunNow:
    """With the number of chunks that are stored next in the run's reading order.

    Args:
        seen: datasets by URL.
    """
    if run.state in ENDED or run.state == "unreadable":
        return run
    parts = []
    for pin in known.config.datasets:
        part = seen.get(pin.url)
        if part is None or part.digest != pin.manifest_digest:
            return run  # it is gone, or another one lies there
        parts.append(part.mask)
    return replace(run, backlog=_ready(np.concatenate(parts), known.config, run.position))


def _ready(committed: npt.NDArray[np.bool_], config: RunConfig, position: int) -> int:
    order = config.order
    if committed.all():
        return order.n_positions - position
    ready = 0
    while position < order.n_positions:
        epoch, place = divmod(position, order.n_chunks)
        there = committed[order.epoch_chunks(epoch)[place:]]
        gap = int(there.argmin()) if not there.all() else len(there)
        ready, position = ready + gap, position + gap
        if gap < len(there):
            break
    return ready
