"""Datasets: chunks written once by producers, read by anyone.

Only committed chunks exist. A missing Zarr chunk reads as zeros, silently, through any Zarr reader;
here chunk objects are fetched by key, absence is an error, and every object's size and crc32c are
compared with the commit before a row is used.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from penstock.common.errors import DamagedObject, DataError, ModelError
from penstock.common.permutation import permutation
from penstock.store.arrays import (
    ArraySpec,
    create_arrays,
    dataset_arrays,
    decode_payload,
    encode_payload,
    payload_checksum,
)
from penstock.store.commits import (
    Commit,
    Moments,
    StoredObject,
    committed_indices,
    create_commit,
    read_commit,
)
from penstock.store.layout import ARRAYS, POSITION, SEQUENCE, TOKENS, acts_array
from penstock.store.manifest import Manifest, load_manifest, publish_manifest
from penstock.store.objects import ObjectStore, open_store

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

    def committed(self) -> set[int]:
        """Indices of the chunks that a listing shows as committed."""
        return committed_indices(self.store, self.n_chunks)

    def commit(self, index: int) -> Commit:
        """The commit of a chunk; `ObjectMissing` if there is none."""
        return read_commit(self.store, index)

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
        from penstock.store.loader import dataset_batches

        return dataset_batches(self, hooks, batch_rows, window_chunks, epochs, seed)

    def verify(self, on_fault: Callable[[str], None]) -> Iterator[int]:
        """Check every committed chunk's objects; yields each index when done."""
        for index in sorted(self.committed()):
            try:
                commit = self.commit(index)
            except DataError as error:
                on_fault(str(error))
                yield index
                continue
            for path in self._specs:
                try:
                    self._read(path, commit)
                except DataError as error:
                    on_fault(str(error))
            yield index

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
    """Writes chunks of a dataset: objects first, first writer wins, then the commit."""

    def __init__(self, store: ObjectStore, manifest: Manifest) -> None:
        self.store = store
        self.manifest = publish_manifest(store, manifest)
        self.specs = dataset_arrays(self.manifest)
        create_arrays(store, ARRAYS, self.specs)
        self._pool = ThreadPoolExecutor(len(self.specs), thread_name_prefix="put")

    def arrange(self, index: int, chunk: Chunk) -> dict[str, Array]:
        """A chunk's rows, permuted by the dataset's seed and padded to R, by array path.

        Raises:
            ValueError: the rows are not what the manifest plans.
        """
        if chunk.rows != self.manifest.rows[index]:
            raise ValueError(f"chunk {index} has {chunk.rows} rows, not {self.manifest.rows[index]}")
        order = permutation(chunk.rows, self.manifest.seed, "chunk", index)
        rows: dict[str, Array] = {acts_array(name): acts for name, acts in chunk.acts.items()}
        rows |= {TOKENS: chunk.tokens, SEQUENCE: chunk.sequence, POSITION: chunk.position}
        arranged = {}
        for spec in self.specs:
            fill = UNUSED if spec.path == SEQUENCE else 0
            full = np.full(spec.chunk_shape, fill, spec.dtype)
            # 16-bit integers gather faster than bfloat16, and the bits are the same
            plain = np.uint16 if spec.dtype.itemsize == 2 else spec.dtype
            given = rows[spec.path]
            if given.dtype != spec.dtype or given.shape[1:] != spec.shape[1:]:
                raise ValueError(
                    f"chunk {index}: {spec.path} is {given.dtype} {list(given.shape)}, not "
                    f"{spec.dtype} [rows{''.join(f', {n}' for n in spec.shape[1:])}]"
                )
            np.take(given.view(plain), order, axis=0, out=full.view(plain)[: chunk.rows])
            arranged[spec.path] = full
        return arranged

    def write(self, index: int, chunk: Chunk) -> tuple[Commit, bool]:
        """Store and commit a chunk.

        Returns:
            The commit as stored, and whether this call made it.

        Raises:
            DamagedObject: an object is there already and is not a whole chunk.
        """
        arranged = self.arrange(index, chunk)
        # before anything is stored: they also tell whether the rows are finite
        paths = {hook.name: acts_array(hook.name) for hook in self.manifest.hooks}
        measured = {name: moments(arranged[path][: chunk.rows]) for name, path in paths.items()}
        stored = dict(self._pool.map(lambda spec: self._store(spec, index, arranged[spec.path]), self.specs))
        rows = int(np.count_nonzero(stored[SEQUENCE][1] != UNUSED))
        for name, path in paths.items():
            if stored[path][1] is not arranged[path]:  # another writer's bytes count
                measured[name] = moments(stored[path][1][:rows])
        commit = Commit(
            index=index,
            rows=rows,
            objects={path: described for path, (described, _) in stored.items()},
            moments=measured,
        )
        if create_commit(self.store, commit):
            return commit, True
        return read_commit(self.store, index), False

    def close(self) -> None:
        self._pool.shutdown()

    def _store(self, spec: ArraySpec, index: int, array: Array) -> tuple[str, tuple[StoredObject, Array]]:
        key = spec.key(ARRAYS, index)
        data = encode_payload(array)
        if not self.store.create(key, data):
            # Someone was here before: what is stored counts, if it is whole.
            data = self.store.get(key)
            array = decode_payload(data, spec.dtype, spec.chunk_shape, f"{self.store.url}/{key}")
        return spec.path, (StoredObject(len(data), payload_checksum(data)), array)


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
