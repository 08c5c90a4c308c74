"""Index blocks: the commits of a whole block of chunks in one object, as columns.

A dataset of 100,000 chunks has as many commits, and reading or even listing them takes minutes. Once every
chunk of a block is committed, its commits are also written as one *index block*, `index/<block>.safetensors`.
That is a pure function of the commits, so whoever makes it makes the same bytes. Nothing depends on it: where
one is missing or damaged, the commits are read.

The file is plain safetensors. All columns have one value per chunk, in order of index, and lie in order of
their names: `rows`, and per array path `size/<path>` and `crc32c/<path>`, are int64; per hook
`mean_norm/<hook>`, `mean_squared_norm/<hook>` and `max_abs/<hook>` are float64. The header follows from the
dataset, the block's number and the crc32c of the columns, so a reader knows every byte of it and compares.
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from penstock.common.errors import DamagedObject, DataError, ObjectMissing
from penstock.common.logs import LOGGER
from penstock.store.arrays import dataset_arrays
from penstock.store.commits import Commit, Committed, Moments, StoredObject, read_commit
from penstock.store.layout import BLOCK_CHUNKS, FORMAT_VERSION, block_range, index_key
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore
from penstock.store.records import crc32c

CACHED_BYTES = 32 * 1024 * 1024
"""Index blocks that one open dataset keeps in memory."""
FORGET_SECONDS = 60.0
"""How long a block that had no index record is taken to have none."""
READ_AT_ONCE = 16
"""Commits read side by side when a block is indexed."""
SAMPLE = 64
"""Commits read one by one for `overall_moments`, where there is no index record."""

_WORD = 8  # bytes of every value
_MOMENTS = ("mean_norm", "mean_squared_norm", "max_abs")


@dataclass(frozen=True)
class Columns:
    """What the index blocks of a dataset hold: columns for these array paths and hooks."""

    arrays: tuple[str, ...]
    hooks: tuple[str, ...]

    @staticmethod
    def of(manifest: Manifest) -> "Columns":
        arrays = (spec.path for spec in dataset_arrays(manifest))
        return Columns(tuple(sorted(arrays)), tuple(sorted(hook.name for hook in manifest.hooks)))

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """Name -> safetensors type, in the order in which columns are stored."""
        found = {"rows": "I64"}
        found |= {f"{kind}/{path}": "I64" for kind in ("size", "crc32c") for path in self.arrays}
        found |= {f"{kind}/{hook}": "F64" for kind in _MOMENTS for hook in self.hooks}
        return dict(sorted(found.items()))

    @cached_property
    def places(self) -> dict[str, int]:
        """Name -> place of the column."""
        return {name: place for place, name in enumerate(self.dtypes)}

    def describes(self, commit: Commit) -> bool:
        """Whether a commit is one of a dataset with these arrays and hooks."""
        return commit.objects.keys() == set(self.arrays) and commit.moments.keys() == set(self.hooks)

    def header(self, first: int, count: int, checksum: int) -> bytes:
        """All that stands before the columns of chunks [first, first + count)."""
        told = {"crc32c": f"{checksum:08x}", "first": str(first), "format_version": str(FORMAT_VERSION)}
        size = _WORD * count
        described: dict[str, object] = {"__metadata__": told}
        for place, (name, dtype) in enumerate(self.dtypes.items()):
            offsets = [place * size, (place + 1) * size]
            described[name] = {"data_offsets": offsets, "dtype": dtype, "shape": [count]}
        text = json.dumps(described, sort_keys=True, separators=(",", ":")).encode("ascii")
        text += b" " * (-len(text) % _WORD)
        return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class IndexBlock:
    """The commits of chunks `first`, `first` + 1, …; `values` is [columns, chunks] of 64-bit words."""

    columns: Columns
    first: int
    values: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.values[0])

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def integers(self, name: str) -> npt.NDArray[np.int64]:
        """[chunks] a column of integers."""
        column: npt.NDArray[np.int64] = self.values[self.columns.places[name]]
        return column

    def floats(self, name: str) -> npt.NDArray[np.float64]:
        """[chunks] a column of floats."""
        return self.integers(name).view(np.float64)

    def commit(self, index: int) -> Commit:
        """The commit of a chunk of this block."""
        place = index - self.first
        words = self.values[:, place].copy()  # a column of words is not contiguous, and floats view it
        integers, floats = words.tolist(), words.view("<f8").tolist()
        at = self.columns.places
        return Commit(
            index=index,
            rows=integers[at["rows"]],
            objects={
                path: StoredObject(integers[at[f"size/{path}"]], integers[at[f"crc32c/{path}"]])
                for path in self.columns.arrays
            },
            moments={
                hook: Moments(*(floats[at[f"{kind}/{hook}"]] for kind in _MOMENTS))
                for hook in self.columns.hooks
            },
        )


def encode_block(columns: Columns, commits: Sequence[Commit]) -> bytes:
    """Bytes of the index block of consecutive commits: the only ones it can have."""
    values = np.empty((len(columns.places), len(commits)), "<i8")
    floats, at = values.view("<f8"), columns.places
    values[at["rows"]] = [commit.rows for commit in commits]
    for path in columns.arrays:
        values[at[f"size/{path}"]] = [commit.objects[path].size for commit in commits]
        values[at[f"crc32c/{path}"]] = [commit.objects[path].crc32c for commit in commits]
    for hook in columns.hooks:
        for kind in _MOMENTS:
            floats[at[f"{kind}/{hook}"]] = [getattr(commit.moments[hook], kind) for commit in commits]
    body = values.tobytes()
    return columns.header(commits[0].index, len(commits), crc32c(body)) + body


def decode_block(columns: Columns, chunks: range, data: bytes, name: str) -> IndexBlock:
    """Check and view an index block.

    Args:
        chunks: those that it must hold.
        name: the object's name, for the error message.

    Raises:
        DamagedObject: any byte is not what it must be.
    """
    size = _WORD * len(columns.places) * len(chunks)
    start = len(data) - size
    if start < 0:
        raise DamagedObject(f"{name} is damaged: {len(data)} bytes, less than its columns")
    body = memoryview(data)[start:]
    if data[:start] != columns.header(chunks.start, len(chunks), crc32c(bytes(body))):
        raise DamagedObject(f"{name} is damaged: its header does not match its content")
    values = np.frombuffer(body, "<i8").reshape(len(columns.places), len(chunks))
    return IndexBlock(columns, chunks.start, values)


def read_block(store: ObjectStore, columns: Columns, chunks: range) -> IndexBlock:
    """Read the index block of these chunks.

    Raises:
        ObjectMissing, DamagedObject
    """
    key = index_key(chunks.start // BLOCK_CHUNKS)
    return decode_block(columns, chunks, store.get(key), f"{store.url}/{key}")


def index_block(
    store: ObjectStore,
    manifest: Manifest,
    block: int,
    pool: Executor,
    on_read: Callable[[], None] = lambda: None,
) -> bool:
    """Write the index block of a block whose chunks are all committed.

    Args:
        pool: reads commits side by side, a few at a time: others may want it.
        on_read: called whenever some were read.

    Returns:
        False if it is there already, or if a commit cannot be read.
    """
    if store.exists(index_key(block)):
        return False
    columns, chunks = Columns.of(manifest), block_range(block, manifest.n_chunks)
    commits: list[Commit] = []
    try:
        for start in range(chunks.start, chunks.stop, READ_AT_ONCE):
            some = range(start, min(start + READ_AT_ONCE, chunks.stop))
            commits += pool.map(lambda index: read_commit(store, index), some)
            on_read()
    except DataError as error:
        LOGGER.warning("block %d is not indexed: %s", block, error)
        return False
    if not all(columns.describes(commit) for commit in commits):
        LOGGER.warning("block %d is not indexed: a commit is not one of this dataset", block)
        return False
    return store.create(index_key(block), encode_block(columns, commits))


class CommitIndex:
    """Answers for commits from index blocks, where there are any. Safe to use from several threads."""

    def __init__(self, store: ObjectStore, manifest: Manifest) -> None:
        self.columns = Columns.of(manifest)
        self._store = store
        self._n_chunks = manifest.n_chunks
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, IndexBlock] = OrderedDict()
        self._missing: dict[int, float] = {}
        self._complaints: set[int] = set()

    def find(self, index: int) -> Commit | None:
        """The commit of a chunk as its index block has it, or None if there is none."""
        if not 0 <= index < self._n_chunks:
            return None
        block = self.block(index // BLOCK_CHUNKS)
        return None if block is None else block.commit(index)

    def block(self, number: int, keep: bool = True) -> IndexBlock | None:
        """An index block; None if it is missing or damaged, which is said once.

        Args:
            keep: it will be wanted again.
        """
        # one reader at a time: the others most likely want the same block
        with self._lock:
            if number in self._blocks:
                self._blocks.move_to_end(number)
                return self._blocks[number]
            if time.monotonic() - self._missing.get(number, -FORGET_SECONDS) < FORGET_SECONDS:
                return None
            found = self._read(number)
            if found is None:
                self._missing[number] = time.monotonic()
            elif keep:
                self._keep(number, found)
            return found

    def _read(self, number: int) -> IndexBlock | None:
        try:
            return read_block(self._store, self.columns, block_range(number, self._n_chunks))
        except ObjectMissing:
            return None
        except DamagedObject as error:
            if number not in self._complaints:
                LOGGER.warning("reading commits one by one: %s; penstock repair writes it again", error)
            self._complaints.add(number)
            return None

    def _keep(self, number: int, block: IndexBlock) -> None:
        self._blocks[number] = block
        # all are about as large as this one
        while len(self._blocks) > 1 and len(self._blocks) * block.nbytes > CACHED_BYTES:
            self._blocks.popitem(last=False)


def overall_moments(
    store: ObjectStore, index: CommitIndex, committed: Committed
) -> tuple[dict[str, Moments], int]:
    """Moments over the rows of all indexed chunks and of a few others; and of how many chunks.

    One read per thousand chunks: where there is no index block, `SAMPLE` commits stand for the rest.
    """
    sums, chunks = _Sums(index.columns.hooks), 0
    others = set(committed.indices)
    for number in committed.indexed:
        block = index.block(number, keep=False)
        if block is not None:
            sums.add(block)
            others.difference_update(range(block.first, block.first + len(block)))
            chunks += len(block)
    for chunk in sorted(others)[:: -(-len(others) // SAMPLE) or 1]:
        commit = read_commit(store, chunk)
        if index.columns.describes(commit):
            data = encode_block(index.columns, [commit])
            sums.add(decode_block(index.columns, range(chunk, chunk + 1), data, ""))
            chunks += 1
    return sums.moments() if chunks else {}, chunks


class _Sums:
    """Adds moments up, weighted by rows."""

    def __init__(self, hooks: Iterable[str]) -> None:
        self._rows = 0
        self._hooks = {hook: [0.0, 0.0, 0.0] for hook in hooks}

    def add(self, block: IndexBlock) -> None:
        self._rows += int(block.integers("rows").sum())
        rows = block.integers("rows").astype(np.float64)
        for hook, (norm, squared, largest) in self._hooks.items():
            mean_norm, mean_squared, most = (block.floats(f"{kind}/{hook}") for kind in _MOMENTS)
            self._hooks[hook] = [
                norm + float(mean_norm @ rows),
                squared + float(mean_squared @ rows),
                max(largest, float(most.max(initial=0))),
            ]

    def moments(self) -> dict[str, Moments]:
        count = max(1, self._rows)
        return {hook: Moments(n / count, s / count, m) for hook, (n, s, m) in self._hooks.items()}
