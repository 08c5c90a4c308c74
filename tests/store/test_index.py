"""Index blocks: a function of the commits, found damaged wherever, and never needed."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from penstock.common.errors import DamagedObject, ObjectMissing
from penstock.store import index as index_module
from penstock.store.commits import (
    Commit,
    StoredObject,
    committed_indices,
    create_commit,
    list_commits,
    read_commit,
)
from penstock.store.dataset import Dataset
from penstock.store.index import Columns, CommitIndex, decode_block, encode_block, index_block
from penstock.store.layout import BLOCK_CHUNKS, acts_array, block_range, commit_key, index_key
from penstock.store.local import LocalStore
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore
from penstock.store.s3 import S3Store
from penstock.store.verify import dataset_faults
from penstock.store.writer import DatasetWriter
from services.big import big_manifest, made_up_commit, write_big
from services.counting import CountingStore
from services.synthetic import CHUNKS, RESID, SyntheticSource, make_manifest, write_dataset

N = BLOCK_CHUNKS + 7
"""One full block, and a short one at the end."""


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return big_manifest(N)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(LocalStore(str(tmp_path / "dataset")))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def short_block(manifest: Manifest) -> tuple[Columns, range, list[Commit]]:
    chunks = block_range(1, N)
    return Columns.of(manifest), chunks, [made_up_commit(manifest, index) for index in chunks]


# What one is


def test_every_commit_comes_back(manifest: Manifest) -> None:
    columns, chunks, commits = short_block(manifest)
    block = decode_block(columns, chunks, encode_block(columns, commits), "it")
    assert [block.commit(index) for index in chunks] == commits
    assert [block.commit(index).record() for index in chunks] == [commit.record() for commit in commits]


def test_it_is_a_function_of_the_commits_alone(manifest: Manifest) -> None:
    """Whatever order their dictionaries and the manifest's hooks have."""
    columns, _, commits = short_block(manifest)
    turned = [
        replace(
            commit,
            objects=dict(reversed(commit.objects.items())),
            moments=dict(reversed(commit.moments.items())),
        )
        for commit in commits
    ]
    other = Columns.of(manifest.model_copy(update={"hooks": manifest.hooks[::-1]}))
    assert encode_block(other, turned) == encode_block(columns, commits)


def test_any_safetensors_reader_opens_it(manifest: Manifest) -> None:
    columns, _, commits = short_block(manifest)
    found = load(encode_block(columns, commits))
    assert found["rows"].tolist() == [commit.rows for commit in commits]
    key = acts_array(RESID)
    assert found[f"size/{key}"].tolist() == [commit.objects[key].size for commit in commits]
    assert found[f"crc32c/{key}"].tolist() == [commit.objects[key].crc32c for commit in commits]
    assert found[f"mean_norm/{RESID}"].dtype == np.float64
    assert found[f"max_abs/{RESID}"].tolist() == [commit.moments[RESID].max_abs for commit in commits]
    assert len(found) == 1 + 2 * 5 + 3 * 2


def test_bytes_are_golden() -> None:
    """A change of these breaks every stored index block."""
    plan = big_manifest(2, {"a": 2})
    data = encode_block(Columns.of(plan), [made_up_commit(plan, index) for index in range(2)])
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"] == {
        "crc32c": header["__metadata__"]["crc32c"],
        "first": "0",
        "format_version": "1",
    }
    assert list(header)[1:] == [
        *("crc32c/acts/a", "crc32c/position", "crc32c/sequence", "crc32c/tokens", "max_abs/a", "mean_norm/a"),
        *("mean_squared_norm/a", "rows", "size/acts/a", "size/position", "size/sequence", "size/tokens"),
    ]
    assert header["crc32c/position"] == {"data_offsets": [16, 32], "dtype": "I64", "shape": [2]}
    assert len(data) == 8 + length + 12 * 2 * 8
    assert length % 8 == 0


@pytest.mark.parametrize("harm", ["flip", "cut", "extend"])
def test_any_damaged_byte_is_noticed(manifest: Manifest, harm: str) -> None:
    columns, chunks, commits = short_block(manifest)
    whole = encode_block(columns, commits)
    for place in range(len(whole)):
        data = bytearray(whole)
        if harm == "flip":
            data[place] ^= 1 << place % 8
        elif harm == "cut":
            del data[place:]
        else:
            data.insert(place, data[place])
        with pytest.raises(DamagedObject, match="it is damaged"):
            decode_block(columns, chunks, bytes(data), "it")


def test_the_block_of_others_is_refused(manifest: Manifest) -> None:
    """Another block, another dataset's, or one of another length."""
    columns, chunks, commits = short_block(manifest)
    data = encode_block(columns, commits)
    for other, of in (
        (columns, range(7)),
        (columns, range(chunks.start, chunks.stop - 1)),
        (Columns.of(big_manifest(N, {"other": 8})), chunks),
        (Columns.of(big_manifest(N, {RESID: 8, "blocks.0.mlp.hook_pst": 8})), chunks),
    ):
        with pytest.raises(DamagedObject):
            decode_block(other, of, data, "it")


# Making one


def test_it_is_made_from_the_commits(store: CountingStore, pool: ThreadPoolExecutor) -> None:
    plan = make_manifest()
    for index in range(CHUNKS):
        create_commit(store, made_up_commit(plan, index))
    heard: list[None] = []
    assert index_block(store, plan, 0, pool, lambda: heard.append(None))
    assert store.get(index_key(0)) == encode_block(
        Columns.of(plan), [read_commit(store, index) for index in range(CHUNKS)]
    )
    assert heard
    store.take()
    assert not index_block(store, plan, 0, pool)
    assert store.take() == [("exists", index_key(0))]


def test_racing_makers_write_one(store: CountingStore) -> None:
    plan = make_manifest()
    for index in range(CHUNKS):
        create_commit(store, made_up_commit(plan, index))
    start = threading.Barrier(4)

    def make(_: int) -> bool:
        with ThreadPoolExecutor(2) as readers:
            start.wait()
            return index_block(store, plan, 0, readers)

    for _ in range(20):
        with ThreadPoolExecutor(4) as makers:
            assert sum(makers.map(make, range(4))) == 1
        data = store.get(index_key(0))
        assert data == encode_block(Columns.of(plan), [made_up_commit(plan, i) for i in range(CHUNKS)])
        store.delete(index_key(0))


@pytest.mark.parametrize("harm", ["missing", "damaged", "foreign"])
def test_a_block_with_a_bad_commit_is_not_indexed(
    store: CountingStore, pool: ThreadPoolExecutor, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_manifest()
    for index in range(CHUNKS):
        create_commit(store, made_up_commit(plan, index))
    if harm == "missing":  # the listing lags behind, or it was lost since
        store.delete(commit_key(3))
    elif harm == "damaged":
        store.put(commit_key(3), b"{}")
    else:
        store.delete(commit_key(3))
        create_commit(store, replace(made_up_commit(plan, 3), objects={"tokens": StoredObject(1, 1)}))
    assert not index_block(store, plan, 0, pool)
    assert not store.exists(index_key(0))
    assert "block 0 is not indexed" in caplog.text


# What is committed


def test_commits_are_listed_only_where_there_is_no_index(store: CountingStore, manifest: Manifest) -> None:
    write_big(store, manifest, [0, 1, *range(BLOCK_CHUNKS, BLOCK_CHUNKS + 3)])
    store.take()
    found = list_commits(store, N)
    assert found.indices == set(range(BLOCK_CHUNKS + 3))
    assert (found.indexed, found.unindexed) == ([0], [])
    assert store.take() == [("list", "index/"), ("folders", "commits/"), ("list", "commits/1/")]


def test_complete_blocks_without_an_index_are_told(store: CountingStore, manifest: Manifest) -> None:
    for index in (0, 5, *block_range(1, N)):
        create_commit(store, made_up_commit(manifest, index))
    found = list_commits(store, N)
    assert found.indices == {0, 5, *block_range(1, N)}
    assert (found.indexed, found.unindexed) == ([], [1])
    assert list_commits(store, N + 1).unindexed == [], "the last block is longer there"


def test_strangers_are_no_blocks(store: CountingStore) -> None:
    for stranger in ("index/x.safetensors", "index/7.safetensors", "commits/x/1.json", "commits/9/9000.json"):
        store.create(stranger, b"")
    found = list_commits(store, 3000)
    assert (found.indices, found.indexed, found.unindexed) == (set(), [], [])


def test_a_listing_that_lags_shows_less_and_nothing_wrong(
    store: CountingStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is not listed yet; its commits are."""
    for index in block_range(1, N):
        create_commit(store, made_up_commit(manifest, index))
    with ThreadPoolExecutor(4) as pool:
        assert index_block(store, manifest, 1, pool)
        real = store.list
        monkeypatch.setattr(store, "list", lambda prefix: iter(()) if prefix == "index/" else real(prefix))
        found = list_commits(store, N)
        assert (found.indices, found.unindexed) == (set(block_range(1, N)), [1])
        assert not index_block(store, manifest, 1, pool), "exclusive create decides"


# Reading through it


@pytest.fixture
def indexed(tmp_path: Path) -> tuple[Dataset, CountingStore]:
    """A complete dataset, read through a store that counts."""
    plain = write_dataset(tmp_path / "dataset", indexed=True)
    store = CountingStore(plain.store)
    return Dataset(store, plain.manifest), store


def gets(store: CountingStore, prefix: str) -> list[str]:
    return [key for what, key in store.take() if what == "get" and key.startswith(prefix)]


def test_chunks_are_read_without_their_commits(indexed: tuple[Dataset, CountingStore]) -> None:
    dataset, store = indexed
    source = SyntheticSource(dataset.manifest)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(dataset.read_chunk, range(CHUNKS)))
    assert [chunk.rows for chunk in found] == [source.chunk(index).rows for index in range(CHUNKS)]
    asked = store.take()
    assert [key for _, key in asked if key.startswith("index/")] == [index_key(0)], "once, by four threads"
    assert not [key for _, key in asked if key.startswith("commits/")]


def test_the_index_says_what_commits_say(indexed: tuple[Dataset, CountingStore]) -> None:
    dataset, store = indexed
    assert [dataset.commit(i) for i in range(CHUNKS)] == [read_commit(store, i) for i in range(CHUNKS)]
    assert dataset.committed() == set(range(CHUNKS))
    with pytest.raises(ObjectMissing):
        dataset.commit(CHUNKS)


def spoil(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_a_damaged_index_is_ignored_and_said_once(
    indexed: tuple[Dataset, CountingStore], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, store = indexed
    store.put(index_key(0), spoil(store.get(index_key(0))))
    monkeypatch.setattr(index_module, "FORGET_SECONDS", 0.0)
    store.take()
    for index in range(3):
        dataset.read_chunk(index)
    assert gets(store, "commits/") == [commit_key(index) for index in range(3)]
    assert caplog.text.count("penstock repair writes it again") == 1
    assert "index/0.safetensors is damaged" in caplog.text


def test_a_block_without_an_index_is_not_asked_for_again_at_once(tmp_path: Path) -> None:
    plain = write_dataset(tmp_path)
    store = CountingStore(plain.store)
    dataset = Dataset(store, plain.manifest)
    for index in range(5):
        dataset.commit(index)
    assert gets(store, "index/") == [index_key(0)]


def forged(dataset: Dataset, change: Callable[[Commit], Commit]) -> None:
    """An index block that is whole, and in which chunk 2 is not what was committed."""
    commits = [read_commit(dataset.store, index) for index in range(CHUNKS)]
    commits[2] = change(commits[2])
    dataset.store.put(index_key(0), encode_block(Columns.of(dataset.manifest), commits))


def test_the_commit_decides_where_chunk_and_index_differ(indexed: tuple[Dataset, CountingStore]) -> None:
    dataset, store = indexed
    whole = [dataset.read_chunk(2).acts[RESID].tobytes(), dataset.read_chunk(3).acts[RESID].tobytes()]
    forged(dataset, lambda commit: replace(commit, rows=commit.rows - 1))
    again = Dataset(store, dataset.manifest)
    store.take()
    assert again.read_chunk(2).acts[RESID].tobytes() == whole[0]
    assert again.read_chunk(3).acts[RESID].tobytes() == whole[1]
    assert gets(store, "commits/") == [commit_key(2)]


def test_damaged_rows_are_never_used_whatever_the_index_says(indexed: tuple[Dataset, CountingStore]) -> None:
    dataset, store = indexed
    key = f"activations.zarr/{acts_array(RESID)}/c/2/0"
    store.put(key, spoil(store.get(key)))
    store.take()
    with pytest.raises(DamagedObject, match="c/2/0 is damaged"):
        dataset.read_chunk(2)
    assert gets(store, "commits/") == [commit_key(2)], "asked before it is called damaged"


def test_memory_for_blocks_is_bounded(
    store: CountingStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = big_manifest(4 * BLOCK_CHUNKS)
    write_big(store, plan)
    index = CommitIndex(store, plan)
    block = index.block(0)
    assert block is not None
    monkeypatch.setattr(index_module, "CACHED_BYTES", 2 * block.nbytes)
    store.take()
    for number in (1, 0, 1, 2, 1, 0):
        index.block(number)
    assert gets(store, "index/") == [index_key(n) for n in (1, 2, 0)]


def test_moments_are_over_all_rows(store: CountingStore) -> None:
    plan = big_manifest(N)
    write_big(store, plan, block_range(1, N))
    store.take()
    found, chunks = Dataset(store, plan).moments()
    assert chunks == N
    assert len(gets(store, "")) == 1 + len(block_range(1, N))
    commits = [made_up_commit(plan, index) for index in range(N)]
    weights = [commit.rows for commit in commits]
    for hook in (h.name for h in plan.hooks):
        parts = [commit.moments[hook] for commit in commits]
        assert found[hook].mean_norm == pytest.approx(
            np.average([p.mean_norm for p in parts], weights=weights)
        )
        squared = np.average([p.mean_squared_norm for p in parts], weights=weights)
        assert found[hook].mean_squared_norm == pytest.approx(squared)
        assert found[hook].max_abs == max(p.max_abs for p in parts)


def test_moments_of_unindexed_chunks_are_those_of_a_sample(tmp_path: Path) -> None:
    assert write_dataset(tmp_path / "none", indices=[]).moments() == ({}, 0)
    dataset = write_dataset(tmp_path / "some")
    found, chunks = dataset.moments()
    assert chunks == CHUNKS
    assert found.keys() == {hook.name for hook in dataset.manifest.hooks}


# Putting right


def test_a_lost_commit_is_written_from_the_index(indexed: tuple[Dataset, CountingStore]) -> None:
    """Even where the chunk's objects could not tell any more."""
    dataset, store = indexed
    before = store.get(commit_key(2))
    store.delete(commit_key(2))
    store.delete(f"activations.zarr/{acts_array(RESID)}/c/2/0")
    fault, behind = dataset_faults(dataset)
    assert behind.chunk == 2
    assert "commits/0/2.json is missing; repair writes it from the index" in str(fault)
    assert fault.restore is not None
    fault.restore()
    assert store.get(commit_key(2)) == before
    (fault,) = dataset_faults(dataset)
    assert fault.chunk == 2


def test_a_damaged_object_is_found_behind_a_lost_commit(indexed: tuple[Dataset, CountingStore]) -> None:
    dataset, _ = indexed
    key = f"activations.zarr/{acts_array(RESID)}/c/1/0"
    dataset.store.put(key, spoil(dataset.store.get(key)))
    dataset.store.delete(commit_key(1))
    assert [fault.chunk for fault in dataset_faults(dataset)] == [None, 1]


def test_a_repaired_chunk_gets_its_commit_from_the_index(indexed: tuple[Dataset, CountingStore]) -> None:
    dataset, store = indexed
    before = store.get(commit_key(2))
    store.delete(commit_key(2))
    store.put(f"activations.zarr/{acts_array(RESID)}/c/2/0", b"")
    writer = DatasetWriter(store, dataset.manifest)
    assert writer.mend(2, SyntheticSource(dataset.manifest).chunk(2))
    writer.close()
    assert store.get(commit_key(2)) == before
    assert list(dataset_faults(dataset)) == []


def test_a_recomputation_that_differs_does_not_replace_a_lost_commit(
    indexed: tuple[Dataset, CountingStore],
) -> None:
    """Without the index nothing would tell that it differs."""
    dataset, store = indexed
    key = f"activations.zarr/{acts_array(RESID)}/c/2/0"
    store.delete(commit_key(2))
    store.put(key, b"")
    chunk = SyntheticSource(dataset.manifest).chunk(2)
    chunk.acts[RESID][0, 0] += 1
    writer = DatasetWriter(store, dataset.manifest)
    assert not writer.mend(2, chunk)
    writer.close()
    assert store.get(key) == b""
    assert not store.exists(commit_key(2))


@pytest.mark.parametrize("harm", ["flip", "forge", "lose"])
def test_a_wrong_index_is_written_from_the_commits(indexed: tuple[Dataset, CountingStore], harm: str) -> None:
    dataset, store = indexed
    before = store.get(index_key(0))
    if harm == "flip":
        store.put(index_key(0), spoil(before))
    elif harm == "forge":
        forged(dataset, lambda commit: replace(commit, rows=1))
    else:
        store.delete(index_key(0))
    (fault,) = dataset_faults(dataset)
    assert "index/0.safetensors" in str(fault)
    assert "repair writes it from the commits" in str(fault)
    assert fault.restore is not None
    fault.restore()
    assert store.get(index_key(0)) == before
    assert list(dataset_faults(dataset)) == []


def test_an_incomplete_block_needs_no_index(tmp_path: Path) -> None:
    assert list(dataset_faults(write_dataset(tmp_path, indices=range(CHUNKS - 1)))) == []


# Very many


def opened(store: CountingStore, plan: Manifest) -> list[tuple[str, str]]:
    """What it costs to open a dataset of very many chunks, and to learn what is committed."""
    from penstock.store.manifest import load_manifest

    write_big(store, plan, range(plan.n_chunks // BLOCK_CHUNKS * BLOCK_CHUNKS, plan.n_chunks - 1))
    store.take()
    store.listed = 0
    dataset = Dataset(store, load_manifest(store))
    assert dataset.committed() == set(range(plan.n_chunks - 1))
    assert dataset.commit(plan.n_chunks // 2) == made_up_commit(plan, plan.n_chunks // 2)
    assert store.listed == plan.n_chunks // BLOCK_CHUNKS + 9
    return store.take()


def requests_for(n_chunks: int) -> list[tuple[str, str]]:
    last = n_chunks // BLOCK_CHUNKS
    return [
        *(
            ("get", "manifest.json"),
            ("list", "index/"),
            ("folders", "commits/"),
            ("list", f"commits/{last}/"),
        ),
        ("get", index_key(n_chunks // 2 // BLOCK_CHUNKS)),
    ]


def test_a_hundred_thousand_chunks_open_with_five_requests(store: CountingStore) -> None:
    n = 100 * BLOCK_CHUNKS + 10
    assert opened(store, big_manifest(n)) == requests_for(n)


def test_as_many_on_s3(bucket: str) -> None:
    n = 100 * BLOCK_CHUNKS + 10
    inner: ObjectStore = S3Store(f"s3://{bucket}/dataset")
    assert opened(CountingStore(inner), big_manifest(n)) == requests_for(n)


def test_a_commit_of_a_missing_chunk_is_missing(store: CountingStore, manifest: Manifest) -> None:
    write_big(store, manifest)
    dataset = Dataset(store, manifest)
    with pytest.raises(ObjectMissing, match=r"commits/1/1003\.json"):
        dataset.commit(BLOCK_CHUNKS + 3)
    with pytest.raises(ObjectMissing):
        dataset.commit(-1)
    assert committed_indices(store, N) == set(range(BLOCK_CHUNKS))
