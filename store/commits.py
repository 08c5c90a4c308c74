"""Commits: the record that makes a chunk visible.

A commit describes the stored objects of its chunk (size, and the crc32c of the values) and the moments of
each hook's rows. It is created exclusively, after the objects, and never changes. Its bytes are a function
of the stored bytes alone: who made it and when is provenance.
"""

from dataclasses import dataclass
from typing import Any

from penstock.common.errors import DamagedObject, ObjectMissing
from penstock.store.layout import FORMAT_VERSION, commit_key
from penstock.store.manifest import check_format
from penstock.store.objects import ObjectStore


@dataclass(frozen=True)
class StoredObject:
    """Size of an object in bytes, and the crc32c of its values (the checksum at its end)."""

    size: int
    crc32c: int


@dataclass(frozen=True)
class Moments:
    """Over a chunk's rows x of one hook: mean ‖x‖, mean ‖x‖², largest |x_d|."""

    mean_norm: float
    mean_squared_norm: float
    max_abs: float


@dataclass(frozen=True)
class Commit:
    """What chunk `index` consists of. `objects` maps array path to its stored object."""

    index: int
    rows: int
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
    try:
        commit = Commit(
            index=record["index"],
            rows=record["rows"],
            objects={k: StoredObject(**o) for k, o in record["objects"].items()},
            moments={k: Moments(**m) for k, m in record["moments"].items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
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
