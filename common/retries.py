"""Trying again: one policy for every service, with random pauses and within bounds.

Only what may pass by itself is tried again, and whoever tries again says so: `on_retry` counts it in a
metric. What loops for longer than this (a producer waiting for Redis, a worker waiting for data) does so in
sight, with a warning or a status.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    wait_random_exponential,
)

ATTEMPTS = 6
LAST_ATTEMPT_AFTER = 60.0
"""Seconds after the start of the first attempt; none begins later."""
FIRST_PAUSE = 0.2
"""Upper bound, in seconds, of the random pause after the first attempt; each later bound is twice as long.
No pause is shorter than half of it: a service that is away for a moment must not use up all attempts."""
LONGEST_PAUSE = 5.0
"""Seconds."""


@dataclass(frozen=True)
class Bounds:
    """How often, until when (seconds since the first attempt began) and with which pauses (seconds)."""

    attempts: int = ATTEMPTS
    last_attempt_after: float = LAST_ATTEMPT_AFTER
    longest_pause: float = LONGEST_PAUSE


OBJECTS = Bounds()
"""An object store request: nothing can go on without it, so it may take a minute."""
REDIS = Bounds(attempts=4, last_attempt_after=15.0, longest_pause=1.0)
"""A Redis command fails soon: work goes on without it, and leases want renewing several times a minute."""
ONCE = Bounds(attempts=1)
"""For a call inside a call that is tried again already."""


def retrying(
    is_transient: Callable[[BaseException], bool],
    on_retry: Callable[[BaseException], None],
    sleep: Callable[[float], None] = time.sleep,
    bounds: Bounds = OBJECTS,
) -> Retrying:
    """A policy to call something with: `retrying(…)(call)`. When it gives up, the last error is raised.

    Args:
        is_transient: whether an error may pass by itself; any other is raised at once.
        on_retry: called with the error before each pause that another attempt follows.
        sleep: pauses for some seconds.
    """

    def enough(state: RetryCallState) -> bool:
        # the pauses asked for count too: simulated time passes on no clock of ours
        passed = max(state.seconds_since_start or 0.0, state.idle_for)
        late = passed + state.upcoming_sleep > bounds.last_attempt_after
        return late or state.attempt_number >= bounds.attempts

    def tell(state: RetryCallState) -> None:
        if state.outcome is not None and (error := state.outcome.exception()) is not None:
            on_retry(error)

    return Retrying(
        retry=retry_if_exception(is_transient),
        stop=enough,
        wait=wait_random_exponential(
            FIRST_PAUSE, bounds.longest_pause, min=min(FIRST_PAUSE / 2, bounds.longest_pause)
        ),
        before_sleep=tell,
        sleep=sleep,
        reraise=True,
    )
