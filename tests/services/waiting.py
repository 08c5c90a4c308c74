"""Waiting for something that another thread or process does."""

import time
from collections.abc import Callable


def eventually(predicate: Callable[[], object], seconds: float = 30.0) -> None:
    """Return as soon as `predicate()` is true; fail if it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, f"not within {seconds} s: {predicate}"
        time.sleep(0.01)
