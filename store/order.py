"""The order in which a run reads chunks, and how a window is cut into batches. Pure arithmetic.

A *position* p counts chunks read, epoch after epoch: epoch p div N, place p mod N. Epoch 0 reads
indices in order (the corpus is already permuted), later epochs by a permutation of the run's seed. A
*window* is K consecutive positions of one epoch, mixed in memory; the last of an epoch may be short.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

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
        n_chunks: chunks in the dataset (N).
        epochs: how often each is read.
        window_chunks: chunks mixed in memory (K).
        seed: the run's seed.
    """

    n_chunks: int
    epochs: int
    window_chunks: int
    seed: int

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
        """The chunk index at a position."""
        epoch, place = divmod(position, self.n_chunks)
        if epoch == 0:
            return place
        return int(_epoch_order(self.n_chunks, self.seed, epoch)[place])

    def epoch_chunks(self, epoch: int) -> npt.NDArray[np.int64]:
        """[n_chunks] the chunk indices of an epoch in order of position: `chunk_at`, all at once."""
        return np.arange(self.n_chunks) if epoch == 0 else _epoch_order(self.n_chunks, self.seed, epoch)

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


@lru_cache(maxsize=4)
def _epoch_order(n_chunks: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return permutation(n_chunks, seed, "epoch", epoch)


def batch_bounds(n_rows: int, batch_rows: int) -> list[tuple[int, int]]:
    """Cut rows into ⌈rows/B⌉ near-equal batches [start, stop); none is dropped."""
    n = -(-n_rows // batch_rows)
    edges = [n_rows * i // n for i in range(n + 1)] if n else [0]
    return list(pairwise(edges))
