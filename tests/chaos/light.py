"""`penstock` on work that costs nothing: rows from a seed in place of a language model, no corpus, no report.

    python -m chaos.light ARGUMENTS...

Everything else is the real thing. The environment sets how fast and how badly things go:

    CHAOS_CHUNK_SECONDS, CHAOS_STEP_SECONDS    how long a chunk and a training step take at least
    CHAOS_FILL                                 JSON, see `Filler`
"""

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from penstock.deploy import cli, processes, supervisor
from penstock.deploy.config import Config
from penstock.producer.plan import DatasetSettings
from penstock.store.chunks import Chunk
from penstock.store.local import LocalStore
from penstock.store.manifest import Manifest
from penstock.trainer.group import Group
from services.synthetic import WIDTHS, SyntheticSource, make_manifest

PROGRAM = (sys.executable, "-m", "chaos.light")
CHUNK_SECONDS, STEP_SECONDS, FILL = "CHAOS_CHUNK_SECONDS", "CHAOS_STEP_SECONDS", "CHAOS_FILL"


def chunk_rows(index: int) -> int:
    """Rows differ from chunk to chunk, as they do where special tokens are left out."""
    return 190 + (7 * index) % 21


def light_plan(settings: DatasetSettings) -> Manifest:
    """The plan of a config's dataset: as many chunks as hold `max_rows`."""
    rows: list[int] = []
    while sum(rows) < (settings.max_rows or 1):
        rows.append(chunk_rows(len(rows)))
    return make_manifest(rows, {name: WIDTHS[name] for name in settings.hooks})


class PacedSource(SyntheticSource):
    """Takes its time, so that a fault finds it at work."""

    def __init__(self, manifest: Manifest, progress: Callable[[], None]) -> None:
        super().__init__(manifest)
        self._progress = progress

    def chunk(self, index: int) -> Chunk:
        take_time(CHUNK_SECONDS)
        self._progress()
        return super().chunk(index)


def take_time(variable: str) -> None:
    time.sleep(float(os.environ.get(variable, "0")))


class Filler:
    """Takes all space of a file system just before the n-th object whose key holds a text is written.

    Args:
        key: the text.
        nth: counted from 1, within this process.
        file: made there, and grown until nothing more fits.
    """

    def __init__(self, key: str, nth: int, file: str) -> None:
        self._key = key
        self._left = nth
        self._file = Path(file)

    def before(self, key: str) -> None:
        if self._key in key:
            self._left -= 1
            if self._left == 0:
                fill(self._file)

    def install(self) -> None:
        """Stand in front of both ways to write an object to a file."""
        create, put = LocalStore._create, LocalStore.put

        def filled_create(store: LocalStore, key: str, data: bytes) -> bool:
            self.before(key)
            return create(store, key, data)

        def filled_put(store: LocalStore, key: str, data: bytes) -> None:
            self.before(key)
            put(store, key, data)

        store_class: Any = LocalStore
        store_class._create, store_class.put = filled_create, filled_put


def fill(file: Path) -> None:
    """Grow a file until its file system is full, to the last byte."""
    with open(file, "ab", buffering=0) as out:
        size = 1 << 20
        while size:
            try:
                size = size if out.write(bytes(size)) == size else size // 2
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2


def build_corpus(config: Config, progress: Callable[[int, int | None], None]) -> Any:
    facts = {"n_sequences": 0, "context": 0, "n_held_out": 0, "n_documents": 0, "digest": "none"}
    return SimpleNamespace(manifest=SimpleNamespace(**facts))


def open_source(config: Config) -> tuple[Manifest, Callable[[Manifest, Callable[[], None]], PacedSource]]:
    return light_plan(config.dataset), PacedSource


def report(
    config: Config, run_url: str, out: Path, progress: Callable[[int, int], None]
) -> dict[str, list[Any]]:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text("<html></html>\n")
    return {"saes": []}


def main() -> None:
    # parts are looked up in these modules when a command runs
    parts: Any = processes
    parts.build_corpus, parts.open_source, parts.report = build_corpus, open_source, report
    whole: Any = supervisor
    whole.run = partial(supervisor.run, program=PROGRAM)
    pace_steps()
    if FILL in os.environ:
        Filler(**json.loads(os.environ[FILL])).install()
    cli.main()


def pace_steps() -> None:
    """Training steps take their time, too."""
    step = Group.train_step

    def paced(group: Group, batch: dict[str, Any]) -> None:
        take_time(STEP_SECONDS)
        step(group, batch)

    group_class: Any = Group
    group_class.train_step = paced


if __name__ == "__main__":
    main()
