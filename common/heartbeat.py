"""Leases are renewed off the working thread, and only while there is progress."""

import threading
import time
from collections.abc import Callable

import redis

from penstock.common.health import Health
from penstock.common.logs import LOGGER

PROGRESS_WITHIN_SECONDS = 120.0
"""Without a beat for this long, leases are left to expire: a stuck worker must not hold work."""


class Heartbeat:
    """Calls `renew` every third of a lease while the loop keeps beating.

    Args:
        renew: prolongs whatever is held and says who we are; Redis errors are survived.
    """

    def __init__(self, renew: Callable[[], None], lease_seconds: float, health: Health) -> None:
        self._renew = renew
        self._interval = lease_seconds / 3
        self._health = health
        self._last_beat = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """There was progress: a step, bytes moved, or an answered poll for data."""
        self._last_beat = time.monotonic()
        self._health.beat()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            if time.monotonic() - self._last_beat > PROGRESS_WITHIN_SECONDS:
                continue
            try:
                self._renew()
            except redis.RedisError as error:
                LOGGER.warning("leases cannot be renewed: %s", error)
