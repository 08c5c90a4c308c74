"""Where a shuffled reading stands: pure arithmetic over a fixed set of chunks.

The order of batches is that of a training run. Its rows and batches per window follow from the manifest,
so that the place of any batch is known without reading what comes before it. That needs the set of chunks to
be fixed: which ones are read, and which of them were quarantined, is decided once and kept in the state.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from penstock.common.errors import UserError
from penstock.common.settings import one_line
from penstock.store.dataset import Dataset
from penstock.store.order import ReadingOrder, batch_bounds

_Ranges = list[Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]]
"""Ascending [start, stop) pairs."""


@dataclass(frozen=True)
class PinnedOrder(ReadingOrder):
    """The reading order over some of a dataset's chunks, which stand where the i-th would."""

    chunks: tuple[int, ...] = ()

    def chunk_at(self, position: int) -> int:
        return self.chunks[super().chunk_at(position)]


class BatchPlan:
    """Which global batches each window holds.

    Args:
        rows: used rows per chunk index.
        left_out: chunks of the order that give no rows.

    Attributes:
        edges: [n_windows + 1] window w holds batches [edges[w], edges[w + 1]).
    """

    def __init__(
        self, order: ReadingOrder, rows: list[int], left_out: frozenset[int], batch_rows: int
    ) -> None:
        self._order = order
        self._rows = rows
        self._left_out = left_out
        self._batch_rows = batch_rows
        counts = [-(-self.rows_in(number) // batch_rows) for number in range(order.n_windows)]
        self.edges: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @property
    def n_batches(self) -> int:
        return int(self.edges[-1])

    def rows_in(self, number: int) -> int:
        """Planned rows of a window."""
        window = self._order.window(number)
        chunks = (self._order.chunk_at(position) for position in range(window.start, window.stop))
        return sum(self._rows[chunk] for chunk in chunks if chunk not in self._left_out)

    def window_of(self, batch: int) -> int:
        """The window that holds a global batch."""
        return int(np.searchsorted(self.edges, batch, side="right")) - 1

    def bounds(self, number: int) -> list[tuple[int, int]]:
        """Rows [start, stop) of each batch of a window."""
        return batch_bounds(self.rows_in(number), self._batch_rows)


class Part(BaseModel):
    """One DataLoader worker of one rank."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rank: NonNegativeInt
    world_size: PositiveInt
    worker: NonNegativeInt
    workers: PositiveInt
    start: NonNegativeInt
    """The global batch at which the workers began to take turns."""


class ReadingState(BaseModel):
    """How far a reading is, in JSON's types.

    `batches` of the global order are done, by all ranks together. Where a DataLoader worker speaks for itself
    alone it is named in `part`, and `batches` is the number of its next batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    digest: str
    """Of the dataset's manifest."""
    seed: int
    batch_rows: PositiveInt
    window_chunks: PositiveInt
    chunks: Annotated[_Ranges, Field(min_length=1)]
    left_out: _Ranges
    """Chunks among them that were quarantined at the start."""
    batches: NonNegativeInt
    part: Part | None = None

    @classmethod
    def parse(cls, state: dict[str, Any]) -> "ReadingState":
        """A state from outside.

        Raises:
            UserError: it is none.
        """
        try:
            return cls.model_validate(state)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in problem["loc"]) or "it"
            raise UserError(
                f"not the state of a reading: {one_line(field, 60)}: {one_line(problem['msg'], 200)}; "
                "give what state_dict or state_after returned"
            ) from error


def pin_chunks(dataset: Dataset, partial: bool) -> tuple[tuple[int, ...], frozenset[int]]:
    """The chunks that a reading is to hold on to: all of them, and those that are quarantined.

    Args:
        partial: take the chunks that are committed now for all of them.

    Raises:
        UserError: chunks are missing and `partial` was not asked for, or none is there.
    """
    quarantined = frozenset(index for index in dataset.quarantined() if index < dataset.n_chunks)
    there = dataset.committed() | quarantined
    missing = dataset.n_chunks - len(there)
    if missing and not partial:
        raise UserError(
            f"{dataset.url}: {missing} of its {dataset.n_chunks} chunks are not committed; finish it with "
            "`penstock produce`, or read the others with partial=True"
        )
    if not there:
        raise UserError(f"{dataset.url}: none of its {dataset.n_chunks} chunks is committed yet")
    return tuple(sorted(there)), quarantined


def to_ranges(indices: Iterable[int]) -> list[list[int]]:
    """Indices as ascending [start, stop) pairs."""
    ranges: list[list[int]] = []
    for index in sorted(indices):
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] += 1
        else:
            ranges.append([index, index + 1])
    return ranges


def from_ranges(ranges: list[list[int]], n_chunks: int) -> tuple[int, ...]:
    """The indices that `to_ranges` was given.

    Raises:
        UserError: they are not ascending ranges of chunks of a dataset that has `n_chunks`.
    """
    edges = [edge for pair in ranges for edge in pair]
    if any(a >= b for a, b in ranges) or any(a >= b for a, b in pairwise(edges)) or edges[-1:] > [n_chunks]:
        raise UserError("not the state of a reading: its chunks are not ascending ranges of this dataset's")
    return tuple(index for start, stop in ranges for index in range(start, stop))
