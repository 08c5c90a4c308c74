"""Looking rows up: by their place, by their token, and the text around them. numpy only."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from penstock.common.errors import DamagedObject, ObjectMissing, UserError
from penstock.store.arrays import BFLOAT16
from penstock.store.chunks import Array
from penstock.store.commits import Commit
from penstock.store.dataset import Dataset
from penstock.store.layout import POSITION, SEQUENCE, TOKENS, acts_array
from penstock.store.resume import pin_chunks

READ_THREADS = 4
"""Chunks read at the same time."""

_T = TypeVar("_T")

ABSENT = -1
"""Stands for a token whose row the dataset does not hold."""


@dataclass(frozen=True)
class Rows:
    """Some rows and where they came from.

    Attributes:
        acts: per hook, [rows, d_in] bfloat16.
        tokens, sequence, position: [rows]; token id, corpus sequence, place within it.
    """

    acts: dict[str, Array]
    tokens: npt.NDArray[np.int32]
    sequence: npt.NDArray[np.int64]
    position: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Context:
    """Consecutive tokens of one sequence.

    Attributes:
        sequence: which one, by its number in the corpus.
        position: the place that was asked for.
        positions: [n] places, ascending without a gap.
        tokens: [n] token ids; `ABSENT` (−1) where a special token was left out of the dataset.
    """

    sequence: int
    position: int
    positions: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]

    def text(self, decode: Callable[[list[int]], str], absent: str = "[special]") -> str:
        """The tokens as text.

        Args:
            decode: token ids to text, such as the `decode` of the tokenizer that the corpus was made with.
            absent: stands for each token that is not there.
        """
        parts = []
        for there, run in groupby(self.tokens.tolist(), lambda token: token != ABSENT):
            ids = list(run)
            parts.append(decode(ids) if there else absent * len(ids))
        return "".join(parts)


def as_numpy(dataset: Dataset, hook: str, start: int = 0, stop: int | None = None) -> Array:
    """Used rows in stored order, that is chunk after chunk, without the unused ends of chunks.

    Memory: the result, and one object for each of `READ_THREADS` threads.

    Args:
        start, stop: rows, counted over the whole dataset as Python slices count them.

    Returns:
        [stop − start, d_in] bfloat16 (`ml_dtypes.bfloat16`).

    Raises:
        UserError: the dataset does not hold the hook.
        ObjectMissing, DamagedObject: a chunk of these rows is not committed, or not whole.
    """
    width, planned = dataset.manifest.d_in(hook), dataset.manifest.rows
    edges = np.concatenate([[0], np.cumsum(planned, dtype=np.int64)])
    first, last, _ = slice(start, stop).indices(int(edges[-1]))
    out = np.empty((max(0, last - first), width), BFLOAT16)
    if not len(out):
        return out

    def read(index: int) -> None:
        below, above = max(first, int(edges[index])), min(last, int(edges[index + 1]))
        if below < above:
            acts = dataset.read_object(acts_array(hook), _commit(dataset, index))
            out[below - first : above - first] = acts[below - edges[index] : above - edges[index]]

    chunks = np.searchsorted(edges, [first, last - 1], side="right") - 1
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read") as pool:
        for _ in _in_order(pool, read, range(int(chunks[0]), int(chunks[1]) + 1)):
            pass
    return out


def find_rows(
    dataset: Dataset,
    tokens: Sequence[int],
    hooks: Sequence[str] | None = None,
    limit: int | None = 1000,
    partial: bool = False,
) -> Rows:
    """The first rows of some token ids, in stored order.

    Reads every chunk's token ids until there are enough rows, and activations only of chunks with a hit.

    Args:
        tokens: token ids.
        hooks: hook points to read; all of them by default.
        limit: how many rows at most; None for all.
        partial: of a dataset that is not complete, look into the chunks that are committed now.

    Raises:
        UserError: the dataset does not hold a hook, or is not complete.
        DataError: a chunk is missing or not whole. Quarantined chunks are left out.
    """
    manifest = dataset.manifest
    names = [hook.name for hook in manifest.hooks] if hooks is None else list(hooks)
    widths = {name: manifest.d_in(name) for name in names}
    if limit is not None and limit < 0:
        raise UserError(f"limit is {limit}; it must be 0 or more, or None for all rows")
    wanted = np.asarray(list(tokens), dtype=np.int64)
    chunks, left_out = pin_chunks(dataset, partial)
    found: list[Rows] = []

    def look(index: int) -> tuple[Commit, npt.NDArray[np.int64]]:
        commit = _commit(dataset, index)
        held = dataset.read_object(TOKENS, commit)[: commit.rows]
        return commit, np.flatnonzero(np.isin(held, wanted))

    searched = [index for index in chunks if index not in left_out]
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read") as pool:
        left = limit
        for commit, hits in _in_order(pool, look, searched) if len(wanted) and left != 0 else ():
            if len(hits):
                found.append(_take(dataset, commit, names, hits[:left]))
                left = None if left is None else left - len(found[-1])
            if left == 0:
                break
    nothing = Rows(
        acts={name: np.zeros((0, width), BFLOAT16) for name, width in widths.items()},
        tokens=np.zeros(0, np.int32),
        sequence=np.zeros(0, np.int64),
        position=np.zeros(0, np.int32),
    )
    parts = [nothing, *found]
    return Rows(
        acts={name: np.concatenate([part.acts[name] for part in parts]) for name in names},
        tokens=np.concatenate([part.tokens for part in parts]),
        sequence=np.concatenate([part.sequence for part in parts]),
        position=np.concatenate([part.position for part in parts]),
    )


def context(dataset: Dataset, sequence: int, position: int, before: int = 16, after: int = 16) -> Context:
    """The tokens around a row, as far as its sequence goes. All of them lie in the row's chunk.

    Args:
        sequence, position: as a row's `sequence` and `position` say.
        before, after: how many tokens to add on either side.

    Raises:
        UserError: no such place in the dataset, or a negative number of tokens.
        ObjectMissing, DamagedObject: the chunk is not committed, or not whole.
    """
    corpus = dataset.manifest.corpus
    limits = {
        "sequence": (sequence, corpus.first_sequence, corpus.end),
        "position": (position, 0, corpus.context),
    }
    for name, (value, first, end) in limits.items():
        if not first <= value < end:
            raise UserError(f"{name} is {value}; {dataset.url} has {name}s {first} to {end - 1}")
    if before < 0 or after < 0:
        raise UserError(f"before is {before} and after {after}; neither may be negative")
    commit = _commit(dataset, chunk_of(dataset, sequence))
    used = slice(commit.rows)
    of_sequence = dataset.read_object(SEQUENCE, commit)[used] == sequence
    places = dataset.read_object(POSITION, commit)[used][of_sequence]
    whole = np.full(corpus.context, ABSENT, np.int32)
    whole[places.astype(np.int64)] = dataset.read_object(TOKENS, commit)[used][of_sequence]
    positions = np.arange(
        max(0, position - before), min(corpus.context, position + after + 1), dtype=np.int32
    )
    return Context(sequence, position, positions, whole[positions])


def chunk_of(dataset: Dataset, sequence: int) -> int:
    """The chunk that holds all rows of a sequence."""
    manifest = dataset.manifest
    return (sequence - manifest.corpus.first_sequence) // manifest.sequences_per_chunk


def _commit(dataset: Dataset, index: int) -> Commit:
    """A chunk's commit, whose rows are those planned: places of rows are counted with these."""
    try:
        commit = dataset.commit(index)
    except ObjectMissing as error:
        raise ObjectMissing(f"{dataset.url}: chunk {index} is not committed ({error})") from error
    if commit.rows != dataset.manifest.rows[index]:
        planned = dataset.manifest.rows[index]
        raise DamagedObject(f"{dataset.url}: chunk {index} has {commit.rows} rows, not the {planned} planned")
    return commit


def _take(dataset: Dataset, commit: Commit, hooks: Sequence[str], rows: npt.NDArray[np.int64]) -> Rows:
    return Rows(
        acts={name: dataset.read_object(acts_array(name), commit)[rows] for name in hooks},
        tokens=dataset.read_object(TOKENS, commit)[rows].view(np.int32),
        sequence=dataset.read_object(SEQUENCE, commit)[rows].view(np.int64),
        position=dataset.read_object(POSITION, commit)[rows].view(np.int32),
    )


def _in_order(pool: ThreadPoolExecutor, call: Callable[[int], _T], indices: Sequence[int]) -> Iterator[_T]:
    """The result of `call` for each index, in order. Few run ahead: what is not asked for is hardly read."""
    pending: deque[Future[_T]] = deque()
    try:
        for index in indices:
            pending.append(pool.submit(call, index))
            if len(pending) == READ_THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
