"""Zarr metadata through zarr-python, chunk payloads by hand.

The metadata of the group and its arrays is made by zarr in memory and stored with exclusive creates.
A chunk's payload is its little-endian bytes, compressed if so planned, followed by their crc32c: what
zarr's own pipeline (codecs `bytes`, `blosc`, `crc32c`) writes, only faster, and an all-zero chunk is
never left out.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import google_crc32c
import ml_dtypes
import numpy as np
import numpy.typing as npt

from penstock.common.errors import DamagedObject, UserError
from penstock.common.settings import one_line
from penstock.store.layout import POSITION, SEQUENCE, TOKENS, acts_array, chunk_key
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore

if TYPE_CHECKING:
    import zarr.codecs

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CRC_BYTES = 4

PLAIN, BLOSC = "bytes+crc32c", "bytes+blosc+crc32c"
"""Codecs of activations. Everything else is small and always plain."""

BLOSC_BLOCK = 64 * 1024 * 1024
"""One block, because no object is larger: with several, their order depends on blosc's threads."""
BLOSC_HEADER = 16
"""Bytes that blosc adds to what it cannot compress."""


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array: chunked along its first dimension only."""

    path: str
    shape: tuple[int, ...]
    chunk_rows: int
    dtype: np.dtype[np.generic]
    dimension_names: tuple[str, ...]
    codec: str = PLAIN

    def key(self, group: str, index: int) -> str:
        """Object key of one of its chunks."""
        return chunk_key(group, self.path, index, len(self.shape))

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows, *self.shape[1:])

    def encode(self, array: npt.NDArray[np.generic]) -> bytes:
        """Stored bytes of a chunk."""
        return encode_payload(array, self.codec)

    def decode(self, data: bytes, name: str) -> npt.NDArray[np.generic]:
        """Check stored bytes and view them as a chunk; see `decode_payload`."""
        return decode_payload(data, self.dtype, self.chunk_shape, name, self.codec)


def dataset_arrays(manifest: Manifest) -> list[ArraySpec]:
    """All arrays of a dataset: one per hook, then tokens, sequence and position of each row.

    Raises:
        UserError: it was stored with a codec that this version does not know.
    """
    if manifest.codec not in (PLAIN, BLOSC):
        raise UserError(
            f"the dataset's codec is {one_line(manifest.codec, 60)}; this version of penstock reads {PLAIN} "
            f"and {BLOSC}: upgrade penstock"
        )
    rows, per_chunk = manifest.n_chunks * manifest.rows_per_chunk, manifest.rows_per_chunk
    specs = [
        ArraySpec(
            path=acts_array(hook.name),
            shape=(rows, hook.d_in),
            chunk_rows=per_chunk,
            dtype=BFLOAT16,
            dimension_names=("row", f"d_in:{hook.name}"),
            codec=manifest.codec,
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
            compressors=[*_compressors(spec), zarr.codecs.Crc32cCodec()],
            fill_value=0,
            dimension_names=list(spec.dimension_names),
        )
    return {key: value.to_bytes() for key, value in memory._store_dict.items()}


def _compressors(spec: ArraySpec) -> "list[zarr.codecs.BloscCodec]":
    import zarr.codecs

    if spec.codec == PLAIN:
        return []
    return [
        zarr.codecs.BloscCodec(
            typesize=spec.dtype.itemsize, cname="zstd", clevel=1, shuffle="shuffle", blocksize=BLOSC_BLOCK
        )
    ]


def encode_payload(array: npt.NDArray[np.generic], codec: str = PLAIN) -> bytes:
    """Stored bytes of one chunk: little-endian values, compressed or not, then their crc32c."""
    raw = _little_endian(array)
    if codec == BLOSC:
        raw = np.frombuffer(_compress(raw, array.dtype.itemsize), np.uint8)
    checksum = int(google_crc32c.value(raw))
    return b"".join((raw.data, checksum.to_bytes(CRC_BYTES, "little")))


def _compress(raw: npt.NDArray[np.uint8], itemsize: int) -> bytes:
    from numcodecs import blosc

    return bytes(blosc.compress(raw, b"zstd", 1, blosc.SHUFFLE, BLOSC_BLOCK, itemsize))


def _little_endian(array: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(-1)


def payload_checksum(data: bytes) -> int:
    """The crc32c that ends a stored payload: that of the bytes before it.

    Records keep this one. The crc32c of a whole payload would be the same number for every intact
    one, because a CRC over data followed by its own CRC is a constant.
    """
    return int.from_bytes(data[-CRC_BYTES:], "little")


def decode_payload(
    data: bytes, dtype: np.dtype[np.generic], shape: tuple[int, ...], name: str, codec: str = PLAIN
) -> npt.NDArray[np.generic]:
    """Check and view stored bytes as an array (read-only; no copy unless they are compressed).

    Raises:
        DamagedObject: wrong size or checksum.
    """
    expected = int(np.prod(shape)) * dtype.itemsize
    if codec == PLAIN and len(data) != expected + CRC_BYTES:
        raise DamagedObject(f"{name} is damaged: {len(data)} bytes, not {expected + CRC_BYTES}")
    raw = np.frombuffer(data, dtype=np.uint8, count=max(0, len(data) - CRC_BYTES))
    if int(google_crc32c.value(raw)) != payload_checksum(data):
        raise DamagedObject(f"{name} is damaged: its checksum does not match its content")
    if codec == BLOSC:
        raw = _decompress(raw, expected, name)
    return raw.view(dtype).reshape(shape)


def _decompress(raw: npt.NDArray[np.uint8], expected: int, name: str) -> npt.NDArray[np.uint8]:
    from numcodecs import blosc

    # the header says how much comes out: bytes 4 to 7
    if len(raw) < BLOSC_HEADER or int(raw[4:8].view("<u4")[0]) != expected:
        raise DamagedObject(f"{name} is damaged: it does not hold {expected} bytes")
    try:
        return np.frombuffer(blosc.decompress(raw), np.uint8)
    except RuntimeError as error:
        raise DamagedObject(f"{name} is damaged: it cannot be decompressed") from error
