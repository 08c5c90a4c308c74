"""Very many committed chunks in seconds: index blocks are written outright, commits only where wanted."""

from collections.abc import Iterable
from functools import cache

import numpy as np

from penstock.store.arrays import CRC_BYTES, dataset_arrays
from penstock.store.commits import Commit, Moments, StoredObject, create_commit
from penstock.store.index import Columns, encode_block
from penstock.store.layout import BLOCK_CHUNKS, MANIFEST, block_range, index_key
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore
from services.synthetic import WIDTHS, make_manifest


def big_manifest(n_chunks: int, hooks: dict[str, int] | None = None) -> Manifest:
    """The plan of very many chunks, whose rows differ."""
    return make_manifest([190 + (7 * index) % 21 for index in range(n_chunks)], hooks or WIDTHS)


def made_up_commit(manifest: Manifest, index: int) -> Commit:
    """A commit as a chunk might have it; there are no objects behind it."""
    sizes = _sizes(manifest.rows_per_chunk, tuple((hook.name, hook.d_in) for hook in manifest.hooks))
    draw = index * 2_654_435_761
    return Commit(
        index=index,
        rows=manifest.rows[index],
        objects={
            path: StoredObject(size, (draw + place * 40_503) % 2**32)
            for place, (path, size) in enumerate(sizes.items())
        },
        moments={
            hook.name: Moments(1 + draw % (97 + place) / 7, 2 + draw % 89 / 11, 3 + draw % 83 / 13)
            for place, hook in enumerate(manifest.hooks)
        },
    )


@cache
def _sizes(rows_per_chunk: int, hooks: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """Array path -> bytes of a chunk's object."""
    plan = make_manifest([1], dict(hooks)).model_copy(update={"rows_per_chunk": rows_per_chunk})
    specs = dataset_arrays(plan)
    return {spec.path: int(np.prod(spec.chunk_shape)) * spec.dtype.itemsize + CRC_BYTES for spec in specs}


def write_big(store: ObjectStore, manifest: Manifest, tail: Iterable[int] = ()) -> None:
    """A dataset all of whose full blocks are indexed, and of the rest the commits in `tail`."""
    store.put_guarded(MANIFEST, manifest.model_dump(mode="json"))
    columns = Columns.of(manifest)
    for block in range(manifest.n_chunks // BLOCK_CHUNKS):
        chunks = block_range(block, manifest.n_chunks)
        data = encode_block(columns, [made_up_commit(manifest, index) for index in chunks])
        store.create(index_key(block), data)
    for index in tail:
        create_commit(store, made_up_commit(manifest, index))
