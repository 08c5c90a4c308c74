"""Other people's readers see a dataset's arrays, on files and on S3, and the values are ours, bit for bit."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from penstock.store.dataset import Dataset, open_dataset
from penstock.store.layout import ARRAYS, POSITION, SEQUENCE, TOKENS, acts_array
from services.s3_server import REGION
from services.synthetic import MLP, RESID, ROWS_PER_CHUNK, make_manifest, write_dataset

ROWS = [ROWS_PER_CHUNK, 150, ROWS_PER_CHUNK, 1]
"""The last chunk is short."""
DTYPES = {acts_array(RESID): "bfloat16", acts_array(MLP): "bfloat16"}
DTYPES |= {TOKENS: "int32", SEQUENCE: "int64", POSITION: "int32"}

Values = np.ndarray[Any, np.dtype[Any]]
Reader = Callable[[str, str], Values]


def by_tensorstore(url: str, path: str) -> Values:
    bucket, key = urlsplit(url).netloc, urlsplit(url).path
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{key}/{ARRAYS}/{path}/"}
    if url.startswith("s3://"):
        kvstore = {
            "driver": "s3",
            "bucket": bucket,
            "path": f"{key.lstrip('/')}/{ARRAYS}/{path}/",
            "endpoint": os.environ["AWS_ENDPOINT_URL"],
            "aws_region": REGION,
            "aws_credentials": {"type": "environment"},
        }
    opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()
    return np.asarray(opened.read().result())


def by_zarr(url: str, path: str) -> Values:
    group = zarr.open_group(f"{url}/{ARRAYS}", mode="r", storage_options=options(url))
    array: Any = group[path]
    return np.asarray(array[:])


def by_xarray(url: str, path: str) -> Values:
    *parents, name = path.split("/", 1)
    with xarray.open_zarr(
        f"{url}/{ARRAYS}", group="/".join(parents) or None, consolidated=False, storage_options=options(url)
    ) as opened:
        rows = opened[name]
        assert rows.dims == (("row",) if not parents else ("row", f"d_in:{name}"))
        return np.asarray(rows.to_numpy())


def options(url: str) -> dict[str, Any] | None:
    """fsspec keeps file systems by their options, and this one stands for a server."""
    return {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]} if url.startswith("s3://") else None


def ours(dataset: Dataset, path: str) -> Values:
    """A whole array as Penstock reads it, unused rows included."""
    chunks = range(dataset.n_chunks)
    return np.concatenate([dataset.read_object(path, dataset.commit(index)) for index in chunks])


@pytest.fixture(params=["files", "s3"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    place = tmp_path / "dataset"
    url = str(place) if request.param == "files" else f"s3://{request.getfixturevalue('bucket')}/a/dataset"
    write_dataset(url, make_manifest(ROWS))
    return open_dataset(url)


@pytest.mark.parametrize("read", [by_tensorstore, by_zarr, by_xarray])
def test_every_reader_sees_the_same_bits(dataset: Dataset, read: Reader) -> None:
    for path, dtype in DTYPES.items():
        expected, found = ours(dataset, path), read(dataset.url, path)
        assert found.dtype.name == expected.dtype.name == dtype
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
        assert np.count_nonzero(found.view(np.uint8)) > 0


def test_xarray_sees_one_dimension_of_rows(dataset: Dataset) -> None:
    with xarray.open_zarr(
        f"{dataset.url}/{ARRAYS}", consolidated=False, storage_options=options(dataset.url)
    ) as origin:
        assert set(origin.data_vars) == {TOKENS, SEQUENCE, POSITION}
        assert dict(origin.sizes) == {"row": len(ROWS) * ROWS_PER_CHUNK}
