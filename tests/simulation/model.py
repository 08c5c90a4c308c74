"""A tiny dataset and a tiny training whose every row can be told apart.

A row is (chunk, row, who made it, 1) as bfloat16. "Training" appends what it was given to a list, whose
digest stands for the weights: two trainings are equal if and only if they saw the same rows in the same
order.
"""

import hashlib
import json
import random
import time
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import torch

from penstock.common.permutation import permutation
from penstock.store.arrays import BFLOAT16
from penstock.store.chunks import Chunk
from penstock.store.heads import Head
from penstock.store.loader import LoadedWindow, WindowReader
from penstock.store.manifest import Manifest
from penstock.store.order import batch_bounds
from penstock.trainer.config import ResolvedSettings, RunConfig
from services.synthetic import make_manifest

HOOK = "blocks.0.hook_resid_post"
D_IN = 4
BATCH_ROWS = 3

Row = list[int]


def tiny_manifest(rows: list[int], retention: str, first_sequence: int = 0) -> Manifest:
    """The plan of a dataset of four columns."""
    plan = make_manifest(rows, {HOOK: D_IN}, first_sequence=first_sequence)
    return plan.model_copy(update={"rows_per_chunk": max(rows), "retention": retention})


class TinySource:
    """Makes chunks.

    Args:
        seconds: the longest that a chunk takes.
        maker: written into each row. Where producers' numerics are mixed, it differs between them.
    """

    def __init__(self, manifest: Manifest, maker: int, seconds: float = 0.0) -> None:
        self._manifest = manifest
        self._seconds = seconds
        self._maker = maker

    def chunk(self, index: int) -> Chunk:
        time.sleep(random.uniform(0.0, self._seconds))
        rows = self._manifest.rows[index]
        first = self._manifest.corpus.first_sequence + 10 * index
        acts = np.array([[first // 10, row, self._maker, 1] for row in range(rows)], np.float32)
        place = np.arange(rows)
        return Chunk(
            index=index,
            acts={HOOK: acts.astype(BFLOAT16)},
            tokens=(1 + place).astype(np.int32),
            sequence=(first + place).astype(np.int64),
            position=place.astype(np.int32),
        )


class Inline(Executor):
    """An executor that does everything at once: simulations have no threads."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            done.set_result(function(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done

    def map(self, fn: Any, *iterables: Any, timeout: float | None = None, chunksize: int = 1) -> Any:
        return [fn(*items) for items in zip(*iterables, strict=True)]


class TinyGroup:
    """Stands where `Group` does: its weights are the rows that it has seen, in order."""

    def __init__(self, config: RunConfig, device: torch.device, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self.config = config
        self.device = device
        self.position = config.start
        self.step = self.rows = 0
        self.figures: dict[str, dict[str, float]] = {}
        self.seen: list[Row] = []

    def restore(self, head: Head, files: dict[str, bytes]) -> None:
        if head.checkpoint:
            self.position, self.step, self.rows = head.position, head.step, head.rows
            self.seen = json.loads(files["sae/tiny"])

    def checkpoint(self) -> dict[str, bytes]:
        return {"sae/tiny": json.dumps(self.seen).encode()}

    def begin_window(self, loaded: LoadedWindow) -> None:
        pass

    def train_step(self, batch: dict[str, torch.Tensor]) -> None:
        time.sleep(random.uniform(0.0, self._seconds))
        rows = batch[HOOK].float().int().tolist()
        self.seen += rows
        self.step += 1
        self.rows += len(rows)

    def end_window(self, loaded: LoadedWindow) -> tuple[str, int] | None:
        self.position = loaded.window.stop
        return None

    def history_point(self, seconds: float, waited: float, now: float) -> dict[str, Any]:
        return {"position": self.position, "rows": self.rows}


class TinyLoader:
    """Stands where `WindowLoader` does: reads when it is asked, in the worker's own turn."""

    def __init__(self, reader: WindowReader, first_window: int) -> None:
        self._reader = reader
        self._number = first_window
        self._skipped: set[int] | None = None
        self._chunks: list[Chunk | None] = []
        self._position = -1

    def get(self, timeout: float) -> LoadedWindow | None:
        window = self._reader.order.window(self._number)
        if self._skipped is None:
            self._skipped, self._chunks, self._position = self._reader.quarantined(), [], window.start
        while self._position < window.stop:
            chunk = self._reader.order.chunk_at(self._position)
            if chunk not in self._skipped:
                if not self._reader.supply.is_there(self._position, chunk):  # type: ignore[attr-defined]
                    return None
                self._chunks.append(self._reader.read(chunk))
            self._position += 1
        loaded = self._reader.lay_out(window, self._chunks)
        self._number, self._skipped = self._number + 1, None
        return loaded

    def close(self) -> None:
        pass


def expected_rows(settings: ResolvedSettings, start: int, stored: list[list[list[Row]]]) -> list[Row]:
    """What a training must have seen: written down from the protocol alone, without the code under test.

    Args:
        stored: of each dataset that is read, each chunk's rows as they were committed, in stored order.
    """
    numbered = [rows for dataset in stored for rows in dataset]
    n, size, seed = len(numbered), settings.window_chunks, settings.seed
    windows_per_epoch = -(-n // size)
    seen: list[Row] = []
    for epoch in range(settings.epochs):
        if epoch:
            chunks = permutation(n, seed, "epoch", epoch).tolist()
        else:
            owners = [part for part, dataset in enumerate(stored) for _ in dataset]
            own = [iter([c for c in range(n) if owners[c] == part]) for part in range(len(stored))]
            chunks = [next(own[owners[turn]]) for turn in permutation(n, seed, "interleave")]
        for within in range(windows_per_epoch):
            if epoch * n + within * size < start:
                continue
            rows = [row for chunk in chunks[within * size : (within + 1) * size] for row in numbered[chunk]]
            mixed = permutation(len(rows), seed, "window", epoch * windows_per_epoch + within)
            rows = [rows[i] for i in mixed]
            for first, last in batch_bounds(len(rows), BATCH_ROWS):
                seen += rows[first:last]
    return seen


def digest(seen: list[Row]) -> str:
    """Stands for weights."""
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
