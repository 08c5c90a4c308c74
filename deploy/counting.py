"""How far a long measurement is: a line that moves on a terminal, sparse lines elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from penstock.deploy.progress import LINE_SECONDS, remaining

if TYPE_CHECKING:
    from rich.live import Live


class Counting:
    """What is going on, how much of it is done, its rate and the time left.

    Args:
        tell: says a line where there is no terminal.
        clock: seconds.
    """

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._live: Live | None = None
        self._what = ""
        self._began = self._said = clock()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
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

    def begin(self, what: str) -> None:
        """Something else is being done from now on; its rate is counted from here."""
        self._what = what
        self._began = self._said = self._clock()
        if self._live is None:
            self._tell(what)
        else:
            self._show(what)

    def __call__(self, done: int, total: int) -> None:
        """So much of it is done."""
        now = self._clock()
        if self._live is not None:
            self._show(self._line(done, total, now - self._began))
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            self._tell(self._line(done, total, now - self._began))

    def _show(self, line: str) -> None:
        from rich.text import Text

        assert self._live is not None
        # a name in brackets is no markup
        self._live.update(Text(line))

    def _line(self, done: int, total: int, seconds: float) -> str:
        rate = done / seconds if seconds > 0 else 0.0
        left = (total - done) / rate if rate else None
        return f"{self._what}: {done:,} of {total:,}, {rate:.3g}/s, {remaining(left)}"
