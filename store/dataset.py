"""Datasets: chunks written once by producers, read by anyone.

Only committed chunks exist. A missing Zarr chunk reads as zeros, silently, through any Zarr reader;
here chunk objects are fetched by key, absence is an error, and every object's size and crc32c are
compared with the commit before a row is used.
"""

import contextlib
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
    decode_payload,
    encode_payload,
    payload_checksum,
    payload_description,
)
from penstock.store.commits import (
    Commit,
    Moments,
    StoredObject,
    committed_indices,
    create_commit,
    read_commit,
)
from penstock.store.layout import (
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


class Dataset:
    """Read access to a dataset. Needs neither Redis nor a language model."""

    def __init__(self, store: ObjectStore, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._specs = {spec.path: spec for spec in dataset_arrays(manifest)}

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

    def commit(self, index: int) -> Commit:
        """The commit of a chunk.

        Raises:
            ObjectMissing: there is none.
            DamagedObject: it is damaged, or not one of this dataset.
        """
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
        commit = self.commit(index)
        arrays = {path: self._read(path, commit) for path in (TOKENS, SEQUENCE, POSITION)}
        used = int(np.count_nonzero(arrays[SEQUENCE] != UNUSED))
        if used != commit.rows:
            raise DamagedObject(f"{self.url}: chunk {index} has {used} rows, not {commit.rows}")
        return Chunk(
            index=index,
            acts={name: self._read(acts_array(name), commit)[:used] for name in names},
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

    def quarantined(self) -> set[int]:
        """Indices of the chunks that no producer could make again as committed: readers skip them."""
        stems = (key.rsplit("/", 1)[-1] for key, _ in self.store.list("quarantine/"))
        names = (stem.removesuffix(".json") for stem in stems if stem.endswith(".json"))
        return {int(name) for name in names if name.isdecimal()}

    def _read(self, path: str, commit: Commit) -> Array:
        spec = self._specs[path]
        key = spec.key(ARRAYS, commit.index)
        name = f"{self.url}/{key}"
        data = self.store.get(key)
        expected = commit.objects.get(path)
        array = decode_payload(data, spec.dtype, spec.chunk_shape, name)
        if expected is None or expected != StoredObject(len(data), payload_checksum(data)):
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
        self._pool = pool or ThreadPoolExecutor(len(self.specs), thread_name_prefix="put")

    def arrange(self, index: int, chunk: Chunk) -> dict[str, Array]:
        """A chunk's rows, permuted by the dataset's seed and padded to R, by array path.

        Raises:
            ValueError: the rows are not what the manifest plans.
            ModelError: they are not finite.
        """
        if chunk.rows != self.manifest.rows[index]:
            raise ValueError(f"chunk {index} has {chunk.rows} rows, not {self.manifest.rows[index]}")
        order = permutation(chunk.rows, self.manifest.seed, "chunk", index)
        rows: dict[str, Array] = {acts_array(name): acts for name, acts in chunk.acts.items()}
        rows |= {TOKENS: chunk.tokens, SEQUENCE: chunk.sequence, POSITION: chunk.position}
        return {spec.path: _permuted(index, spec, rows[spec.path], order) for spec in self.specs}

    def write(self, index: int, chunk: Chunk, worker: str | None = None) -> tuple[Commit, bool]:
        """Store and commit a chunk.

        Args:
            worker: who makes it, for provenance.

        Returns:
            The commit as stored, and whether this call made it.

        Raises:
            DamagedObject: an object is there already and is not a whole chunk.
        """
        arranged = self.arrange(index, chunk)
        # before anything is stored: they also tell whether the rows are finite
        measured: dict[str, Moments] | None = self._moments(arranged, chunk.rows)
        stored = dict(self._pool.map(lambda spec: self._store(spec, index, arranged[spec.path]), self.specs))
        for path, array in stored.items():
            if path.startswith("acts/") and array is not arranged[path]:
                measured = None  # another writer's bytes count
        commit = describe_chunk(self.manifest, index, stored, measured)
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
        arranged = self.arrange(index, chunk)
        try:
            commit = read_commit(self.store, index)
        except ObjectMissing:
            self.write(index, chunk)
            return True
        except DamagedObject:
            commit = self._remember(index, arranged)
        broken: dict[str, bytes] = {}
        for spec in self.specs:
            if not is_as_committed(self.store, spec, commit):
                data = encode_payload(arranged[spec.path])
                if commit.objects.get(spec.path) != StoredObject(len(data), payload_checksum(data)):
                    return False
                broken[spec.key(ARRAYS, index)] = data
        for key, data in broken.items():
            self.store.put(key, data)
        restore_commit(self.store, commit)
        return True

    def close(self) -> None:
        self._pool.shutdown()

    def _remember(self, index: int, arranged: dict[str, Array]) -> Commit:
        """The commit of a chunk whose commit is damaged: whole objects count, the rest is recomputed."""
        stored = dict(arranged)
        for spec in self.specs:
            with contextlib.suppress(DataError):
                stored[spec.path] = load_payload(self.store, spec, index)
        return describe_chunk(self.manifest, index, stored)

    def _moments(self, arranged: dict[str, Array], rows: int) -> dict[str, Moments]:
        hooks = {hook.name: arranged[acts_array(hook.name)][:rows] for hook in self.manifest.hooks}
        return {name: moments(acts) for name, acts in hooks.items()}

    def _store(self, spec: ArraySpec, index: int, array: Array) -> tuple[str, Array]:
        if not self.store.create(spec.key(ARRAYS, index), encode_payload(array)):
            # Someone was here before: what is stored counts, if it is whole.
            return spec.path, load_payload(self.store, spec, index)
        return spec.path, array


def load_payload(store: ObjectStore, spec: ArraySpec, index: int) -> Array:
    """A stored object by itself, checked against its own checksum only.

    Raises:
        ObjectMissing, DamagedObject
    """
    key = spec.key(ARRAYS, index)
    return decode_payload(store.get(key), spec.dtype, spec.chunk_shape, f"{store.url}/{key}")


def is_as_committed(store: ObjectStore, spec: ArraySpec, commit: Commit) -> bool:
    """Whether an object of a chunk is there with the bytes that its commit describes."""
    try:
        array = load_payload(store, spec, commit.index)
    except DataError:
        return False
    return commit.objects.get(spec.path) == StoredObject(*payload_description(array))


def describe_chunk(
    manifest: Manifest, index: int, stored: dict[str, Array], measured: dict[str, Moments] | None = None
) -> Commit:
    """The commit of a chunk's stored arrays: a function of their bytes alone.

    Args:
        measured: the moments, where they are known already.
    """
    rows = int(np.count_nonzero(stored[SEQUENCE] != UNUSED))
    if measured is None:
        hooks = [hook.name for hook in manifest.hooks]
        measured = {name: moments(stored[acts_array(name)][:rows]) for name in hooks}
    objects = {path: StoredObject(*payload_description(array)) for path, array in stored.items()}
    return Commit(index=index, rows=rows, objects=objects, moments=measured)


def restore_commit(store: ObjectStore, commit: Commit) -> None:
    """Write a commit's bytes, the only ones it can have, where they are not."""
    key, data = commit_key(commit.index), encode_record(commit.record())
    if not store.create(key, data) and store.get(key) != data:
        store.put(key, data)


def _permuted(index: int, spec: ArraySpec, given: Array, order: npt.NDArray[np.int64]) -> Array:
    full = np.full(spec.chunk_shape, UNUSED if spec.path == SEQUENCE else 0, spec.dtype)
    # 16-bit integers gather faster than bfloat16, and the bits are the same
    plain = np.uint16 if spec.dtype.itemsize == 2 else spec.dtype
    if given.dtype != spec.dtype or given.shape[1:] != spec.shape[1:]:
        raise ValueError(
            f"chunk {index}: {spec.path} is {given.dtype} {list(given.shape)}, not "
            f"{spec.dtype} [rows{''.join(f', {n}' for n in spec.shape[1:])}]"
        )
    np.take(given.view(plain), order, axis=0, out=full.view(plain)[: len(order)])
    return full


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
    values = [float(np.sqrt(squared).sum()) / count, float(squared.sum()) / count, largest]
    if not np.isfinite(values).all():
        raise ModelError("the model gave non-finite activations; nothing was committed")
    return Moments(*values)
