"""Commits: the record that makes a chunk visible.

A commit describes the stored objects of its chunk (size, and the crc32c that ends them) and the moments of
each hook's rows. It is created exclusively, after the objects, and never changes. Its bytes are a function
of the stored bytes alone: who made it and when is provenance.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from penstock.common.errors import DamagedObject, ObjectMissing
from penstock.store.layout import (
    BLOCK_CHUNKS,
    COMMITS,
    FORMAT_VERSION,
    INDEX,
    block_range,
    commit_folder,
    commit_key,
)
from penstock.store.manifest import check_format
from penstock.store.objects import ObjectStore

_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Measure = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


class _Stored:
    """A dataclass that pydantic makes from a record's fields, all of them and no others."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class StoredObject(_Stored):
    """Size of an object in bytes, and the crc32c at its end: that of the bytes before it."""

    size: _Count
    crc32c: _Count


@dataclass(frozen=True)
class Moments(_Stored):
    """Over a chunk's rows x of one hook: mean ‖x‖, mean ‖x‖², largest |x_d|."""

    mean_norm: _Measure
    mean_squared_norm: _Measure
    max_abs: _Measure


@dataclass(frozen=True)
class Commit(_Stored):
    """What chunk `index` consists of. `objects` maps array path to its stored object."""

    index: _Count
    rows: _Count
    objects: dict[str, StoredObject]
    moments: dict[str, Moments]

    def record(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "index": self.index,
            "rows": self.rows,
            "objects": {k: {"size": o.size, "crc32c": o.crc32c} for k, o in self.objects.items()},
            "moments": {
                k: {
                    "mean_norm": m.mean_norm,
                    "mean_squared_norm": m.mean_squared_norm,
                    "max_abs": m.max_abs,
                }
                for k, m in self.moments.items()
            },
        }


_COMMIT = TypeAdapter(Commit)


def create_commit(store: ObjectStore, commit: Commit) -> bool:
    """Make a chunk visible; False if it already was."""
    return store.create_record(commit_key(commit.index), commit.record())


def read_commit(store: ObjectStore, index: int) -> Commit:
    """Read one commit.

    Raises:
        ObjectMissing: the chunk is not committed.
        DamagedObject: the record is damaged or names another chunk.
    """
    key = commit_key(index)
    record = store.get_record(key)
    check_format(record, f"{store.url}/{key}")
    del record["format_version"]
    try:
        commit = _COMMIT.validate_python(record)
    except ValidationError as error:
        raise DamagedObject(f"{store.url}/{key} is not a commit") from error
    if commit.index != index:
        raise DamagedObject(f"{store.url}/{key} is the commit of chunk {commit.index}")
    return commit


def find_commit(store: ObjectStore, index: int) -> Commit | None:
    """The commit of a chunk, or None."""
    try:
        return read_commit(store, index)
    except ObjectMissing:
        return None


@dataclass(frozen=True)
class Committed:
    """What listings show of a dataset's commits: a hint, which may lag behind other writers.

    Attributes:
        indices: the committed chunks.
        indexed: blocks that have an index record (`store/index.py`), all of whose chunks are committed.
        unindexed: blocks all of whose chunks are committed, and which have none.
    """

    indices: set[int]
    indexed: list[int]
    unindexed: list[int]


def list_commits(store: ObjectStore, n_chunks: int) -> Committed:
    """Look at what is committed: commits are listed only where no index record says that all are there.

    An index record is made once its block is complete, and commits stay, so its name alone tells.
    """
    n_blocks = -(-n_chunks // BLOCK_CHUNKS)
    names = (key.removeprefix(INDEX).removesuffix(".safetensors") for key, _ in store.list(INDEX))
    indexed = {int(name) for name in names if name.isdecimal()} & set(range(n_blocks))
    folders = {int(name) for name in store.folders(COMMITS) if name.isdecimal()} & set(range(n_blocks))
    indices = {index for block in indexed for index in block_range(block, n_chunks)}
    complete = []
    for block in sorted(folders - indexed):
        found = set(_listed(store, block, n_chunks))
        indices |= found
        if len(found) == len(block_range(block, n_chunks)):
            complete.append(block)
    return Committed(indices, sorted(indexed), complete)


def committed_indices(store: ObjectStore, n_chunks: int) -> set[int]:
    """Indices whose commits listings show: a hint, which may lag behind other writers."""
    return list_commits(store, n_chunks).indices


def _listed(store: ObjectStore, block: int, n_chunks: int) -> Iterator[int]:
    chunks = block_range(block, n_chunks)
    for key, _ in store.list(commit_folder(block)):
        stem = key.rsplit("/", 1)[-1].removesuffix(".json")
        if stem.isdecimal() and int(stem) in chunks and key == commit_key(int(stem)):
            yield int(stem)
