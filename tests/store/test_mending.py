"""Making a chunk whole again: byte for byte what was committed, or nothing at all."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from penstock.common.errors import DamagedObject
from penstock.store.arrays import encode_payload
from penstock.store.chunks import Chunk, restore_commit
from penstock.store.dataset import Dataset
from penstock.store.layout import ARRAYS, commit_key
from penstock.store.local import LocalStore
from penstock.store.writer import DatasetWriter
from services.synthetic import MLP, RESID, SyntheticSource, laid_out, make_manifest
from services.trees import tree_digests

MANIFEST = make_manifest([210, 150, 210])
INDEX = 1
PATHS = [f"acts/{RESID}", f"acts/{MLP}", "tokens", "sequence", "position"]


def key_of(path: str, index: int = INDEX) -> str:
    return f"{ARRAYS}/{path}/c/{index}" + ("/0" if path.startswith("acts/") else "")


KEYS = [key_of(path) for path in PATHS]
HARMS: dict[str, Callable[[LocalStore, str], None]] = {
    "missing": lambda store, key: store.delete(key),
    "truncated": lambda store, key: store.put(key, store.get(key)[:-7]),
    "empty": lambda store, key: store.put(key, b""),
    "flipped": lambda store, key: store.put(key, flipped(store.get(key))),
    "another chunk's": lambda store, key: store.put(key, store.get(key.replace("/c/1", "/c/0"))),
}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def right() -> Chunk:
    return SyntheticSource(MANIFEST).chunk(INDEX)


def wrong() -> Chunk:
    """What a producer with other numerics makes: one bit of one activation differs."""
    acts = {name: rows.copy() for name, rows in right().acts.items()}
    acts[MLP].view(np.uint16)[3, 3] ^= 1
    return replace(right(), acts=acts)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "dataset"))


@pytest.fixture
def writer(store: LocalStore) -> Iterator[DatasetWriter]:
    """Of a finished dataset."""
    writer = DatasetWriter(store, MANIFEST)
    for index in range(3):
        writer.write(index, SyntheticSource(MANIFEST).chunk(index), "maker")
    yield writer
    writer.close()


def digests(store: LocalStore) -> dict[str, str]:
    return tree_digests(store.root)


def written(store: LocalStore) -> dict[str, tuple[int, int]]:
    """What tells of a file whether it was written again: inode and modification time."""
    found = {}
    for key, _ in store.list(""):
        status = os.stat(store.root / key)
        found[key] = (status.st_ino, status.st_mtime_ns)
    return found


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("key", KEYS)
def test_a_harmed_object_is_restored_and_no_other_is_touched(
    store: LocalStore, writer: DatasetWriter, key: str, harm: str
) -> None:
    before = digests(store)
    HARMS[harm](store, key)
    assert digests(store) != before
    files = written(store)
    assert writer.mend(INDEX, right()) is True
    assert digests(store) == before
    after = written(store)
    assert {k for k in after if after[k] != files.get(k)} == {key}
    Dataset(store, MANIFEST).read_chunk(INDEX)


def test_all_objects_at_once(store: LocalStore, writer: DatasetWriter) -> None:
    before = digests(store)
    for key, harm in zip(KEYS, HARMS.values(), strict=True):
        harm(store, key)
    assert writer.mend(INDEX, right())
    assert digests(store) == before


def test_a_whole_chunk_is_left_alone(store: LocalStore, writer: DatasetWriter) -> None:
    before = written(store)
    assert writer.mend(INDEX, right())
    assert writer.mend(INDEX, wrong()), "nothing is broken, so nothing is compared"
    assert written(store) == before


@pytest.mark.parametrize("harm", HARMS)
def test_a_recomputation_that_differs_changes_nothing(
    store: LocalStore, writer: DatasetWriter, harm: str
) -> None:
    """Not even the objects in which it agrees."""
    HARMS["missing"](store, key_of("tokens"))
    HARMS[harm](store, key_of(f"acts/{MLP}"))
    before = written(store)
    assert writer.mend(INDEX, wrong()) is False
    assert written(store) == before
    assert writer.mend(INDEX, right()) is True


def test_a_recomputation_that_differs_elsewhere_still_mends(store: LocalStore, writer: DatasetWriter) -> None:
    """It is only needed where something is broken, and there it is right."""
    before = digests(store)
    HARMS["flipped"](store, key_of(f"acts/{RESID}"))
    assert writer.mend(INDEX, wrong()) is True
    assert digests(store) == before


def test_rows_that_are_not_planned_are_refused(store: LocalStore, writer: DatasetWriter) -> None:
    HARMS["missing"](store, KEYS[0])
    before = written(store)
    with pytest.raises(ValueError, match="chunk 1 has 210 rows, not 150"):
        writer.mend(INDEX, SyntheticSource(MANIFEST).chunk(0))
    assert written(store) == before


@pytest.mark.parametrize("objects", ["all there", "some there", "none there"])
def test_a_missing_commit_is_written(store: LocalStore, writer: DatasetWriter, objects: str) -> None:
    before = digests(store)
    store.delete(commit_key(INDEX))
    gone = {"all there": [], "some there": KEYS[1:3], "none there": KEYS}[objects]
    for key in gone:
        store.delete(key)
    assert writer.mend(INDEX, right())
    assert digests(store) == before


@pytest.mark.parametrize("spoil", [flipped, lambda data: data[:-1], lambda data: b""])
@pytest.mark.parametrize("broken", [[], KEYS[:1], KEYS], ids=["whole", "one broken", "all broken"])
def test_a_damaged_commit_is_rebuilt(
    store: LocalStore, writer: DatasetWriter, spoil: Callable[[bytes], bytes], broken: list[str]
) -> None:
    """From the objects that are whole, and from the recomputation where they are not."""
    before = digests(store)
    store.put(commit_key(INDEX), spoil(store.get(commit_key(INDEX))))
    for key in broken:
        HARMS["flipped"](store, key)
    assert writer.mend(INDEX, right())
    assert digests(store) == before


class TestMixedBytes:
    """Another writer's object was there first, of other bytes: it was committed, and it counts."""

    @pytest.fixture
    def mixed(self, store: LocalStore) -> Iterator[DatasetWriter]:
        writer = DatasetWriter(store, MANIFEST)
        theirs = laid_out(MANIFEST, INDEX, wrong())[f"acts/{MLP}"]
        assert store.create(key_of(f"acts/{MLP}"), encode_payload(theirs))
        _, ours = writer.write(INDEX, right())
        assert ours
        yield writer
        writer.close()

    def test_it_stays_while_the_rest_is_mended(self, store: LocalStore, mixed: DatasetWriter) -> None:
        before = digests(store)
        for key in KEYS:
            if MLP not in key:
                HARMS["flipped"](store, key)
        assert mixed.mend(INDEX, right())
        assert digests(store) == before

    def test_it_stays_when_the_commit_is_rebuilt(self, store: LocalStore, mixed: DatasetWriter) -> None:
        before = digests(store)
        store.put(commit_key(INDEX), b"{}")
        HARMS["missing"](store, key_of("position"))
        assert mixed.mend(INDEX, right())
        assert digests(store) == before

    def test_once_lost_only_its_maker_can_make_it_again(
        self, store: LocalStore, mixed: DatasetWriter
    ) -> None:
        before = digests(store)
        HARMS["missing"](store, key_of(f"acts/{MLP}"))
        assert mixed.mend(INDEX, right()) is False
        assert not store.exists(key_of(f"acts/{MLP}"))
        assert mixed.mend(INDEX, wrong()) is True
        assert digests(store) == before


def test_a_commit_is_restored_only_where_it_is_not(store: LocalStore, writer: DatasetWriter) -> None:
    commit = Dataset(store, MANIFEST).commit(INDEX)
    before, files = digests(store), written(store)
    restore_commit(store, commit)
    assert written(store) == files
    for harm in ("missing", "truncated", "flipped"):
        HARMS[harm](store, commit_key(INDEX))
        restore_commit(store, commit)
        assert digests(store) == before


def test_quarantined_chunks_are_found_by_their_records(store: LocalStore, writer: DatasetWriter) -> None:
    dataset = Dataset(store, MANIFEST)
    assert dataset.quarantined() == set()
    store.create_guarded("quarantine/2.json", {"index": 2})
    store.create("quarantine/x.json", b"")
    store.create("quarantine/1.copy", b"")
    assert dataset.quarantined() == {2}


def test_nothing_is_read_of_a_chunk_before_it_is_mended(store: LocalStore, writer: DatasetWriter) -> None:
    HARMS["flipped"](store, KEYS[0])
    dataset = Dataset(store, MANIFEST)
    with pytest.raises(DamagedObject):
        dataset.read_chunk(INDEX)
    assert not writer.mend(INDEX, replace(right(), acts=wrong().acts | {RESID: wrong().acts[RESID] * 2}))
    with pytest.raises(DamagedObject):
        dataset.read_chunk(INDEX)
    writer.mend(INDEX, right())
    dataset.read_chunk(INDEX)
