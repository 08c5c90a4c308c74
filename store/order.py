"""The order in which a run reads chunks, and how a window is cut into batches. Pure arithmetic.

A run reads one dataset or several as one. Their chunks are numbered through: chunk i of the second is
number N₁ + i, and so on. A *position* p counts chunks read, epoch after epoch: epoch p div N, place p mod
N. Epoch 0 reads each dataset's chunks in their own order (the corpus is already permuted), several datasets
interleaved by a permutation of the run's seed; later epochs permute all chunks. A *window* is K consecutive
positions of one epoch, mixed in memory; the last of an epoch may be short.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from penstock.common.permutation import permutation


@dataclass(frozen=True)
class Window:
    """K (or fewer) consecutive positions [start, stop) of one epoch."""

    number: int
    epoch: int
    start: int
    stop: int


@dataclass(frozen=True)
class ReadingOrder:
    """Which chunk stands at which position of a run.

    Attributes:
        sizes: chunks in each dataset; N in all.
        epochs: how often each is read.
        window_chunks: chunks mixed in memory (K).
        seed: the run's seed.
    """

    sizes: tuple[int, ...]
    epochs: int
    window_chunks: int
    seed: int

    @property
    def n_chunks(self) -> int:
        return sum(self.sizes)

    @property
    def n_positions(self) -> int:
        return self.n_chunks * self.epochs

    @property
    def windows_per_epoch(self) -> int:
        return -(-self.n_chunks // self.window_chunks)

    @property
    def n_windows(self) -> int:
        return self.windows_per_epoch * self.epochs

    def chunk_at(self, position: int) -> int:
        """The number of the chunk at a position."""
        epoch, place = divmod(position, self.n_chunks)
        return int(_epoch_order(self.sizes, self.seed, epoch)[place])

    def epoch_chunks(self, epoch: int) -> npt.NDArray[np.int64]:
        """[n_chunks] the chunk indices of an epoch in order of position: `chunk_at`, all at once."""
        return _epoch_order(self.sizes, self.seed, epoch)

    def window(self, number: int) -> Window:
        """The window of that number, 0…n_windows−1."""
        epoch, within = divmod(number, self.windows_per_epoch)
        start = epoch * self.n_chunks + within * self.window_chunks
        stop = min(start + self.window_chunks, (epoch + 1) * self.n_chunks)
        return Window(number, epoch, start, stop)

    def window_starting_at(self, position: int) -> int:
        """The number of the window that starts at a position (`n_windows` at the very end)."""
        epoch, place = divmod(position, self.n_chunks)
        number, rest = divmod(place, self.window_chunks)
        if rest:
            raise ValueError(f"position {position} is not a window boundary")
        return epoch * self.windows_per_epoch + number

    def row_order(self, window: Window, n_rows: int) -> npt.NDArray[np.int64]:
        """[n_rows] the permutation of a window's rows, the same for every hook."""
        return permutation(n_rows, self.seed, "window", window.number)


@lru_cache(maxsize=16)
def _epoch_order(sizes: tuple[int, ...], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    if epoch:
        return permutation(sum(sizes), seed, "epoch", epoch)
    # all chunks in a random order say whose turn it is; each dataset then gives its own one after the other
    turns = permutation(sum(sizes), seed, "interleave")
    dataset = np.searchsorted(np.cumsum(sizes), turns, side="right")
    order = np.empty_like(turns)
    order[np.argsort(dataset, kind="stable")] = np.arange(len(turns))
    return order


def locate(sizes: Sequence[int], chunk: int) -> tuple[int, int]:
    """(which dataset, index in it) of a chunk by its number among several datasets.

    Raises:
        IndexError: there is no such chunk.
    """
    ends = list(accumulate(sizes))
    part = bisect_right(ends, chunk)
    if chunk < 0 or part == len(ends):
        raise IndexError(f"chunk {chunk} of {sum(sizes)}")
    return part, chunk - first_chunk(sizes, part)


def first_chunk(sizes: Sequence[int], part: int) -> int:
    """The number of a dataset's first chunk among several datasets."""
    return sum(sizes[:part])


def batch_bounds(n_rows: int, batch_rows: int) -> list[tuple[int, int]]:
    """Cut rows into ⌈rows/B⌉ near-equal batches [start, stop); none is dropped."""
    n = -(-n_rows // batch_rows)
    edges = [n_rows * i // n for i in range(n + 1)] if n else [0]
    return list(pairwise(edges))
