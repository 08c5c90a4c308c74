"""Runs and floors as their records say: datasets that keep only a window, without any training."""

import time
from pathlib import Path
from typing import Any

from penstock.store.arrays import dataset_arrays
from penstock.store.dataset import Dataset
from penstock.store.heads import Head, StoredFile, newest_head
from penstock.store.layout import ARRAYS, config_key, floor_key, head_key
from penstock.store.local import LocalStore
from penstock.store.objects import ObjectStore
from penstock.store.retention import Reader, Retention, register_reader
from services.synthetic import make_manifest, write_dataset

CHUNKS = 12
ROWS = [20] * CHUNKS
MANIFEST = make_manifest(ROWS, retention="window")
BUDGET = 4


def commit_heads(
    runs: ObjectStore, run: str, *positions: int, status: str = "running", when: float | None = None
) -> None:
    """Progress heads of a run at some positions, with a checkpoint each."""
    for position in positions:
        newest = newest_head(runs, run)
        n = 0 if newest is None else newest.n + 1
        file = StoredFile(key=f"checkpoints/{n}-w/sae/a.safetensors", size=1, sha256="0")
        head = Head.model_validate(
            {
                "n": n,
                "parent": None if newest is None else newest.n,
                "writer": "w",
                "kind": "progress",
                "status": status,
                "position": position,
                "step": 0,
                "rows": 0,
                "environment": {},
                "checkpoint": {"a": file},
                "time": time.time() if when is None else when,
            }
        )
        assert runs.create_guarded(head_key(run, n), head.record())


class Window:
    """A dataset that keeps a window, and runs that read it."""

    def __init__(self, directory: Path, made: int = CHUNKS) -> None:
        self.dataset: Dataset = write_dataset(directory / "dataset", MANIFEST, range(made))
        self.store = self.dataset.store
        self.runs = LocalStore(str(directory / "runs"))

    def deleter(self, **changes: Any) -> Retention:
        return Retention(self.store, MANIFEST, **{"budget_chunks": BUDGET} | changes)

    def register(self, run: str, needs: int = 1) -> int:
        """Create a reader's record; it is not submitted yet."""
        return register_reader(self.store, Reader(run, self.runs.url, 0, needs))

    def configure(self, run: str, start: int) -> None:
        self.runs.create_guarded(config_key(run), {"format_version": 1, "start": start})

    def submit(self, run: str) -> int:
        """As `submit_run` does it; returns where the run begins."""
        start = self.register(run)
        self.configure(run, start)
        return start

    def train(self, run: str, *positions: int, status: str = "running", when: float | None = None) -> None:
        commit_heads(self.runs, run, *positions, status=status, when=when)

    def stored(self) -> set[int]:
        """Chunks that have all their objects; every other has none."""
        keys = {key for key, _ in self.store.list(f"{ARRAYS}/")}
        specs = dataset_arrays(MANIFEST)
        counts = {i: sum(spec.key(ARRAYS, i) in keys for spec in specs) for i in range(CHUNKS)}
        assert set(counts.values()) <= {0, len(specs)}
        return {index for index, count in counts.items() if count}

    def floors(self) -> list[int]:
        """All floors in order of their number, which must be dense."""
        keys = [key for key, _ in self.store.list("floor/") if key.endswith(".json")]
        return [self.store.get_record(floor_key(n))["floor"] for n in range(len(keys))]


def all_from(index: int) -> set[int]:
    return set(range(index, CHUNKS))
