"""Commits: created once, never changed, found by number."""

from pathlib import Path

import pytest

from penstock.common.errors import DamagedObject, ObjectMissing, UserError
from penstock.store.commits import (
    Commit,
    Moments,
    StoredObject,
    committed_indices,
    create_commit,
    find_commit,
    read_commit,
)
from penstock.store.local import LocalStore

GOLDEN = (
    b'{"crc32c":4176600790,"format_version":1,"index":1234,'
    b'"moments":{"a":{"max_abs":3e+38,"mean_norm":1.25,"mean_squared_norm":0.1}},'
    b'"objects":{"acts/a":{"crc32c":0,"size":116},"tokens":{"crc32c":4294967295,"size":32}},"rows":7}\n'
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "dataset"))


def commit(index: int, rows: int = 7) -> Commit:
    return Commit(
        index=index,
        rows=rows,
        objects={"tokens": StoredObject(32, 2**32 - 1), "acts/a": StoredObject(116, 0)},
        moments={"a": Moments(1.25, 0.1, 3e38)},
    )


def test_a_commit_comes_back(store: LocalStore) -> None:
    assert create_commit(store, commit(3))
    assert read_commit(store, 3) == commit(3)
    assert find_commit(store, 3) == commit(3)


def test_bytes_are_golden(store: LocalStore) -> None:
    create_commit(store, commit(1234))
    assert store.get("commits/1/1234.json") == GOLDEN


def test_the_first_commit_stays(store: LocalStore) -> None:
    assert create_commit(store, commit(3, rows=7))
    assert not create_commit(store, commit(3, rows=8))
    assert read_commit(store, 3).rows == 7


def test_no_commit_is_no_chunk(store: LocalStore) -> None:
    with pytest.raises(ObjectMissing, match=r"commits/0/3\.json"):
        read_commit(store, 3)
    assert find_commit(store, 3) is None


def test_a_damaged_commit_is_not_taken_for_none(store: LocalStore) -> None:
    create_commit(store, commit(3))
    store.put("commits/0/3.json", store.get("commits/0/3.json").replace(b'"rows":7', b'"rows":8'))
    for read in (read_commit, find_commit):
        with pytest.raises(DamagedObject):
            read(store, 3)


def test_the_commit_of_another_chunk_is_refused(store: LocalStore) -> None:
    create_commit(store, commit(4))
    store.put("commits/0/3.json", store.get("commits/0/4.json"))
    with pytest.raises(DamagedObject, match="is the commit of chunk 4"):
        read_commit(store, 3)


@pytest.mark.parametrize(
    "record",
    [{}, {"index": 3, "rows": 1, "objects": {"a": 1}, "moments": {}}, {"index": 3, "rows": 1, "objects": []}],
)
def test_a_record_that_is_no_commit_is_damaged(store: LocalStore, record: dict[str, object]) -> None:
    store.create_record("commits/0/3.json", record | {"format_version": 1})
    with pytest.raises(DamagedObject, match="is not a commit"):
        read_commit(store, 3)


def test_a_newer_format_is_refused(store: LocalStore) -> None:
    store.create_record("commits/0/3.json", commit(3).record() | {"format_version": 2})
    with pytest.raises(UserError, match=r"format version 2.*upgrade"):
        read_commit(store, 3)


def test_committed_indices(store: LocalStore) -> None:
    assert committed_indices(store, 3000) == set()
    for index in (0, 999, 1000, 2500):
        create_commit(store, commit(index))
    for stranger in ("commits/0/x.json", "commits/1/5.json", "commits/0/07.json", "commits/0/8.json.old"):
        store.create(stranger, b"")
    assert committed_indices(store, 3000) == {0, 999, 1000, 2500}
    assert committed_indices(store, 1000) == {0, 999}
