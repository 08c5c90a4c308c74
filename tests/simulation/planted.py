"""Protocol bugs, planted on purpose: the simulation must find each."""

BUGS: dict[str, object] = {}
from contextlib import contextmanager
from collections.abc import Iterator
@contextmanager
def planted(bug: str | None) -> Iterator[None]:
    yield
