"""Datasets: chunks written once by producers, read by anyone.

Only committed chunks exist. A missing Zarr chunk reads as zeros, silently, through any Zarr reader;
here chunk objects are fetched by key, absence is an error, and every object's size and crc32c are
compared with the commit before a row is used.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from penstock.common.errors import DamagedObject, DataError, ModelError, ObjectMissing, UserError
from penstock.common.permutation import permutation
from penstock.store.arrays import (
    ArraySpec,
    create_arrays,
    dataset_arrays,
    payload_checksum,
)
from penstock.store.commits import (
    Commit,
    Moments,
    StoredObject,
    committed_indices,
    create_commit,
    list_commits,
    read_commit,
)
from penstock.store.index import CommitIndex, overall_moments
from penstock.store.layout import (
    ACTS,
    ARRAYS,
    POSITION,
    SEQUENCE,
    TOKENS,
    acts_array,
    commit_key,
    provenance_key,
)
from penstock.store.manifest import Manifest, load_manifest, publish_manifest
from penstock.store.objects import ObjectStore, open_store
from penstock.store.records import encode_record

if TYPE_CHECKING:
    from penstock.store.loader import Batches
    from penstock.store.lookup import Context, Rows
    from penstock.store.torch_dataset import TorchBatches

Array = npt.NDArray[np.generic]

UNUSED = -1
"""`sequence` of a chunk's tail rows that hold nothing."""


@dataclass(frozen=True)
class Chunk:
    """The used rows of one chunk (R rows or fewer).

    Attributes:
        acts: per hook, [rows, d_in] bfloat16.
        tokens, sequence, position: [rows]; where each row came from.
    """

    index: int
    acts: dict[str, Array]
    tokens: npt.NDArray[np.int32]
    sequence: npt.NDArray[np.int64]
    position: npt.NDArray[np.int32]

    @property
    def rows(self) -> int:
        return len(self.tokens)

    def array(self, path: str) -> Array:
        """The rows that belong into an array of the dataset."""
        if path.startswith(ACTS):
            return self.acts[path.removeprefix(ACTS)]
        others: dict[str, Array] = {TOKENS: self.tokens, SEQUENCE: self.sequence, POSITION: self.position}
        return others[path]


class Dataset:
    """Read access to a dataset. Needs neither Redis nor a language model."""

    def __init__(self, store: ObjectStore, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._specs = {spec.path: spec for spec in dataset_arrays(manifest)}
        self._index = CommitIndex(store, manifest)

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def n_chunks(self) -> int:
        """Planned chunks (N)."""
        return self.manifest.n_chunks

    @property
    def sizes(self) -> tuple[int]:
        """Planned chunks, as one of the parts that a reader may read as one."""
        return (self.n_chunks,)

    def d_in(self, hook_name: str) -> int:
        """Width of a hook point.

        Raises:
            UserError: the dataset does not hold it.
        """
        try:
            return self.manifest.d_in(hook_name)
        except UserError as error:
            raise UserError(f"{self.url}: {error}") from error

    def committed(self) -> set[int]:
        """Indices of the chunks that a listing shows as committed."""
        return committed_indices(self.store, self.n_chunks)

    def moments(self) -> tuple[dict[str, Moments], int]:
        """Moments of each hook over all rows committed so far, and over how many chunks they were taken.

        Chunks whose commits are not indexed yet are represented by a few of them. Without a committed
        chunk there are no moments.
        """
        return overall_moments(self.store, self._index, list_commits(self.store, self.n_chunks))

    def commit(self, index: int) -> Commit:
        """The commit of a chunk, from an index block if there is one.

        Raises:
            ObjectMissing: there is none.
            DamagedObject: it is damaged, or not one of this dataset.
        """
        return self._index.find(index) or self._read_commit(index)

    def _read_commit(self, index: int) -> Commit:
        commit = read_commit(self.store, index)
        if commit.objects.keys() != self._specs.keys() or len(commit.moments) != len(self.manifest.hooks):
            raise DamagedObject(f"{self.url}: the commit of chunk {index} is not one of this dataset")
        return commit

    def read_chunk(self, index: int, hooks: Sequence[str] | None = None) -> Chunk:
        """Read the used rows of a committed chunk, every object checked against the commit.

        Args:
            index: chunk index.
            hooks: hook points to read; all of them by default.

        Raises:
            ObjectMissing: the chunk is not committed, or an object of it is gone.
            DamagedObject: an object's bytes are not what was committed.
            UserError: the dataset does not hold a hook.
        """
        names = [hook.name for hook in self.manifest.hooks] if hooks is None else list(hooks)
        for name in names:
            self.manifest.d_in(name)
        indexed = self._index.find(index)
        if indexed is None:
            return self._read_chunk(self._read_commit(index), names)
        try:
            return self._read_chunk(indexed, names)
        except DamagedObject:
            # only the commit itself may call a chunk damaged
            commit = self._read_commit(index)
            if commit == indexed:
                raise
            return self._read_chunk(commit, names)

    def _read_chunk(self, commit: Commit, names: Sequence[str]) -> Chunk:
        index = commit.index
        arrays = {path: self.read_object(path, commit) for path in (TOKENS, SEQUENCE, POSITION)}
        used = int(np.count_nonzero(arrays[SEQUENCE] != UNUSED))
        if used != commit.rows:
            raise DamagedObject(f"{self.url}: chunk {index} has {used} rows, not {commit.rows}")
        return Chunk(
            index=index,
            acts={name: self.read_object(acts_array(name), commit)[:used] for name in names},
            tokens=arrays[TOKENS][:used].view(np.int32),
            sequence=arrays[SEQUENCE][:used].view(np.int64),
            position=arrays[POSITION][:used].view(np.int32),
        )

    def batches(
        self,
        hooks: Sequence[str],
        batch_rows: int = 4096,
        window_chunks: int = 8,
        epochs: int = 1,
        seed: int = 0,
    ) -> "Batches":
        """Shuffled torch batches {hook: [≤ batch_rows, d_in] bfloat16} of all chunks.

        Rows of `window_chunks` consecutive chunks are mixed in memory; the next window is read while
        this one is used. The order is that of a training run with the same seed.
        """
        from penstock.store.joined import JoinedDataset

        return JoinedDataset([self]).batches(hooks, batch_rows, window_chunks, epochs, seed)

    def as_torch(
        self,
        hooks: Sequence[str],
        batch_rows: int = 4096,
        window_chunks: int = 8,
        epochs: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        with_tokens: bool = False,
        partial: bool = False,
    ) -> "TorchBatches":
        """The batches of `batches` as a `torch.utils.data.IterableDataset` that can be stopped and resumed.

        Args:
            rank, world_size: rank r of W gets the batches whose number is r modulo W.
            with_tokens: each batch also holds `tokens`, `sequence` and `position` of its rows.
            partial: of a dataset that is not complete, read the chunks that are committed now.

        Raises:
            UserError: a setting is out of range, the dataset does not hold a hook, or it is not complete.
        """
        from penstock.store.torch_dataset import TorchBatches

        return TorchBatches(
            self, hooks, batch_rows, window_chunks, epochs, seed, rank, world_size, with_tokens, partial
        )

    def as_numpy(self, hook: str, start: int = 0, stop: int | None = None) -> Array:
        """[rows, d_in] bfloat16: used rows [start, stop) in stored order. See `lookup.as_numpy`."""
        from penstock.store.lookup import as_numpy

        return as_numpy(self, hook, start, stop)

    def rows(
        self,
        tokens: Sequence[int],
        hooks: Sequence[str] | None = None,
        limit: int | None = 1000,
        partial: bool = False,
    ) -> "Rows":
        """The rows of some token ids, in stored order. See `lookup.find_rows`."""
        from penstock.store.lookup import find_rows

        return find_rows(self, tokens, hooks, limit, partial)

    def context(self, sequence: int, position: int, before: int = 16, after: int = 16) -> "Context":
        """The token ids around a row. See `lookup.context`."""
        from penstock.store.lookup import context

        return context(self, sequence, position, before, after)

    def __reduce__(self) -> tuple[object, ...]:
        # another process opens the store anew: connections do not travel
        return _opened_again, (self.url, self.manifest)

    def quarantined(self) -> set[int]:
        """Indices of the chunks that no producer could make again as committed: readers skip them."""
        stems = (key.rsplit("/", 1)[-1] for key, _ in self.store.list("quarantine/"))
        names = (stem.removesuffix(".json") for stem in stems if stem.endswith(".json"))
        return {int(name) for name in names if name.isdecimal()}

    def read_object(self, path: str, commit: Commit) -> Array:
        """One array's values of a committed chunk, unused rows included, checked against the commit.

        Raises:
            ObjectMissing, DamagedObject
        """
        spec = self._specs[path]
        key = spec.key(ARRAYS, commit.index)
        name = f"{self.url}/{key}"
        data = self.store.get(key)
        expected = commit.objects.get(path)
        array = spec.decode(data, name)
        if expected is None or expected != describe_bytes(data):
            raise DamagedObject(f"{name} is damaged: its bytes are not those committed")
        return array


def open_dataset(url: str) -> Dataset:
    """Open a dataset read-only.

    Raises:
        ObjectMissing: there is none at that URL.
        DamagedObject, UserError: its manifest is damaged or of a newer format.
    """
    store = open_store(url)
    return Dataset(store, load_manifest(store))


def _opened_again(url: str, manifest: Manifest) -> Dataset:
    return Dataset(open_store(url), manifest)


class DatasetWriter:
    """Writes chunks of a dataset: objects first, first writer wins, then the commit.

    Args:
        pool: stores a chunk's objects side by side; one of its own by default.
    """

    def __init__(self, store: ObjectStore, manifest: Manifest, pool: Executor | None = None) -> None:
        self.store = store
        self.manifest = publish_manifest(store, manifest)
        self.specs = dataset_arrays(self.manifest)
        create_arrays(store, ARRAYS, self.specs)
        self.pool = pool or ThreadPoolExecutor(len(self.specs), thread_name_prefix="put")

    def write(self, index: int, chunk: Chunk, worker: str | None = None) -> tuple[Commit, bool]:
        """Store and commit a chunk.

        Args:
            worker: who makes it, for provenance.

        Returns:
            The commit as stored, and whether this call made it.

        Raises:
            DamagedObject: an object is there already and is not a whole chunk.
            ModelError: the rows are not finite; nothing was stored.
            ValueError: they are not what the manifest plans.
        """
        self._check(index, chunk)
        order = permutation(chunk.rows, self.manifest.seed, "chunk", index)
        parts = list(self.pool.map(lambda spec: self._store(spec, index, chunk, order), self.specs))
        commit = _commit(self.manifest, index, dict(zip(self.specs, parts, strict=True)))
        if worker is not None:
            told = {"index": index, "worker": worker, "time": time.time()}
            self.store.put_guarded(provenance_key(index, worker), told)
        if create_commit(self.store, commit):
            return commit, True
        return read_commit(self.store, index), False

    def mend(self, index: int, chunk: Chunk) -> bool:
        """Make a committed chunk whole again from a recomputation.

        Nothing is deleted first: only one content is valid, and objects that have it stay untouched.

        Returns:
            False if the recomputation is not what was committed; nothing was changed.
        """
        self._check(index, chunk)
        order = permutation(chunk.rows, self.manifest.seed, "chunk", index)
        try:
            commit = read_commit(self.store, index)
        except DataError as error:
            indexed = CommitIndex(self.store, self.manifest).find(index)
            if indexed is None and isinstance(error, ObjectMissing):
                self.write(index, chunk)
                return True
            commit = indexed or self._remember(index, chunk, order)
        broken: dict[str, bytes] = {}
        for spec in self.specs:
            if not is_as_committed(self.store, spec, commit):
                data = spec.encode(arranged(spec, chunk, order))
                if commit.objects.get(spec.path) != describe_bytes(data):
                    return False
                broken[spec.key(ARRAYS, index)] = data
        for key, data in broken.items():
            self.store.put(key, data)
        restore_commit(self.store, commit)
        return True

    def close(self) -> None:
        self.pool.shutdown()

    def _check(self, index: int, chunk: Chunk) -> None:
        """Refuse what must not be stored, before anything is."""
        if chunk.rows != self.manifest.rows[index]:
            raise ValueError(f"chunk {index} has {chunk.rows} rows, not {self.manifest.rows[index]}")
        for spec in self.specs:
            given = chunk.array(spec.path)
            if given.dtype != spec.dtype or given.shape[1:] != spec.shape[1:]:
                raise ValueError(
                    f"chunk {index}: {spec.path} is {given.dtype} {list(given.shape)}, not "
                    f"{spec.dtype} [rows{''.join(f', {n}' for n in spec.shape[1:])}]"
                )
        if not all(self.pool.map(is_finite, chunk.acts.values())):
            raise ModelError("the model gave non-finite activations; nothing was committed")

    def _store(self, spec: ArraySpec, index: int, chunk: Chunk, order: npt.NDArray[np.int64]) -> "_Part":
        """Store one array of a chunk. Only as many at a time are laid out as there are threads for it."""
        array = arranged(spec, chunk, order)
        data = spec.encode(array)
        payload = Payload(array, describe_bytes(data))
        if not self.store.create(spec.key(ARRAYS, index), data):
            # Someone was here before: what is stored counts, if it is whole.
            payload = load_payload(self.store, spec, index)
        return _describe(spec, payload, chunk.rows)

    def _remember(self, index: int, chunk: Chunk, order: npt.NDArray[np.int64]) -> Commit:
        """The commit of a chunk whose commit is damaged: whole objects count, the rest is recomputed."""
        parts = {}
        for spec in self.specs:
            try:
                payload = load_payload(self.store, spec, index)
            except DataError:
                array = arranged(spec, chunk, order)
                payload = Payload(array, describe_bytes(spec.encode(array)))
            parts[spec] = _describe(spec, payload, chunk.rows)
        return _commit(self.manifest, index, parts)


@dataclass(frozen=True)
class Payload:
    """A chunk of one array, and the object that it is stored as."""

    array: Array
    stored: StoredObject


def describe_bytes(data: bytes) -> StoredObject:
    """A stored object as its commit describes it."""
    return StoredObject(len(data), payload_checksum(data))


def load_payload(store: ObjectStore, spec: ArraySpec, index: int) -> Payload:
    """A stored object by itself, checked against its own checksum only.

    Raises:
        ObjectMissing, DamagedObject
    """
    key = spec.key(ARRAYS, index)
    data = store.get(key)
    return Payload(spec.decode(data, f"{store.url}/{key}"), describe_bytes(data))


def is_as_committed(store: ObjectStore, spec: ArraySpec, commit: Commit) -> bool:
    """Whether an object of a chunk is there with the bytes that its commit describes."""
    try:
        return commit.objects.get(spec.path) == load_payload(store, spec, commit.index).stored
    except DataError:
        return False


@dataclass(frozen=True)
class _Part:
    """What a commit says of one array's object; `rows` only of the array that tells."""

    stored: StoredObject
    moments: Moments | None
    rows: int | None


def _describe(spec: ArraySpec, payload: Payload, rows: int) -> _Part:
    array = payload.array
    return _Part(
        stored=payload.stored,
        moments=moments(array[:rows]) if spec.path.startswith(ACTS) else None,
        rows=int(np.count_nonzero(array != UNUSED)) if spec.path == SEQUENCE else None,
    )


def _commit(manifest: Manifest, index: int, parts: dict[ArraySpec, _Part]) -> Commit:
    rows = next(part.rows for part in parts.values() if part.rows is not None)
    if rows != manifest.rows[index]:
        raise DamagedObject(f"the stored chunk {index} has {rows} rows, not {manifest.rows[index]}")
    return Commit(
        index=index,
        rows=rows,
        objects={spec.path: part.stored for spec, part in parts.items()},
        moments={spec.path.removeprefix(ACTS): part.moments for spec, part in parts.items() if part.moments},
    )


def describe_stored(store: ObjectStore, manifest: Manifest, index: int) -> Commit:
    """The commit of a chunk's stored objects: a function of their bytes alone.

    Raises:
        ObjectMissing, DamagedObject: one of them is not whole.
    """
    rows = manifest.rows[index]
    parts = {
        spec: _describe(spec, load_payload(store, spec, index), rows) for spec in dataset_arrays(manifest)
    }
    return _commit(manifest, index, parts)


def restore_commit(store: ObjectStore, commit: Commit) -> None:
    """Write a commit's bytes, the only ones it can have, where they are not."""
    key, data = commit_key(commit.index), encode_record(commit.record())
    if not store.create(key, data) and store.get(key) != data:
        store.put(key, data)


def arranged(spec: ArraySpec, chunk: Chunk, order: npt.NDArray[np.int64]) -> Array:
    """An array of a chunk as it is stored: rows permuted, then unused ones up to R."""
    # 16-bit integers gather faster than bfloat16, and the bits are the same
    plain = np.uint16 if spec.dtype.itemsize == 2 else spec.dtype
    full = np.empty(spec.chunk_shape, spec.dtype)
    full[len(order) :] = UNUSED if spec.path == SEQUENCE else 0
    np.take(chunk.array(spec.path).view(plain), order, axis=0, out=full.view(plain)[: len(order)])
    return full


def is_finite(acts: Array) -> bool:
    """Whether all of [rows, d_in] bfloat16 are: none has an exponent of all ones."""
    bits = acts.view(np.uint16)
    exponent = np.uint16(0x7F80)
    blocks = (bits[start : start + 1024] for start in range(0, len(bits), 1024))
    return not any(((block & exponent) == exponent).any() for block in blocks)


def moments(acts: Array) -> Moments:
    """Moments of [rows, d_in] bfloat16 rows, accumulated in float64 over float32 blocks."""
    norms = []
    largest = 0.0
    for start in range(0, len(acts), 1024):
        block = acts[start : start + 1024].astype(np.float32)
        norms.append(np.einsum("rd,rd->r", block, block, dtype=np.float64))
        largest = max(largest, float(np.abs(block).max(initial=0.0)))
    squared = np.concatenate(norms) if norms else np.zeros(0)
    count = max(1, len(squared))
    return Moments(float(np.sqrt(squared).sum()) / count, float(squared.sum()) / count, largest)
