"""Rows of your own as a dataset: of any model, in any framework, or of no model at all.

    store_rows("mine/dataset", name="my-model", version="checkpoint 7", hooks={"hidden": 64},
               rows=[4096] * 8, make=lambda index: {"hidden": activations_of(index)})

It needs neither Redis nor a config. Chunks that are there are not made again: called again after anything,
it makes the others. Any number of processes may do so at the same time; who is first with a chunk wins.
Sources of a more particular kind give `produce_from` a manifest and chunks that they lay out themselves.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.common.errors import DataError, UserError
from penstock.common.process import worker_name
from penstock.store.arrays import BFLOAT16, BLOSC, PLAIN
from penstock.store.chunks import Array, Chunk
from penstock.store.commits import list_commits
from penstock.store.dataset import Dataset
from penstock.store.index import index_block
from penstock.store.layout import FORMAT_VERSION, commit_key
from penstock.store.manifest import OWN, CorpusPin, HookSpec, Manifest, Numerics, SourcePin
from penstock.store.objects import MAX_CREATE_BYTES, open_store
from penstock.store.writer import DatasetWriter

if TYPE_CHECKING:
    from penstock.producer.source import Source

MakeRows = Callable[[int], Mapping[str, Any]]
"""Chunk index -> {hook point: [rows, d_in] values that NumPy or torch can turn into float32}."""

_NOT_STATED = "not stated"


def store_rows(
    url: str,
    *,
    name: str,
    version: str,
    hooks: Mapping[str, int],
    rows: Sequence[int],
    make: MakeRows,
    description: str = "rows of their maker's own",
    rows_per_sequence: int = 1,
    seed: int = 0,
    compress: bool = False,
    check: bool = False,
) -> Dataset:
    """Store rows as a dataset, or carry on storing them.

    Args:
        url: where: a path or s3://bucket/prefix.
        name: what made the rows.
        version: anything that tells these rows from others of that name: a checkpoint, a digest. A dataset of
            another version is never added to.
        hooks: hook point -> d_in.
        rows: rows of each chunk, the unit in which they are made, stored and mixed; a few thousand are good.
        make: gives a chunk's rows, for its index: the same rows whenever it is asked, because a chunk that
            was lost half-way is asked for again. Stored as bfloat16, rounded to nearest.
        description: what the rows are of, in one line.
        rows_per_sequence: this many consecutive rows of a chunk belong together; how well they are mixed is
            told by that.
        seed: of the order of rows inside each chunk.
        compress: store about a third less, without loss.
        check: look at the chunks that are there, too, and make those again that are damaged.

    Returns:
        The dataset, complete.

    Raises:
        UserError: an argument does not do, or `make` gave other rows than it should.
        PlanMismatch: the URL holds other rows.
        ModelError: rows are not finite.
    """
    manifest = plan_rows(
        name, version, hooks, rows, description, rows_per_sequence, seed, BLOSC if compress else PLAIN
    )
    return produce_from(url, manifest, _Made(manifest, make), check)


def produce_from(url: str, manifest: Manifest, source: "Source", check: bool = False) -> Dataset:
    """Make every chunk of a dataset that is not there; see `store_rows`."""
    store = open_store(url)
    store.probe()
    writer, worker = DatasetWriter(store, manifest), worker_name("producer")
    try:
        manifest = writer.manifest
        dataset = Dataset(store, manifest)
        for index in range(manifest.n_chunks):
            if not store.exists(commit_key(index)):
                writer.write(index, source.chunk(index), worker)
            elif check and not _is_whole(dataset, index) and not writer.mend(index, source.chunk(index)):
                raise UserError(
                    f"{url}: chunk {index} is damaged, and what was made again is not what it was"
                )
        for block in list_commits(store, manifest.n_chunks).unindexed:
            index_block(store, manifest, block, writer.pool)
    finally:
        writer.close()
    return Dataset(store, manifest)


def _is_whole(dataset: Dataset, index: int) -> bool:
    try:
        dataset.read_chunk(index)
    except DataError:
        return False
    return True


def plan_rows(
    name: str,
    version: str,
    hooks: Mapping[str, int],
    rows: Sequence[int],
    description: str,
    rows_per_sequence: int,
    seed: int,
    codec: str,
) -> Manifest:
    """The manifest of such a dataset; see `store_rows`.

    Raises:
        UserError: an argument does not do.
    """
    _check(hooks, rows, rows_per_sequence)
    digest = hashlib.sha256(f"{name}\n{version}\n".encode()).hexdigest()
    most = max(rows)
    per_chunk = -(-most // rows_per_sequence)
    libraries = _NOT_STATED
    if codec != PLAIN:
        from importlib.metadata import version as installed

        libraries = f"numcodecs {installed('numcodecs')}"
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus=CorpusPin(
            digest=digest,
            description=description,
            first_sequence=0,
            n_sequences=per_chunk * len(rows),
            context=rows_per_sequence,
            tokenizer_sha256="none",
            special_ids=[],
            bos="none",
            held_out_rule="none: nothing is held out",
        ),
        source=SourcePin(kind=OWN, name=name, revision=version, weights_sha256=digest, drop_special=False),
        numerics=Numerics(
            device=_NOT_STATED,
            torch=_NOT_STATED,
            threads=0,
            compute_dtype=_NOT_STATED,
            attention=_NOT_STATED,
            capture=_NOT_STATED,
            libraries=libraries,
            sequences_per_forward=per_chunk,
            allow_mixed=False,
        ),
        hooks=[HookSpec(name=hook, d_in=width) for hook, width in hooks.items()],
        sequences_per_chunk=per_chunk,
        rows_per_chunk=most,
        rows=list(rows),
        seed=seed,
        codec=codec,
        retention="keep",
    )


def _check(hooks: Mapping[str, int], rows: Sequence[int], rows_per_sequence: int) -> None:
    if not hooks:
        raise UserError("hooks: give at least one hook point and its width")
    for hook, width in hooks.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", hook):
            raise UserError(f"hooks: {hook!r} must consist of letters, digits, '.', '_' and '-'")
        if width < 1:
            raise UserError(f"hooks: {hook}: d_in is {width}; it must be positive")
    if not rows or min(rows) < 1:
        raise UserError("rows: give the number of rows of each chunk, each of them positive")
    if rows_per_sequence < 1:
        raise UserError(f"rows_per_sequence: {rows_per_sequence}; it must be positive")
    largest = 2 * max(rows) * max(hooks.values())
    if largest >= MAX_CREATE_BYTES - 1024:
        raise UserError(
            f"rows: {max(rows)} rows of {max(hooks.values())} make objects of {largest / 2**20:.0f} MiB; "
            "they must stay under 64 MiB: make smaller chunks"
        )


class _Made:
    """Chunks of what a function gives."""

    def __init__(self, manifest: Manifest, make: MakeRows) -> None:
        self._manifest = manifest
        self._make = make

    def chunk(self, index: int) -> Chunk:
        manifest, made = self._manifest, self._make(index)
        wanted = {hook.name: (manifest.rows[index], hook.d_in) for hook in manifest.hooks}
        if made.keys() != wanted.keys():
            raise UserError(f"make({index}) gave {sorted(made)}; the hook points are {sorted(wanted)}")
        acts = {hook: _as_stored(made[hook]) for hook in wanted}
        for hook, shape in wanted.items():
            if acts[hook].shape != shape:
                raise UserError(
                    f"make({index}): {hook} is {list(acts[hook].shape)}; it must be {list(shape)}"
                )
        place = np.arange(manifest.rows[index])
        sequence, position = np.divmod(place, manifest.context)
        return Chunk(
            index=index,
            acts=acts,
            tokens=np.zeros(len(place), np.int32),
            sequence=(sequence + index * manifest.sequences_per_chunk).astype(np.int64),
            position=position.astype(np.int32),
        )


def _as_stored(values: Any) -> Array:
    if hasattr(values, "detach"):  # a torch tensor; its bfloat16 is none that NumPy knows
        values = values.detach().float().cpu().numpy()
    array = np.asarray(values)
    return array if array.dtype == BFLOAT16 else array.astype(np.float32).astype(BFLOAT16)
