"""Commits: the record that makes a chunk visible.

A commit describes the stored objects of its chunk (size, and the crc32c that ends them) and the moments of
each hook's rows. It is created exclusively, after the objects, and never changes. Its bytes are a function
of the stored bytes alone: who made it and when is provenance.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from penstock.common.errors import DamagedObject, ObjectMissing
from penstock.store.layout import FORMAT_VERSION, commit_key
from penstock.store.manifest import check_format
from penstock.store.objects import ObjectStore

_Count = Annotated[int, Field(strict=True, ge=0)]
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


def committed_indices(store: ObjectStore, n_chunks: int) -> set[int]:
    """Indices whose commits a listing shows: a hint, which may lag behind other writers."""
    found = set()
    for key, _ in store.list("commits/"):
        stem = key.rsplit("/", 1)[-1].removesuffix(".json")
        if stem.isdigit() and int(stem) < n_chunks and key == commit_key(int(stem)):
            found.add(int(stem))
    return found
