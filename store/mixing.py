"""How well a dataset's rows are mixed in the batches that a training run sees.

A chunk holds whole sequences, and rows of one sequence resemble each other. Batches are read through the
loader's own windows and order, and compared with two perfect shuffles: of the rows of each window, which
is what the loader promises, and of the whole dataset, which would need all of it in memory.

Rates are probabilities that two different rows come from one sequence, over pairs of rows of a batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from penstock.common.errors import UserError
from penstock.common.permutation import counter_hash, derive_key
from penstock.store.chunks import Chunk
from penstock.store.dataset import Dataset
from penstock.store.loader import AsStored, WindowReader
from penstock.store.order import ReadingOrder, Window, batch_bounds

LAGS = 8
"""Autocorrelations are taken at lags 1 … LAGS."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairCounts:
    """Rows of some chunks by sequence: n rows, and Σ n_s (n_s − 1) over the sequences s."""

    rows: int
    same: int
    sequences: int

    @property
    def rate(self) -> float:
        """Probability that two different rows, drawn at random, come from one sequence."""
        return self.same / (self.rows * (self.rows - 1)) if self.rows > 1 else 0.0


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows that were looked at, how many were of one sequence, and how many chance would give."""

    pairs: float
    same: float
    expected: float

    @property
    def rate(self) -> float:
        return self.same / self.pairs if self.pairs else 0.0

    @property
    def expected_rate(self) -> float:
        return self.expected / self.pairs if self.pairs else 0.0

    @property
    def too_many(self) -> bool:
        """More than 10 % above chance, and by more than chance varies (5 standard deviations)."""
        return self.same > 1.1 * self.expected + 5 * math.sqrt(self.expected)


@dataclass(frozen=True)
class HookMixing:
    """What the rows themselves say, at one hook point.

    Attributes:
        rows, batches: autocorrelations [LAGS] along the stream, at lags 1 … LAGS, of a fixed random
            projection of the rows, and of its mean over each batch.
        n_rows, n_batches: lengths of the two streams.
        sequence_correlation: correlation of two rows of one sequence, over all dimensions.
        drift: variance of sequence means between chunks over that within chunks; 1 if the sequences of
            each chunk were drawn at random.
        n_chunks: chunks that it was taken from.
    """

    rows: Floats
    batches: Floats
    n_rows: int
    n_batches: int
    sequence_correlation: float
    drift: float
    n_chunks: int

    @property
    def drifts(self) -> bool:
        """Whether chunks differ by more than the sequences that chance would give them."""
        return self.n_chunks > 1 and self.drift > max(1.5, 1 + 5 * (2 / (self.n_chunks - 1)) ** 0.5)


@dataclass(frozen=True)
class Mixing:
    """The measurement.

    Attributes:
        windows: how many were read, evenly spaced over the first epoch.
        in_batches: pairs within batches, against a perfect shuffle of each window's rows.
        as_stored: neighbours in stored order, against a perfect shuffle of each chunk's rows.
        dataset: rows and sequences of the whole dataset; unread chunks count like those read.
        exact: every chunk was read, so that `dataset` is no estimate.
    """

    order: ReadingOrder
    batch_rows: int
    windows: int
    in_batches: Pairs
    as_stored: Pairs
    dataset: PairCounts
    exact: bool
    hooks: dict[str, HookMixing]
    window_rates: dict[int, float]
    within: int
    """Smallest window, in chunks, whose rate is within 10 % of the whole dataset's."""

    @property
    def against_dataset(self) -> float:
        """Same-sequence pairs within batches over those of a perfect shuffle of the whole dataset."""
        return self.in_batches.rate / self.dataset.rate if self.dataset.rate else 1.0

    def effective_rows(self, rate: float, hook: HookMixing) -> float:
        """Rows drawn from the whole dataset whose mean would vary as much as that of a batch does.

        Kish's design effect, for batches with this rate: every pair of one sequence more than chance
        gives adds its correlation to the variance of the mean.
        """
        excess = (rate - self.dataset.rate) * hook.sequence_correlation
        return self.batch_rows / (1 + (self.batch_rows - 1) * excess)


def measure_mixing(
    dataset: Dataset, order: ReadingOrder, batch_rows: int, hooks: Sequence[str], max_rows: int = 1_000_000
) -> Mixing:
    """Read windows as a run does, and count.

    Args:
        order: that of the run, one epoch.
        hooks: hook points whose rows are looked at; read one after the other.
        max_rows: read evenly spaced windows of about this many rows in all, at least one.

    Raises:
        UserError: the dataset lacks a hook, deletes its chunks, or has no whole window yet.
        DataError: a chunk is damaged.
    """
    for hook in hooks:
        dataset.manifest.d_in(hook)
    windows = _choose(dataset, order, max_rows)
    counts: dict[int, PairCounts] = {}
    batches, stored = _Tally(), _Tally()
    for window in windows:
        chunks = list(_chunks(dataset, order, window, []))
        sequence = np.concatenate([np.zeros(0, np.int64), *(chunk.sequence for chunk in chunks)])
        chance = pair_counts(sequence).rate
        mixed = sequence[order.row_order(window, len(sequence))]
        for start, stop in batch_bounds(len(mixed), batch_rows):
            batches.add(pair_counts(mixed[start:stop]), chance)
        for chunk in chunks:
            counts[chunk.index] = pair_counts(chunk.sequence)
            stored.add_neighbours(chunk.sequence, counts[chunk.index].rate)
    rates = _Rates(dataset.manifest.rows, order, counts)
    return Mixing(
        order=order,
        batch_rows=batch_rows,
        windows=len(windows),
        in_batches=batches.pairs(),
        as_stored=stored.pairs(),
        dataset=rates.whole,
        exact=len(counts) == dataset.n_chunks,
        hooks={hook: _measure_hook(dataset, order, windows, batch_rows, hook) for hook in hooks},
        window_rates={size: rates.of_window(size, batch_rows) for size in _sizes(order)},
        within=rates.smallest_within(1.1, batch_rows),
    )


def pair_counts(sequence: npt.NDArray[np.int64]) -> PairCounts:
    """Count the rows of each sequence: [rows] sequence numbers, in any order."""
    n = np.unique(sequence, return_counts=True)[1]
    return PairCounts(len(sequence), int((n * (n - 1)).sum()), len(n))


def _choose(dataset: Dataset, order: ReadingOrder, max_rows: int) -> list[Window]:
    if dataset.manifest.retention == "window":
        raise UserError(f"{dataset.url} keeps only a window of its chunks; its mixing cannot be measured")
    there = dataset.committed()
    whole = [
        window
        for window in map(order.window, range(order.windows_per_epoch))
        if all(order.chunk_at(position) in there for position in range(window.start, window.stop))
    ]
    if not whole:
        raise UserError(
            f"{dataset.url} has no whole window of {order.window_chunks} chunks yet ({len(there)} are "
            "committed); choose a smaller --window-chunks or wait"
        )
    per_window = dataset.manifest.total_rows / order.windows_per_epoch
    wanted = min(len(whole), max(1, round(max_rows / max(1.0, per_window))))
    return [whole[i * len(whole) // wanted] for i in range(wanted)]


def _chunks(dataset: Dataset, order: ReadingOrder, window: Window, hooks: list[str]) -> Iterator[Chunk]:
    reader = WindowReader(dataset, hooks, order, AsStored())
    skipped = reader.quarantined()
    for position in range(window.start, window.stop):
        index = order.chunk_at(position)
        chunk = None if index in skipped else reader.read(index)
        if chunk is not None and chunk.rows:
            yield chunk


class _Tally:
    """Adds pairs up."""

    def __init__(self) -> None:
        self._pairs = self._same = self._expected = 0.0

    def add(self, counts: PairCounts, chance: float) -> None:
        pairs = counts.rows * (counts.rows - 1) / 2
        self._add(pairs, counts.same / 2, chance)

    def add_neighbours(self, sequence: npt.NDArray[np.int64], chance: float) -> None:
        self._add(max(0, len(sequence) - 1), float((sequence[1:] == sequence[:-1]).sum()), chance)

    def pairs(self) -> Pairs:
        return Pairs(self._pairs, self._same, self._expected)

    def _add(self, pairs: float, same: float, chance: float) -> None:
        self._pairs += pairs
        self._same += same
        self._expected += pairs * chance


class _Rates:
    """Rates of windows of any size, from the row counts of the sequences alone."""

    def __init__(self, rows: Sequence[int], order: ReadingOrder, counts: dict[int, PairCounts]) -> None:
        read = sum(c.rows for c in counts.values())
        same_per_row = sum(c.same for c in counts.values()) / max(1, read)
        rows_per_sequence = read / max(1, sum(c.sequences for c in counts.values()))
        by_position = [order.chunk_at(position) for position in range(order.n_chunks)]
        n = [counts[i].rows if i in counts else rows[i] for i in by_position]
        same = [counts[i].same if i in counts else same_per_row * rows[i] for i in by_position]
        self._rows = np.concatenate([[0], np.cumsum(n)])
        self._same = np.concatenate([[0], np.cumsum(same)])
        total = int(self._rows[-1])
        known = sum(c.sequences for c in counts.values())
        unread = round((total - read) / max(1.0, rows_per_sequence))
        self.whole = PairCounts(total, round(self._same[-1]), known + unread)

    def of_window(self, size: int, batch_rows: int) -> float:
        """Rate within batches of windows of `size` chunks whose rows are perfectly shuffled."""
        edges = [*range(0, len(self._rows) - 1, size), len(self._rows) - 1]
        pairs = same = 0.0
        for start, stop in pairwise(edges):
            n = int(self._rows[stop] - self._rows[start])
            if n > 1:
                sizes = [b - a for a, b in batch_bounds(n, batch_rows)]
                here = sum(b * (b - 1) for b in sizes)
                pairs += here
                same += here * float(self._same[stop] - self._same[start]) / (n * (n - 1))
        return same / pairs if pairs else 0.0

    def smallest_within(self, factor: float, batch_rows: int) -> int:
        """The smallest window whose rate is at most `factor` times the whole dataset's."""
        n = len(self._rows) - 1
        # only sizes that make fewer windows than the size before can help
        for size in sorted({-(-n // windows) for windows in range(1, n + 1)}):
            if -(-n // size) <= 2 * factor and (self.of_window(size, batch_rows) <= factor * self.whole.rate):
                return size
        return n


def _sizes(order: ReadingOrder) -> list[int]:
    doubled = [2**i for i in range(order.n_chunks.bit_length()) if 2**i < order.n_chunks]
    return sorted({*doubled, min(order.window_chunks, order.n_chunks), order.n_chunks})


def _measure_hook(
    dataset: Dataset, order: ReadingOrder, windows: list[Window], batch_rows: int, hook: str
) -> HookMixing:
    direction = projection(hook, dataset.manifest.d_in(hook))
    reader = WindowReader(dataset, [hook], order, AsStored())
    spread = _Spread(dataset.manifest.d_in(hook))
    rows: list[npt.NDArray[np.float32]] = []
    for window in windows:
        chunks = list(_chunks(dataset, order, window, [hook]))
        for chunk in chunks:
            spread.add(chunk.sequence, chunk.acts[hook].astype(np.float32))
        loaded = reader.lay_out(window, chunks)
        rows += [(batch[hook].float() @ direction).numpy() for batch in loaded.batches(batch_rows)]
    stream = np.concatenate([np.zeros(0), *rows])
    means = np.array([part.mean(dtype=np.float64) for part in rows])
    return HookMixing(
        rows=autocorrelation(stream),
        batches=autocorrelation(means),
        n_rows=len(stream),
        n_batches=len(means),
        sequence_correlation=spread.sequence_correlation(),
        drift=spread.drift(),
        n_chunks=spread.n_chunks,
    )


def projection(hook: str, d_in: int) -> torch.Tensor:
    """[d_in] a fixed direction of length 1 whose entries are ±1/√d_in."""
    bits = counter_hash(derive_key(0, "projection", hook), d_in) >> np.uint64(63)
    return torch.from_numpy((2.0 * bits.astype(np.float32) - 1) / d_in**0.5).float()


def autocorrelation(x: Floats) -> Floats:
    """[LAGS] serial correlation of x at lags 1 … LAGS; 0 where x is too short or constant."""
    x = x - (x.mean() if len(x) else 0.0)
    power = float(x @ x)
    return np.array([float(x[lag:] @ x[:-lag]) / power if power and lag < len(x) else 0.0 for lag in _LAGS])


_LAGS = range(1, LAGS + 1)


def chance_autocorrelation(n: int, lag: int) -> tuple[float, float]:
    """Mean and standard deviation of `autocorrelation` after a perfect shuffle of n values.

    The mean is exact for any exchangeable values; the deviation is that of large n.
    """
    return (-(n - lag) / (n * (n - 1)), n**-0.5) if n > 1 else (0.0, 0.0)


class _Spread:
    """How rows, sequences and chunks vary: sums over chunks of rows [n, d_in]."""

    def __init__(self, d_in: int) -> None:
        self.n_chunks = 0
        self._rows = self._pairs = self._sequences = 0
        self._sum, self._lead = np.zeros(d_in), np.zeros(d_in)
        self._square = self._together = 0.0
        self._means, self._within = np.zeros((0, d_in)), 0.0
        self._weights: list[int] = []

    def add(self, sequence: npt.NDArray[np.int64], acts: npt.NDArray[np.float32]) -> None:
        """One chunk's rows, in any order."""
        by_sequence = np.argsort(sequence, kind="stable")
        numbers, first, n = np.unique(sequence[by_sequence], return_index=True, return_counts=True)
        sums = np.add.reduceat(acts[by_sequence], first, axis=0, dtype=np.float64)
        square = float(np.einsum("rd,rd->", acts, acts, dtype=np.float64))
        self._rows += len(sequence)
        self._pairs += int((n * (n - 1)).sum())
        self._sum += sums.sum(axis=0)
        self._lead += (n - 1) @ sums
        self._square += square
        self._together += float((sums**2).sum()) - square
        means = sums / n[:, None]
        centre = means.mean(axis=0)
        self.n_chunks += 1
        self._sequences += len(numbers)
        self._within += float(((means - centre) ** 2).sum())
        self._means = np.concatenate([self._means, centre[None]])
        self._weights.append(len(numbers))

    def sequence_correlation(self) -> float:
        """Σ (x − μ)·(x′ − μ) over pairs of rows of one sequence, over what it is for x′ = x."""
        if not self._pairs:
            return 0.0
        mean = self._sum / self._rows
        square = float(mean @ mean)
        variance = self._square / self._rows - square
        together = self._together - 2 * float(self._lead @ mean) + self._pairs * square
        return together / self._pairs / variance if variance > 0 else 0.0

    def drift(self) -> float:
        """Between-chunk over within-chunk mean square of the sequences' means (an F ratio)."""
        chunks, inner = self.n_chunks - 1, self._sequences - self.n_chunks
        if chunks < 1 or inner < 1 or not self._within:
            return 1.0
        weights = np.array(self._weights, np.float64)
        centre = weights @ self._means / weights.sum()
        between = float(weights @ ((self._means - centre) ** 2).sum(axis=1))
        return (between / chunks) / (self._within / inner)
