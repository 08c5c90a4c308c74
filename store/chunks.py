"""A chunk: its rows as a producer has them, the objects that hold them, and the commit that follows."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.common.errors import DamagedObject, DataError
from penstock.store.arrays import ArraySpec, dataset_arrays, payload_checksum
from penstock.store.commits import Commit, Moments, StoredObject
from penstock.store.layout import ACTS, ARRAYS, POSITION, SEQUENCE, TOKENS, commit_key
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore
from penstock.store.records import encode_record

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
class Part:
    """What a commit says of one array's object; `rows` only of the array that tells."""

    stored: StoredObject
    moments: Moments | None
    rows: int | None


def describe(spec: ArraySpec, payload: Payload, rows: int) -> Part:
    array = payload.array
    return Part(
        stored=payload.stored,
        moments=moments(array[:rows]) if spec.path.startswith(ACTS) else None,
        rows=int(np.count_nonzero(array != UNUSED)) if spec.path == SEQUENCE else None,
    )


def commit_of(manifest: Manifest, index: int, parts: dict[ArraySpec, Part]) -> Commit:
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
        spec: describe(spec, load_payload(store, spec, index), rows) for spec in dataset_arrays(manifest)
    }
    return commit_of(manifest, index, parts)


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
