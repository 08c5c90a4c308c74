"""bfloat16 in Zarr: every bit pattern survives, and other readers agree."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
import zarr.codecs

import penstock.store.bfloat16
from penstock.store.arrays import BFLOAT16, encode_payload

EVERY_PATTERN = np.arange(2**16, dtype=np.uint16).reshape(256, 256)


def write(path: Path, fill_value: Any = 0, compressors: Any = "auto") -> None:
    array = zarr.create_array(
        path,
        shape=(256, 256),
        chunks=(100, 256),
        dtype=BFLOAT16,
        compressors=compressors,
        fill_value=fill_value,
        zarr_format=3,
        # without it zarr compares with the fill value, and NaN patterns make NumPy warn
        config={"write_empty_chunks": True},
    )
    array[:] = EVERY_PATTERN.view(BFLOAT16)


def bits(array: Any) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.asarray(array).view(np.uint16)


def read_with_tensorstore(path: Path) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec).result().read().result()


@pytest.mark.parametrize("compressors", ["auto", None, [zarr.codecs.Crc32cCodec()]])
def test_every_pattern_survives(tmp_path: Path, compressors: Any) -> None:
    write(tmp_path, compressors=compressors)
    read: Any = zarr.open_array(tmp_path, mode="r")[:]
    assert read.dtype == BFLOAT16
    assert np.array_equal(bits(read), EVERY_PATTERN)
    theirs = read_with_tensorstore(tmp_path)
    assert theirs.dtype == BFLOAT16
    assert np.array_equal(bits(theirs), EVERY_PATTERN)


def test_arrays_of_tensorstore_open_in_zarr(tmp_path: Path) -> None:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(tmp_path)},
        "metadata": {
            "shape": [256, 256],
            "data_type": "bfloat16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [100, 256]}},
        },
    }
    theirs = tensorstore.open(spec, create=True).result()
    theirs.write(EVERY_PATTERN.view(BFLOAT16)).result()
    ours: Any = zarr.open_array(tmp_path, mode="r")[:]
    assert np.array_equal(bits(ours), EVERY_PATTERN)


def test_a_payload_made_by_hand_is_what_zarr_writes(tmp_path: Path) -> None:
    write(tmp_path, compressors=[zarr.codecs.Crc32cCodec()])
    block = np.ascontiguousarray(EVERY_PATTERN[100:200]).view(BFLOAT16)
    assert (tmp_path / "c" / "1" / "0").read_bytes() == encode_payload(block)


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, 0.0), (-1.5, -1.5), (np.inf, "Infinity"), (-np.inf, "-Infinity"), (np.nan, "NaN")],
)
def test_fill_values_are_written_and_read(tmp_path: Path, value: float, written: Any) -> None:
    zarr.create_array(tmp_path, shape=(4,), chunks=(2,), dtype=BFLOAT16, fill_value=value, zarr_format=3)
    assert json.loads((tmp_path / "zarr.json").read_text())["fill_value"] == written
    read: Any = zarr.open_array(tmp_path, mode="r")[:]
    assert np.array_equal(read.astype(np.float32), np.full(4, value, np.float32), equal_nan=True)
    assert np.array_equal(bits(read_with_tensorstore(tmp_path)), bits(read))


def test_other_types_are_left_alone(tmp_path: Path) -> None:
    for dtype in (np.float16, np.uint16, np.float32):
        zarr.create_array(tmp_path / np.dtype(dtype).name, shape=(4,), chunks=(2,), dtype=dtype)
        read: Any = zarr.open_array(tmp_path / np.dtype(dtype).name)[:]
        assert read.dtype == dtype


def test_zarr_2_has_no_bfloat16(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="bfloat16"):
        zarr.create_array(tmp_path, shape=(4,), chunks=(2,), dtype=BFLOAT16, zarr_format=2)


def test_text_is_no_scalar() -> None:
    with pytest.raises(TypeError, match="not a number"):
        penstock.store.bfloat16.BFloat16().cast_scalar("1")
    assert penstock.store.bfloat16.BFloat16().cast_scalar(1) == ml_dtypes.bfloat16(1)


OPENED_ELSEWHERE = """
import sys, hashlib
import numpy, zarr
assert not any(name.startswith("penstock") for name in sys.modules)
array = zarr.open_group(sys.argv[1], mode="r")["array"]
print(hashlib.sha256(numpy.asarray(array[:]).view("uint16").tobytes()).hexdigest(), array.dtype)
"""


def test_who_has_us_installed_opens_arrays_without_importing_us(tmp_path: Path) -> None:
    zarr.create_group(tmp_path, zarr_format=3)
    write(tmp_path / "array")
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", OPENED_ELSEWHERE, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [hashlib.sha256(EVERY_PATTERN.tobytes()).hexdigest(), "bfloat16"]
