"""Small datasets without a language model: rows are sparse sums of random directions, from a seed."""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from penstock.common.permutation import permutation
from penstock.store.arrays import BFLOAT16, dataset_arrays
from penstock.store.chunks import Chunk, arranged
from penstock.store.commits import list_commits
from penstock.store.dataset import Dataset
from penstock.store.index import index_block
from penstock.store.layout import FORMAT_VERSION
from penstock.store.manifest import CorpusPin, HookSpec, Manifest, Numerics, SourcePin
from penstock.store.objects import open_store
from penstock.store.writer import DatasetWriter

RESID, MLP = "blocks.0.hook_resid_post", "blocks.0.mlp.hook_post"
WIDTHS = {RESID: 8, MLP: 16}
CHUNKS = 16
ROWS_PER_CHUNK = 210
CONTEXT = 21
ROWS = [190 + (7 * index) % 21 for index in range(CHUNKS)]
"""Rows differ from chunk to chunk, as they do where special tokens are left out."""


def make_manifest(
    rows: list[int] | None = None,
    hooks: dict[str, int] | None = None,
    retention: Literal["keep", "window"] = "keep",
    first_sequence: int = 0,
) -> Manifest:
    """The plan of a synthetic dataset; its rows are a function of the sequences that they come from."""
    rows = ROWS if rows is None else rows
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus=CorpusPin(
            digest="c" * 64,
            description="synthetic",
            first_sequence=first_sequence,
            n_sequences=10 * len(rows),
            context=CONTEXT,
            tokenizer_sha256="t" * 64,
            special_ids=[0],
            bos="none",
            held_out_rule="none",
        ),
        source=SourcePin(
            kind="synthetic", name="synthetic", revision=None, weights_sha256="w" * 64, drop_special=True
        ),
        numerics=Numerics(
            device="none",
            torch="none",
            threads=1,
            compute_dtype="float32",
            attention="none",
            capture="none",
            libraries="none",
            sequences_per_forward=10,
            allow_mixed=False,
        ),
        hooks=[HookSpec(name=name, d_in=width) for name, width in (hooks or WIDTHS).items()],
        sequences_per_chunk=10,
        rows_per_chunk=ROWS_PER_CHUNK,
        rows=rows,
        seed=3,
        codec="bytes+crc32c",
        retention=retention,
    )


class SyntheticSource:
    """Makes chunks of a synthetic dataset: a pure function of (manifest, index)."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def chunk(self, index: int) -> Chunk:
        rows = self._manifest.rows[index]
        place = np.arange(rows)
        first = self._manifest.corpus.first_sequence + 10 * index
        return Chunk(
            index=index,
            acts={hook.name: self._acts(first // 10, rows, hook) for hook in self._manifest.hooks},
            tokens=(1 + place % 50).astype(np.int32),
            sequence=(first + place // CONTEXT).astype(np.int64),
            position=(place % CONTEXT).astype(np.int32),
        )

    def _acts(
        self, block: int, rows: int, hook: HookSpec
    ) -> "np.ndarray[tuple[int, int], np.dtype[np.generic]]":
        salt = zlib.crc32(hook.name.encode())
        directions = np.random.default_rng(salt).standard_normal((2 * hook.d_in, hook.d_in))
        random = np.random.default_rng([salt, block])
        strengths = random.random((rows, len(directions))) * (random.random((rows, len(directions))) < 0.1)
        acts = strengths @ directions + 0.05 * random.standard_normal((rows, hook.d_in)) + 0.3
        return acts.astype(np.float32).astype(BFLOAT16)


def laid_out(manifest: Manifest, index: int, chunk: Chunk) -> dict[str, npt.NDArray[np.generic]]:
    """A chunk's arrays as they are stored, by path."""
    order = permutation(chunk.rows, manifest.seed, "chunk", index)
    return {spec.path: arranged(spec, chunk, order) for spec in dataset_arrays(manifest)}


def write_dataset(
    directory: Path | str,
    manifest: Manifest | None = None,
    indices: Iterable[int] | None = None,
    indexed: bool = False,
) -> Dataset:
    """Write chunks of a synthetic dataset (all of them by default) and open it.

    Args:
        indexed: leave it as finished producers do, with index blocks.
    """
    manifest = manifest or make_manifest()
    store = open_store(str(directory))
    writer = DatasetWriter(store, manifest)
    source = SyntheticSource(manifest)
    for index in range(manifest.n_chunks) if indices is None else indices:
        writer.write(index, source.chunk(index))
    if indexed:
        index_dataset(writer)
    writer.close()
    return Dataset(store, manifest)


def index_dataset(writer: DatasetWriter) -> None:
    """Write the index blocks that are due."""
    for block in list_commits(writer.store, writer.manifest.n_chunks).unindexed:
        index_block(writer.store, writer.manifest, block, writer.pool)
