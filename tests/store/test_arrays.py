"""Chunk payloads: little-endian bytes and their crc32c, every change noticed; zarr's own metadata."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.errors import DamagedObject
from penstock.store.arrays import (
    BFLOAT16,
    ArraySpec,
    create_arrays,
    dataset_arrays,
    decode_payload,
    encode_payload,
    payload_checksum,
)
from penstock.store.local import LocalStore
from penstock.store.records import crc32c
from services.synthetic import WIDTHS, make_manifest


def test_payload_bytes_are_golden() -> None:
    data = encode_payload(np.array([1, -2], np.int32))
    assert data == b"\x01\x00\x00\x00\xfe\xff\xff\xff" + struct.pack("<I", crc32c(data[:8]))
    bits = np.array([[0x3F80, 0x8000]], np.uint16).view(BFLOAT16)
    assert encode_payload(bits)[:4] == b"\x80\x3f\x00\x80"


def test_big_endian_arrays_are_stored_little_endian() -> None:
    assert encode_payload(np.array([1, 2], ">i4")) == encode_payload(np.array([1, 2], "<i4"))


def test_strided_arrays_are_stored_in_order() -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    assert encode_payload(array[::2, ::3]) == encode_payload(array[::2, ::3].copy())
    assert encode_payload(array.T) == encode_payload(np.ascontiguousarray(array.T))


@given(st.integers(0, 2**32), st.sampled_from([(0,), (7,), (3, 5)]))
def test_payloads_come_back_bit_for_bit(seed: int, shape: tuple[int, ...]) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**16, shape).astype(np.uint16)
    array = bits.view(BFLOAT16)
    back = decode_payload(encode_payload(array), BFLOAT16, shape, "x")
    assert back.dtype == BFLOAT16
    assert np.array_equal(back.view(np.uint16), bits)
    assert not back.flags.writeable


def test_every_flipped_bit_is_noticed() -> None:
    whole = encode_payload(np.arange(12, dtype=np.uint16).view(BFLOAT16))
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedObject, match=r"^acts/x is damaged"):
            decode_payload(bytes(flipped), BFLOAT16, (12,), "acts/x")


def test_the_checksum_kept_in_records_tells_contents_apart() -> None:
    """The crc32c of a whole payload does not: over data and its own crc32c it is a constant."""
    payloads = [encode_payload(np.array([value], np.int32)) for value in range(100)]
    assert len({payload_checksum(data) for data in payloads}) == 100
    assert [payload_checksum(data) for data in payloads] == [crc32c(data[:-4]) for data in payloads]


def test_every_other_length_is_noticed() -> None:
    whole = encode_payload(np.arange(12, dtype=np.int32))
    for data in [whole[:n] for n in range(len(whole))] + [whole + b"\x00"]:
        with pytest.raises(DamagedObject, match=rf"{len(data)} bytes, not {len(whole)}"):
            decode_payload(data, np.dtype(np.int32), (12,), "x")


def test_a_dataset_has_its_arrays() -> None:
    manifest = make_manifest()
    specs = {spec.path: spec for spec in dataset_arrays(manifest)}
    assert set(specs) == {"tokens", "sequence", "position", *(f"acts/{hook}" for hook in WIDTHS)}
    total = manifest.n_chunks * manifest.rows_per_chunk
    for hook, width in WIDTHS.items():
        spec = specs[f"acts/{hook}"]
        assert spec.shape == (total, width)
        assert spec.chunk_shape == (manifest.rows_per_chunk, width)
        assert spec.key("activations.zarr", 3) == f"activations.zarr/acts/{hook}/c/3/0"
    assert specs["sequence"].dtype == np.int64
    assert specs["tokens"].key("activations.zarr", 3) == "activations.zarr/tokens/c/3"
    stored = sum(int(np.prod(s.chunk_shape)) * s.dtype.itemsize + 4 for s in specs.values())
    assert manifest.chunk_bytes() == stored


def test_metadata_says_what_every_reader_needs(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    create_arrays(store, "activations.zarr", dataset_arrays(make_manifest()))
    for hook, width in WIDTHS.items():
        metadata = json.loads(store.get(f"activations.zarr/acts/{hook}/zarr.json"))
        assert metadata["zarr_format"] == 3
        assert metadata["data_type"] == "bfloat16"
        assert metadata["dimension_names"] == ["row", f"d_in:{hook}"]
        assert [codec["name"] for codec in metadata["codecs"]] == ["bytes", "crc32c"]
        assert metadata["codecs"][0]["configuration"] == {"endian": "little"}
        assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [210, width]
    for group in ("activations.zarr", "activations.zarr/acts"):
        assert json.loads(store.get(f"{group}/zarr.json"))["node_type"] == "group"


def test_metadata_that_is_there_stays(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    spec = ArraySpec("tokens", (20,), 10, np.dtype(np.int32), ("row",))
    create_arrays(store, "a.zarr", [spec])
    before = store.get("a.zarr/tokens/zarr.json")
    create_arrays(store, "a.zarr", [ArraySpec("tokens", (40,), 10, np.dtype(np.int32), ("row",))])
    assert store.get("a.zarr/tokens/zarr.json") == before
