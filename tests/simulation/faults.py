"""What goes wrong between a process and a service."""

from collections.abc import Callable
from typing import Literal, TypeVar

from simulation.scheduler import Scheduler

_T = TypeVar("_T")

Outcome = Literal["fine", "refused", "lost", "late", "slow"]


class Faults:
    """Draws what happens to each request. The probabilities may be changed at any time.

    Attributes:
        refused: the request fails and has no effect.
        lost: it has its effect, but the connection breaks before the reply is there.
        late: the connection breaks, and a write has its effect only after `late_seconds`; the sender may
            have tried again, given up or died by then. Anything but a write is refused.
        slow: it takes effect after up to `slow_seconds`, then all is well.
        active: off, all is well.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        refused: float = 0.0,
        lost: float = 0.0,
        late: float = 0.0,
        slow: float = 0.0,
        late_seconds: float = 120.0,
        slow_seconds: float = 60.0,
    ) -> None:
        self.refused, self.lost, self.late, self.slow = refused, lost, late, slow
        self.late_seconds, self.slow_seconds = late_seconds, slow_seconds
        self.active = True
        self._scheduler = scheduler
        self._draw = scheduler.random.random

    def quiet(self) -> None:
        """No more faults."""
        self.active = False

    def outcome(self) -> Outcome:
        """What happens to the next request. Nothing ever happens to those from outside of actors."""
        if not self.active or self._scheduler.actor is None:
            return "fine"
        drawn = self._draw()
        if drawn >= self.refused + self.lost + self.late + self.slow:
            return "fine"
        if (drawn := drawn - self.refused) < 0.0:
            return "refused"
        if (drawn := drawn - self.lost) < 0.0:
            return "lost"
        return "late" if drawn < self.late else "slow"

    def lateness(self) -> float:
        """Seconds until a late write lands."""
        return self._draw() * self.late_seconds

    def slowness(self) -> float:
        """Seconds that a slow request takes."""
        return self._draw() * self.slow_seconds


def failing_first(failure: Exception, call: Callable[[], _T]) -> Callable[[], _T]:
    """What fails in the same way as a first attempt did, and from then on is the call.

    Retry policies are slow. Calls are therefore tried without one; only if that fails is the policy given
    this, and does what it would have done from the start.
    """
    failures = [failure]

    def attempt() -> _T:
        if failures:
            raise failures.pop()
        return call()

    return attempt
