"""Zarr metadata through zarr-python, chunk payloads by hand.

The metadata of the group and its arrays is made by zarr in memory and stored with exclusive creates.
A chunk's payload is its little-endian bytes followed by their crc32c: what zarr's own pipeline
(codecs `bytes`, `crc32c`) writes, only faster, and an all-zero chunk is never left out.
"""

from dataclasses import dataclass
from functools import lru_cache

import google_crc32c
import ml_dtypes
import numpy as np
import numpy.typing as npt

from penstock.common.errors import DamagedObject
from penstock.store.layout import POSITION, SEQUENCE, TOKENS, acts_array, chunk_key
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CRC_BYTES = 4


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array: chunked along its first dimension only."""

    path: str
    shape: tuple[int, ...]
    chunk_rows: int
    dtype: np.dtype[np.generic]
    dimension_names: tuple[str, ...]

    def key(self, group: str, index: int) -> str:
        """Object key of one of its chunks."""
        return chunk_key(group, self.path, index, len(self.shape))

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows, *self.shape[1:])


def dataset_arrays(manifest: Manifest) -> list[ArraySpec]:
    """All arrays of a dataset: one per hook, then tokens, sequence and position of each row."""
    rows, per_chunk = manifest.n_chunks * manifest.rows_per_chunk, manifest.rows_per_chunk
    specs = [
        ArraySpec(
            path=acts_array(hook.name),
            shape=(rows, hook.d_in),
            chunk_rows=per_chunk,
            dtype=BFLOAT16,
            dimension_names=("row", f"d_in:{hook.name}"),
        )
        for hook in manifest.hooks
    ]
    for path, dtype in ((TOKENS, np.int32), (SEQUENCE, np.int64), (POSITION, np.int32)):
        specs.append(ArraySpec(path, (rows,), per_chunk, np.dtype(dtype), ("row",)))
    return specs


def create_arrays(store: ObjectStore, group: str, specs: list[ArraySpec]) -> None:
    """Store the Zarr metadata of a group of arrays, unless it is there."""
    for key, data in zarr_metadata(tuple(specs)).items():
        store.create(f"{group}/{key}", data)


@lru_cache(maxsize=8)
def zarr_metadata(specs: tuple[ArraySpec, ...]) -> dict[str, bytes]:
    """Key below the group -> bytes of every `zarr.json` of a group of arrays."""
    import zarr
    import zarr.codecs
    import zarr.storage

    import penstock.store.bfloat16  # noqa: F401  (registers the data type)

    memory = zarr.storage.MemoryStore()
    group = zarr.open_group(memory, mode="w", zarr_format=3)
    for spec in specs:
        group.create_array(
            spec.path,
            shape=spec.shape,
            chunks=spec.chunk_shape,
            dtype=spec.dtype,
            compressors=[zarr.codecs.Crc32cCodec()],
            fill_value=0,
            dimension_names=list(spec.dimension_names),
        )
    return {key: value.to_bytes() for key, value in memory._store_dict.items()}


def encode_payload(array: npt.NDArray[np.generic]) -> bytes:
    """Stored bytes of one chunk: little-endian values, then their crc32c."""
    raw = _little_endian(array)
    checksum = int(google_crc32c.value(raw))
    return b"".join((raw.data, checksum.to_bytes(CRC_BYTES, "little")))


def _little_endian(array: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(-1)


def payload_checksum(data: bytes) -> int:
    """The crc32c that ends a stored payload: that of its values.

    Records keep this one. The crc32c of a whole payload would be the same number for every intact
    one, because a CRC over data followed by its own CRC is a constant.
    """
    return int.from_bytes(data[-CRC_BYTES:], "little")


def payload_description(array: npt.NDArray[np.generic]) -> tuple[int, int]:
    """Size and checksum of the payload that an array is stored as."""
    raw = _little_endian(array)
    return raw.nbytes + CRC_BYTES, int(google_crc32c.value(raw))


def decode_payload(
    data: bytes, dtype: np.dtype[np.generic], shape: tuple[int, ...], name: str
) -> npt.NDArray[np.generic]:
    """Check and view stored bytes as an array (read-only, no copy).

    Raises:
        DamagedObject: wrong size or checksum.
    """
    expected = int(np.prod(shape)) * dtype.itemsize
    if len(data) != expected + CRC_BYTES:
        raise DamagedObject(f"{name} is damaged: {len(data)} bytes, not {expected + CRC_BYTES}")
    raw = np.frombuffer(data, dtype=np.uint8, count=expected)
    if int(google_crc32c.value(raw)) != payload_checksum(data):
        raise DamagedObject(f"{name} is damaged: its checksum does not match its content")
    return raw.view(dtype).reshape(shape)
