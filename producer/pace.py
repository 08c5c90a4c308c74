"""How fast a producer is, for those who look."""

import time
from collections import deque
from collections.abc import Callable

CHUNKS = 20
"""The pace is that of the last so many chunks."""


class Pace:
    """Rows per second over the last chunks, until now: it falls while nothing is committed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # the first entry says when counting begins; its rows are not counted
        self._committed = deque([(clock(), 0)], maxlen=CHUNKS + 1)

    def add(self, rows: int) -> None:
        """A chunk is committed."""
        self._committed.append((self._clock(), rows))

    def rows_per_second(self) -> float:
        """0 before the first chunk."""
        entries = list(self._committed)
        elapsed = self._clock() - entries[0][0]
        return sum(rows for _, rows in entries[1:]) / elapsed if elapsed > 0 else 0.0
