"""Live progress of `penstock run`: a small screen on a terminal, sparse lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import redis

from penstock.common.errors import PenstockError
from penstock.common.redis import Client, RedisSettings, connect
from penstock.deploy.config import Config
from penstock.deploy.state import State, has_text, read_state

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

LINE_SECONDS = 10.0
"""Pause between lines when the output is not a terminal."""
LOOK_SECONDS = 1.0
"""Pause between looks at the store."""
SHOWN = 8
"""SAEs of a run that are shown with their figures; a grid has too many for any screen."""


class Progress:
    """Looks at the store and at what workers say of themselves, and shows it."""

    def __init__(self, config: Config, redis_settings: RedisSettings) -> None:
        self._config = config
        self._redis = redis_settings
        self._client: Client | None = None
        self._started = time.monotonic()
        self._looked = self._printed = float("-inf")
        self._rates: dict[str, tuple[float, int]] = {}
        self._live: Live | None = None
        self.note = ""
        """What else is going on, such as a report being made."""

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=2, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, traceback)

    def update(self) -> None:
        """Look again if it is time to, and show what is there."""
        now = time.monotonic()
        pause = LOOK_SECONDS if self._live is not None else LINE_SECONDS
        if now - self._looked < pause:
            return
        self._looked = now
        try:
            state = read_state(self._config)
        except PenstockError as error:
            # a producer that finds the same thing says so and ends the run
            print(f"progress: {error}", file=sys.stderr)
            return
        workers = self._workers()
        if self._live is not None:
            self._live.update(self._screen(state, workers))
        else:
            print(self._line(state, workers), flush=True)

    def _workers(self) -> dict[str, dict[str, Any]]:
        from penstock.store.queue import Presence

        try:
            self._client = self._client or connect(self._redis)
            return Presence(self._client, self._config.redis.prefix, "supervisor").everyone()
        except (redis.RedisError, PenstockError):
            return {}

    def _rate(self, name: str, done: int) -> float:
        """Per second since this was first seen to move."""
        now = time.monotonic()
        at, first = self._rates.setdefault(name, (now, done))
        return (done - first) / (now - at) if now - at > 1 else 0.0

    def _harvest(self, state: State) -> str:
        if state.planned is None:
            if not has_text(self._config):
                return "starting"
            return "corpus ready, loading the model" if state.corpus_sequences else "building the corpus"
        rate = self._rate("harvest", state.committed_rows)
        left = (state.rows - state.committed_rows) / rate if rate else None
        if state.committed == state.planned:
            return f"{state.committed}/{state.planned} chunks, complete"
        return f"{state.committed}/{state.planned} chunks, {rate:,.0f} rows/s, {remaining(left)}"

    def _live_runs(
        self, state: State, workers: dict[str, dict[str, Any]]
    ) -> dict[str, tuple[int, int, dict[str, dict[str, float]], str]]:
        """Run -> (rows, total rows, figures, remark): workers know more than the last head."""
        said = {w["run"]: w for w in workers.values() if w.get("run")}
        found = {}
        for run_id, run in state.runs.items():
            rows, figures, remark = run.rows, run.figures, run.status
            word = said.get(run_id)
            if word and (word.get("rows") or -1) >= rows:
                rows, figures = word["rows"], word.get("figures") or figures
                if word.get("waiting_for") is not None:
                    remark = f"waiting for {word['waiting_for']}"
            found[run_id] = (rows, run.total_rows, figures, remark)
        return found

    def _line(self, state: State, workers: dict[str, dict[str, Any]]) -> str:
        parts = [f"{time.monotonic() - self._started:6.0f} s  harvest {self._harvest(state)}"]
        for run_id, (rows, total, figures, remark) in self._live_runs(state, workers).items():
            some = list(figures.items())[:SHOWN]
            losses = " ".join(f"{name}: loss {f['loss']:.3g} L0 {f['l0']:.0f}" for name, f in some)
            losses += f" and {len(figures) - SHOWN} more" if len(figures) > SHOWN else ""
            parts.append(f"{run_id} {self._pace(run_id, rows, total)} ({remark}) {losses}")
        return "  |  ".join([*parts, self.note] if self.note else parts)

    def _pace(self, run_id: str, rows: int, total: int) -> str:
        rate = self._rate(run_id, rows)
        if rows == total:
            return f"{rows:,} rows"
        left = (total - rows) / rate if rate else None
        return f"{rows:,}/{total:,} rows, {rate:,.0f} rows/s, {remaining(left)}"

    def _screen(self, state: State, workers: dict[str, dict[str, Any]]) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        stages = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        stages.add_row(
            "harvest",
            ProgressBar(total=state.planned or 1, completed=state.committed, width=30),
            self._harvest(state),
        )
        saes = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for column in ("SAE", "loss", "L0", "explained variance", "dead"):
            saes.add_column(column, justify="left" if column == "SAE" else "right")
        backlog = 0
        for run_id, (rows, total, figures, remark) in self._live_runs(state, workers).items():
            bar = ProgressBar(total=total or 1, completed=rows, width=30)
            stages.add_row(run_id, bar, f"{self._pace(run_id, rows, total)} ({remark})")
            backlog += max(0, state.runs[run_id].stored_rows - rows)
            for name, f in list(figures.items())[:SHOWN]:
                saes.add_row(
                    name,
                    f"{f['loss']:.4g}",
                    f"{f['l0']:.1f}",
                    f"{f['explained_variance']:.3f}",
                    f"{f['dead_features']:.0f}",
                )
            if len(figures) > SHOWN:
                saes.add_row(f"and {len(figures) - SHOWN} more of {run_id}", "", "", "", "")
        stages.add_row("backlog", "", f"{backlog:,} rows stored and not yet trained on")
        if self.note:
            stages.add_row("now", "", self.note)
        return Group(stages, "", saes)


def remaining(seconds: float | None) -> str:
    """'3 min left', or that it is not known."""
    if seconds is None:
        return "time left unknown"
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"
