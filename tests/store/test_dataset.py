"""Datasets: what producers write is what readers get, whoever wrote it and in whatever order."""

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import penstock.store.bfloat16  # noqa: F401  (for zarr)
from penstock.common.errors import DamagedObject, ModelError, ObjectMissing, PlanMismatch, UserError
from penstock.common.permutation import counter_hash, derive_key, permutation
from penstock.store.arrays import BFLOAT16, encode_payload
from penstock.store.chunks import Chunk, moments
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.layout import commit_key
from penstock.store.local import LocalStore
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore, open_store
from penstock.store.records import crc32c
from penstock.store.writer import DatasetWriter
from services.synthetic import MLP, RESID, ROWS_PER_CHUNK, laid_out, make_manifest

ROWS = [ROWS_PER_CHUNK, 150, ROWS_PER_CHUNK, 1]
"""The last chunk is short."""
GROUP = "activations.zarr"
SMALLEST_NOT_FINITE = 0x7F80


def make_chunk(manifest: Manifest, index: int, salt: int = 0) -> Chunk:
    """Rows of every finite bit pattern there is; chunk 2 is zero throughout."""
    rows = manifest.rows[index]
    acts = {}
    for hook in manifest.hooks:
        raw = counter_hash(derive_key(salt, hook.name, index), rows * hook.d_in)
        finite = (raw % SMALLEST_NOT_FINITE) | (raw >> np.uint64(63) << np.uint64(15))
        bits = np.zeros_like(finite) if index == 2 and not salt else finite
        acts[hook.name] = bits.astype(np.uint16).reshape(rows, hook.d_in).view(BFLOAT16)
    return Chunk(
        index=index,
        acts=acts,
        tokens=(np.arange(rows) * 7 + salt).astype(np.int32),
        sequence=np.arange(rows) // 21 + 10 * index,
        position=(np.arange(rows) % 21).astype(np.int32),
    )


def write(store: ObjectStore, manifest: Manifest, indices: Any = None) -> Dataset:
    writer = DatasetWriter(store, manifest)
    for index in range(manifest.n_chunks) if indices is None else indices:
        commit, ours = writer.write(index, make_chunk(manifest, index))
        assert ours
        assert commit.index == index
    writer.close()
    return open_dataset(store.url)


def bits(array: Any) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.ascontiguousarray(array).view(np.uint16)


def files(directory: Path) -> dict[str, bytes]:
    """Every object but provenance."""
    found = {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}
    return {key: data for key, data in found.items() if not key.startswith("provenance/")}


def chunk_objects(index: int) -> list[str]:
    return [
        f"{GROUP}/acts/{RESID}/c/{index}/0",
        f"{GROUP}/acts/{MLP}/c/{index}/0",
        *(f"{GROUP}/{name}/c/{index}" for name in ("tokens", "sequence", "position")),
    ]


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return make_manifest(ROWS)


@pytest.fixture(scope="module")
def finished(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A whole dataset, only to be read."""
    return write(LocalStore(str(tmp_path_factory.mktemp("dataset"))), manifest)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "dataset"))


@pytest.fixture
def writer(store: LocalStore, manifest: Manifest) -> Iterator[DatasetWriter]:
    writer = DatasetWriter(store, manifest)
    yield writer
    writer.close()


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_what_was_written_comes_back_permuted(finished: Dataset, manifest: Manifest, index: int) -> None:
    written, read = make_chunk(manifest, index), finished.read_chunk(index)
    order = permutation(ROWS[index], manifest.seed, "chunk", index)
    assert (read.index, read.rows) == (index, ROWS[index])
    for hook in (RESID, MLP):
        assert read.acts[hook].dtype == BFLOAT16
        assert np.array_equal(bits(read.acts[hook]), bits(written.acts[hook])[order])
    for name in ("tokens", "sequence", "position"):
        assert getattr(read, name).dtype == getattr(written, name).dtype
        assert np.array_equal(getattr(read, name), getattr(written, name)[order])


def test_only_the_hooks_asked_for_are_read(finished: Dataset) -> None:
    assert list(finished.read_chunk(0, [MLP]).acts) == [MLP]
    assert finished.read_chunk(0, []).acts == {}
    with pytest.raises(UserError, match="'nothing' is not in this dataset"):
        finished.read_chunk(0, ["nothing"])


def test_the_tail_of_a_short_chunk_is_marked(finished: Dataset) -> None:
    group = zarr.open_group(f"{finished.url}/{GROUP}", mode="r")
    sequence: Any = group["sequence"]
    sequence = sequence[:].reshape(len(ROWS), ROWS_PER_CHUNK)
    for index, rows in enumerate(ROWS):
        assert (sequence[index, :rows] >= 0).all()
        assert (sequence[index, rows:] == -1).all()
    acts: Any = group[f"acts/{RESID}"]
    assert not bits(acts[-(ROWS_PER_CHUNK - 1) :]).any()


READ_ELSEWHERE = """
import hashlib, sys
import numpy, xarray, zarr
with xarray.open_zarr(sys.argv[1], group="acts", consolidated=False) as acts:
    by_xarray = acts[sys.argv[2]].to_numpy()
by_zarr = zarr.open_group(sys.argv[1], mode="r")["acts"][sys.argv[2]][:]
for array in (by_xarray, by_zarr):
    print(hashlib.sha256(numpy.ascontiguousarray(array).view("uint16").tobytes()).hexdigest())
"""


def test_others_need_not_import_us(finished: Dataset, tmp_path: Path) -> None:
    acts: Any = zarr.open_group(f"{finished.url}/{GROUP}", mode="r")[f"acts/{RESID}"]
    expected = hashlib.sha256(bits(acts[:]).tobytes()).hexdigest()
    ran = subprocess.run(
        [sys.executable, "-c", READ_ELSEWHERE, f"{finished.url}/{GROUP}", RESID],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [expected, expected]


def test_commits_describe_the_stored_bytes(finished: Dataset) -> None:
    for index, rows in enumerate(ROWS):
        commit = finished.commit(index)
        assert commit.rows == rows
        assert len(commit.objects) == 5
        for key in chunk_objects(index):
            path = key.removeprefix(f"{GROUP}/").split("/c/")[0]
            data = finished.store.get(key)
            assert commit.objects[path].size == len(data)
            assert commit.objects[path].crc32c == crc32c(data[:-4])


def test_a_zero_chunk_is_stored_like_any_other(finished: Dataset) -> None:
    """zarr would leave it out, and nobody could tell it from a missing one."""
    assert not bits(finished.read_chunk(2).acts[RESID]).any()
    assert finished.store.exists(f"{GROUP}/acts/{RESID}/c/2/0")


def test_moments_are_those_of_the_rows() -> None:
    acts = np.random.default_rng(0).standard_normal((2500, 16)).astype(BFLOAT16)
    acts[1500, 3] = -40
    rows = acts.astype(np.float64)
    found = moments(acts)
    assert found.mean_norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-12)
    assert found.mean_squared_norm == pytest.approx((rows**2).sum(axis=1).mean(), rel=1e-12)
    assert found.max_abs == 40
    assert moments(acts[:0]).max_abs == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_not_committed(
    writer: DatasetWriter, manifest: Manifest, value: float
) -> None:
    chunk = make_chunk(manifest, 1)
    chunk.acts[MLP][149, 15] = value
    with pytest.raises(ModelError, match="non-finite"):
        writer.write(1, chunk)
    assert not writer.store.exists(commit_key(1))


def test_nothing_exists_before_its_commit(
    store: LocalStore, writer: DatasetWriter, manifest: Manifest
) -> None:
    writer.write(0, make_chunk(manifest, 0))
    writer.write(1, make_chunk(manifest, 1))
    store.delete(commit_key(1))
    dataset = open_dataset(store.url)
    assert dataset.committed() == {0}
    for index in (1, 2):
        with pytest.raises(ObjectMissing, match=rf"commits/0/{index}\.json"):
            dataset.read_chunk(index)


def test_the_commit_comes_after_every_object(
    store: LocalStore, writer: DatasetWriter, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[str] = []
    real = LocalStore._create

    def spy(store: LocalStore, key: str, data: bytes) -> bool:
        if key == commit_key(0):
            assert all(store.exists(k) for k in chunk_objects(0))
        created.append(key)
        return real(store, key, data)

    monkeypatch.setattr(LocalStore, "_create", spy)
    writer.write(0, make_chunk(manifest, 0))
    assert sorted(created[:-1]) == sorted(chunk_objects(0))
    assert created[-1] == commit_key(0)


@pytest.mark.parametrize("key", chunk_objects(1))
def test_a_missing_object_is_missing_and_not_zeros(tmp_path: Path, manifest: Manifest, key: str) -> None:
    dataset = write(LocalStore(str(tmp_path)), manifest, [0, 1])
    dataset.store.delete(key)
    with pytest.raises(ObjectMissing, match=key):
        dataset.read_chunk(1)
    dataset.read_chunk(0)


@pytest.mark.parametrize("key", chunk_objects(1))
def test_flipped_bits_are_noticed(tmp_path: Path, manifest: Manifest, key: str) -> None:
    dataset = write(LocalStore(str(tmp_path)), manifest, [1])
    whole = (tmp_path / key).read_bytes()
    for bit in range(0, len(whole) * 8, len(whole) // 40 * 8 + 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / key).write_bytes(flipped)
        with pytest.raises(DamagedObject, match=key):
            dataset.read_chunk(1)


@pytest.mark.parametrize("key", chunk_objects(1))
def test_intact_bytes_that_were_not_committed_are_refused(
    tmp_path: Path, manifest: Manifest, key: str
) -> None:
    """Whole, with a checksum of their own that is right; only the commit knows better."""
    dataset = write(LocalStore(str(tmp_path)), manifest, [0, 1])
    dataset.store.put(key, dataset.store.get(key.replace("/c/1", "/c/0")))
    with pytest.raises(DamagedObject, match=key):
        dataset.read_chunk(1)


def test_the_first_writer_wins_chunk_by_chunk(
    store: LocalStore, writer: DatasetWriter, manifest: Manifest
) -> None:
    first, _ = writer.write(0, make_chunk(manifest, 0))
    before = files(Path(store.url))
    again, ours = writer.write(0, make_chunk(manifest, 0, salt=1))
    assert (again, ours) == (first, False)
    assert files(Path(store.url)) == before


@pytest.mark.parametrize("stored", range(1, 6))
def test_a_commit_describes_what_a_dead_writer_left(
    store: LocalStore, writer: DatasetWriter, manifest: Manifest, stored: int
) -> None:
    """Some objects are another's, of other bytes: the first one of each counts."""
    other = laid_out(manifest, 1, make_chunk(manifest, 1, salt=1))
    theirs = {spec.key(GROUP, 1): encode_payload(other[spec.path]) for spec in writer.specs[:stored]}
    for key, data in theirs.items():
        assert store.create(key, data)
    commit, ours = writer.write(1, make_chunk(manifest, 1))
    assert ours
    for key, data in theirs.items():
        assert store.get(key) == data
        assert commit.objects[key.removeprefix(f"{GROUP}/").split("/c/")[0]].crc32c == crc32c(data[:-4])
    read = open_dataset(store.url).read_chunk(1)
    for hook in (RESID, MLP):
        assert commit.moments[hook] == moments(read.acts[hook])
    expected = other if stored > 0 else laid_out(manifest, 1, make_chunk(manifest, 1))
    assert np.array_equal(bits(read.acts[RESID]), bits(expected[f"acts/{RESID}"])[:150])


def test_stored_rows_that_the_manifest_does_not_plan_are_not_committed(
    store: LocalStore, writer: DatasetWriter, manifest: Manifest
) -> None:
    shorter = make_manifest([ROWS[0], 100, *ROWS[2:]])
    left = laid_out(shorter, 1, make_chunk(shorter, 1))
    for spec in writer.specs:
        store.create(spec.key(GROUP, 1), encode_payload(left[spec.path]))
    with pytest.raises(DamagedObject, match="chunk 1 has 100 rows, not 150"):
        writer.write(1, make_chunk(manifest, 1))
    assert not store.exists(commit_key(1))


def test_rows_that_the_manifest_does_not_plan_are_refused(writer: DatasetWriter, manifest: Manifest) -> None:
    chunk: Any = make_chunk(manifest, 1)
    with pytest.raises(ValueError, match="has 100 rows"):
        writer.write(1, make_chunk(make_manifest([ROWS[0], 100, *ROWS[2:]]), 1))
    with pytest.raises(ValueError, match="tokens is int64"):
        writer.write(1, replace(chunk, tokens=chunk.tokens.astype(np.int64)))
    halves: dict[str, Any] = {name: acts.astype(np.float16) for name, acts in chunk.acts.items()}
    with pytest.raises(ValueError, match="is float16"):
        writer.write(1, replace(chunk, acts=halves))


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: b"\x01" + data[1:]])
def test_a_writer_refuses_to_commit_damaged_objects(
    store: LocalStore, writer: DatasetWriter, manifest: Manifest, spoil: Callable[[bytes], bytes]
) -> None:
    whole = encode_payload(laid_out(manifest, 1, make_chunk(manifest, 1))["sequence"])
    store.create(f"{GROUP}/sequence/c/1", spoil(whole))
    with pytest.raises(DamagedObject, match="sequence/c/1"):
        writer.write(1, make_chunk(manifest, 1))
    assert not store.exists(commit_key(1))


def test_bytes_do_not_depend_on_who_wrote_them_and_when(finished: Dataset, tmp_path: Path) -> None:
    manifest = finished.manifest

    def work(directory: Path, indices: list[int]) -> int:
        writer = DatasetWriter(LocalStore(str(directory)), manifest)
        made = [writer.write(index, make_chunk(manifest, index))[1] for index in indices]
        writer.close()
        return sum(made)

    one, many = tmp_path / "one", tmp_path / "many"
    assert work(one, [3, 1, 0, 2]) == 4
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(work, [many] * 4, [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0], [2, 3, 0]])
        assert sum(made) == 4
    whole = files(Path(finished.url))
    assert len(whole) > 20
    assert files(one) == whole
    assert files(many) == whole


def test_bytes_are_the_same_on_s3(finished: Dataset, bucket: str) -> None:
    url = f"s3://{bucket}/datasets/first"
    dataset = write(open_store(url), finished.manifest)
    local = files(Path(finished.url))
    assert dict(dataset.store.list("")) == {k: len(v) for k, v in local.items()}
    assert all(dataset.store.get(key) == data for key, data in local.items())
    assert np.array_equal(bits(dataset.read_chunk(1).acts[MLP]), bits(finished.read_chunk(1).acts[MLP]))


def test_stored_bytes_are_golden(finished: Dataset) -> None:
    digest = hashlib.sha256()
    for index in range(len(ROWS)):
        for key in chunk_objects(index):
            digest.update(finished.store.get(key))
    assert digest.hexdigest() == "774fa8a10dc99afb83bc796b184cf5d2d34f4d8f45a7184ceb927ab61345ae62"


def test_another_plan_at_the_url_is_refused(store: LocalStore, writer: DatasetWriter) -> None:
    with pytest.raises(PlanMismatch, match="rows"):
        DatasetWriter(store, make_manifest([5, 5, 5, 5]))


def test_a_url_without_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing, match=str(tmp_path / "none")):
        open_dataset(str(tmp_path / "none"))
