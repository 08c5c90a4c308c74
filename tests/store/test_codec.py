"""Compressed activations: what zarr's own pipeline writes, readable by others, checked, and brought back."""

import json
import threading
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import pytest
import zarr.codecs
import zarr.storage

import penstock.store.bfloat16  # noqa: F401  (registers the data type)
from penstock.common.errors import DamagedObject, UserError
from penstock.store.arrays import BFLOAT16, BLOSC, BLOSC_BLOCK, PLAIN, decode_payload, encode_payload
from penstock.store.chunks import load_payload
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.layout import ARRAYS
from penstock.store.manifest import Manifest
from penstock.store.objects import open_store
from penstock.store.verify import dataset_faults
from penstock.store.writer import DatasetWriter
from services.synthetic import MLP, RESID, ROWS, SyntheticSource, laid_out, make_manifest, write_dataset

CHUNKS = 3


def compressed() -> Manifest:
    return make_manifest(ROWS[:CHUNKS]).model_copy(update={"codec": BLOSC})


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path / "dataset", compressed())


def rows(n: int = 2000, d_in: int = 96) -> npt.NDArray[np.generic]:
    return np.random.default_rng(0).standard_normal((n, d_in)).astype(np.float32).astype(BFLOAT16)


def bits(array: Any) -> npt.NDArray[np.uint16]:
    return np.asarray(array).view(np.uint16)


def group(dataset: Dataset) -> Any:
    return zarr.open_group(f"{dataset.url}/{ARRAYS}", mode="r")


def test_it_is_smaller_and_loses_nothing() -> None:
    array = rows()
    data = encode_payload(array, BLOSC)
    assert len(data) < 0.75 * array.nbytes
    back = decode_payload(data, BFLOAT16, array.shape, "x", BLOSC)
    assert (bits(back) == bits(array)).all()


def test_what_cannot_be_compressed_is_stored_with_a_header() -> None:
    noise = np.random.default_rng(0).integers(0, 2**16, (500, 8), np.uint16).view(BFLOAT16)
    data = encode_payload(noise, BLOSC)
    assert len(data) == noise.nbytes + 16 + 4
    assert (bits(decode_payload(data, BFLOAT16, noise.shape, "x", BLOSC)) == bits(noise)).all()


def test_zarr_writes_the_same_bytes(tmp_path: Path) -> None:
    array = rows(400)
    written = zarr.create_array(
        store=str(tmp_path),
        shape=(800, 96),
        chunks=(400, 96),
        dtype=BFLOAT16,
        compressors=[
            zarr.codecs.BloscCodec(
                typesize=2, cname="zstd", clevel=1, shuffle="shuffle", blocksize=BLOSC_BLOCK
            ),
            zarr.codecs.Crc32cCodec(),
        ],
    )
    written[400:] = array
    assert (tmp_path / "c" / "1" / "0").read_bytes() == encode_payload(array, BLOSC)


def test_bytes_do_not_depend_on_threads() -> None:
    """blosc writes blocks in the order in which its threads end; there is only one block."""
    array = rows(12_000, 512)  # 12 MB
    made: list[bytes] = []
    before = numcodecs.blosc.use_threads
    try:
        for use in (True, False, None):
            numcodecs.blosc.use_threads = use
            made.append(encode_payload(array, BLOSC))
            thread = threading.Thread(target=lambda: made.append(encode_payload(array, BLOSC)))
            thread.start()
            thread.join()
    finally:
        numcodecs.blosc.use_threads = before
    assert len(made) == 6
    assert len(set(made)) == 1


def test_every_flipped_bit_and_every_length_is_noticed() -> None:
    array = rows(5, 4)
    whole = encode_payload(array, BLOSC)
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(DamagedObject, match="acts/x"):
            decode_payload(bytes(flipped), BFLOAT16, array.shape, "acts/x", BLOSC)
    for data in [whole[:n] for n in range(len(whole))] + [whole + b"\x00"]:
        with pytest.raises(DamagedObject, match="acts/x"):
            decode_payload(data, BFLOAT16, array.shape, "acts/x", BLOSC)


def test_another_array_in_its_place_is_noticed() -> None:
    other = encode_payload(rows(5, 4), BLOSC)
    with pytest.raises(DamagedObject, match="does not hold 48 bytes"):
        decode_payload(other, BFLOAT16, (6, 4), "acts/x", BLOSC)


def test_a_dataset_reads_back(dataset: Dataset) -> None:
    source = SyntheticSource(dataset.manifest)
    plain = write_dataset(Path(dataset.url).parent / "plain", make_manifest(ROWS[:CHUNKS]))
    for index in range(CHUNKS):
        there, other = dataset.read_chunk(index), plain.read_chunk(index)
        assert sorted(there.tokens) == sorted(source.chunk(index).tokens)
        for hook in (RESID, MLP):
            assert (bits(there.acts[hook]) == bits(other.acts[hook])).all()
    batches = [bits(batch[RESID].view(dtype=_int16()).numpy()) for batch in dataset.batches([RESID], 64)]
    others = [bits(batch[RESID].view(dtype=_int16()).numpy()) for batch in plain.batches([RESID], 64)]
    assert all((a == b).all() for a, b in zip(batches, others, strict=True))


def _int16() -> Any:
    import torch

    return torch.int16


def test_zarr_tensorstore_and_xarray_read_it(dataset: Dataset) -> None:
    import tensorstore
    import xarray

    for hook in (RESID, MLP):
        specs = {spec.path: spec for spec in DatasetWriter(dataset.store, dataset.manifest).specs}
        expected = bits(load_payload(dataset.store, specs[f"acts/{hook}"], 1).array)
        assert (bits(group(dataset)[f"acts/{hook}"][210:420]) == expected).all()
        kvstore = {"driver": "file", "path": f"{dataset.url}/{ARRAYS}/acts/{hook}/"}
        opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
        assert (bits(opened[210:420].read().result()) == expected).all()
        frame = xarray.open_zarr(f"{dataset.url}/{ARRAYS}", group="acts", consolidated=False)
        assert (bits(frame[hook][210:420].values) == expected).all()


def test_only_activations_are_compressed(dataset: Dataset) -> None:
    def codecs(path: str) -> list[str]:
        metadata = json.loads(dataset.store.get(f"{ARRAYS}/{path}/zarr.json"))
        return [codec["name"] for codec in metadata["codecs"]]

    assert codecs(f"acts/{RESID}") == ["bytes", "blosc", "crc32c"]
    assert codecs("sequence") == ["bytes", "crc32c"]


def test_commits_describe_the_stored_bytes(dataset: Dataset) -> None:
    for index in range(CHUNKS):
        for path, stored in dataset.commit(index).objects.items():
            suffix = f"{index}/0" if path.startswith("acts/") else f"{index}"
            data = dataset.store.get(f"{ARRAYS}/{path}/c/{suffix}")
            assert stored.size == len(data)
            assert stored.crc32c == int.from_bytes(data[-4:], "little")
            assert len(data) <= dataset.manifest.chunk_bytes()


def test_a_whole_dataset_has_no_faults(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "whole", compressed(), indexed=True)
    assert not list(dataset_faults(dataset))


def test_damage_is_found_and_the_very_bytes_come_back(dataset: Dataset) -> None:
    key = f"{ARRAYS}/acts/{MLP}/c/1/0"
    before = dataset.store.get(key)
    commit = dataset.store.get("commits/0/1.json")
    dataset.store.put(key, before[:100] + bytes([before[100] ^ 8]) + before[101:])
    dataset.store.delete("commits/0/1.json")
    dataset.store.put("commits/0/1.json", commit[:-3])
    with pytest.raises(DamagedObject):
        dataset.read_chunk(1)
    assert [fault.chunk for fault in dataset_faults(dataset)] == [1]
    writer = DatasetWriter(dataset.store, dataset.manifest)
    assert writer.mend(1, SyntheticSource(dataset.manifest).chunk(1))
    assert dataset.store.get(key) == before
    assert dataset.store.get("commits/0/1.json") == commit


def test_a_lost_commit_is_derived_from_the_objects(dataset: Dataset) -> None:
    commit = dataset.store.get("commits/0/2.json")
    dataset.store.put("commits/0/2.json", commit[:-3])
    (fault,) = dataset_faults(dataset)
    assert fault.restore is not None
    fault.restore()
    assert dataset.store.get("commits/0/2.json") == commit


def test_what_another_writer_stored_counts(tmp_path: Path) -> None:
    """An intact object in other bytes, as another version of the compressor would make it."""
    store = open_store(str(tmp_path / "d"))
    manifest = compressed()
    writer = DatasetWriter(store, manifest)
    chunk = SyntheticSource(manifest).chunk(0)
    (spec,) = (spec for spec in writer.specs if spec.path == f"acts/{RESID}")
    raw = laid_out(writer.manifest, 0, chunk)[spec.path].view(np.uint8).reshape(-1)
    theirs = numcodecs.blosc.compress(raw, b"zstd", 9, 1, 0, 2)
    import google_crc32c

    data = theirs + int(google_crc32c.value(theirs)).to_bytes(4, "little")
    assert data != spec.encode(laid_out(writer.manifest, 0, chunk)[spec.path])
    store.create(spec.key(ARRAYS, 0), data)
    commit, _ = writer.write(0, chunk)
    assert commit.objects[spec.path].size == len(data)
    read = open_dataset(store.url).read_chunk(0).acts[RESID]
    assert (bits(read) == bits(laid_out(writer.manifest, 0, chunk)[spec.path][: chunk.rows])).all()


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "d"))
    store.create_guarded("manifest.json", compressed().model_copy(update={"codec": "x"}).model_dump())
    with pytest.raises(UserError, match=f"codec is x; this version of penstock reads .*{PLAIN[:5]}"):
        open_dataset(store.url)
