"""What a dataset, its runs and its corpus will take up: bytes and objects, from the plan alone.

Arrays and metadata are counted exactly as they will be stored. Records that carry measurements (commits,
heads, histories) are encoded once with figures of the usual length, so they are right to a few bytes each.
"""

from dataclasses import dataclass

import torch

from penstock.common.process import worker_name
from penstock.deploy.plan.probe import Probe
from penstock.deploy.plan.record import Plan
from penstock.deploy.plan.resolved import Resolved
from penstock.store.arrays import dataset_arrays, zarr_metadata
from penstock.store.commits import Commit, Moments, StoredObject
from penstock.store.heads import CHECKPOINTS_KEPT
from penstock.store.index import Columns, encode_block
from penstock.store.layout import ACTS, BLOCK_CHUNKS
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore
from penstock.store.records import Record, encode_record
from penstock.trainer.config import RunConfig
from penstock.trainer.sae import build

_FIGURE, _NUMBER, _TIME = 0.12345678901234567, 4_000_000_000, 1_700_000_000.1234567
_FIGURES_PER_SAE = 7
_HEADER = 600
"""Bytes of a checkpoint file's header."""


@dataclass(frozen=True)
class Size:
    """Bytes, and how many objects they are in."""

    bytes: int = 0
    objects: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.bytes + other.bytes, self.objects + other.objects)

    def times(self, n: int) -> "Size":
        return Size(n * self.bytes, n * self.objects)


def object_bytes(manifest: Manifest, ratios: dict[str, float]) -> dict[str, int]:
    """Stored bytes of one chunk's object, by array path.

    Args:
        ratios: per hook, stored bytes for each byte of a row, if activations are compressed.
    """
    found = {}
    for spec in dataset_arrays(manifest):
        raw = spec.chunk_rows * spec.dtype.itemsize
        for n in spec.chunk_shape[1:]:
            raw *= n
        found[spec.path] = int(raw * ratios.get(spec.path.removeprefix(ACTS), 1.0)) + 4
    return found


def metadata_size(manifest: Manifest, readers: int, url: str) -> Size:
    """Everything of a complete dataset but its arrays' chunks."""
    zarr = zarr_metadata(tuple(dataset_arrays(manifest)))
    moments = Moments(_FIGURE, _FIGURE, _FIGURE)
    index = manifest.n_chunks // 2
    stored = {path: StoredObject(size, _NUMBER) for path, size in object_bytes(manifest, {}).items()}
    commit = Commit(index, max(manifest.rows), stored, {hook.name: moments for hook in manifest.hooks})
    provenance: Record = {"index": index, "worker": worker_name("producer"), "time": _TIME}
    reader: Record = {"format_version": 1, "run": "r" * 20, "runs_url": url, "start": 0, "needs": index}
    return (
        Size(sum(map(len, zarr.values())), len(zarr))
        + Size(len(manifest.encode()), 1).times(2)
        + Size(len(encode_record(commit.record())), 1).times(manifest.n_chunks)
        + Size(len(encode_record(provenance)), 1).times(2 * manifest.n_chunks)
        + _index_size(manifest, commit)
        + Size(len(encode_record(reader)), 1).times(2 * readers)
    )


def _index_size(manifest: Manifest, commit: Commit) -> Size:
    columns, total = Columns.of(manifest), Size(0, 0)
    for first in range(0, manifest.n_chunks, BLOCK_CHUNKS):
        n = min(BLOCK_CHUNKS, manifest.n_chunks - first)
        total += Size(len(encode_block(columns, [commit] * n)), 1)
    return total


def stored_size(store: ObjectStore) -> Size:
    """What lies below a store's URL now."""
    sizes = [size for _, size in store.list("")]
    return Size(sum(sizes), len(sizes))


def weight_bytes(run: RunConfig) -> int:
    """Bytes of the weights of a run's SAEs."""
    total = 0
    for sae in run.settings.saes:
        with torch.device("meta"):
            module = build(run.widths[sae.hook_name], sae, run.widths[sae.hooks[-1]])
        total += sum(p.numel() * p.element_size() for p in module.parameters())
    return total


def run_size(run: RunConfig) -> Size:
    """A finished run that no worker had to take over: config, heads, history and kept checkpoints."""
    settings, windows = run.settings, len(run.windows)
    heads = -(-windows // settings.head_interval)
    files = 2 * len(settings.saes)
    dead = 8 * sum(sae.d_sae for sae in settings.saes)
    checkpoint = Size(3 * weight_bytes(run) + dead + files * _HEADER, files)
    # names of figures, figures, and of each file its key, size and SHA-256
    figures = sum(len(sae.name) + 40 * _FIGURES_PER_SAE for sae in settings.saes)
    head = Size(400 + figures + sum(2 * (len(sae.name) + 220) for sae in settings.saes), 1)
    point = Size(150 + figures, 0)
    config = Size(len(encode_record(run.model_dump(mode="json"))), 1)
    imported = Size(sum(pin.size for pin in run.initial.values()), len(run.initial))
    return (
        (config + imported).times(2)
        + checkpoint.times(min(CHECKPOINTS_KEPT, heads))
        + (head.times(heads + 1) + point.times(windows) + Size(60, 1).times(heads)).times(2)
    )


def count(what: Resolved, plan: Plan, found: Probe | None) -> None:
    """Rows, bytes and objects."""
    manifest, ratios = what.manifest, {} if found is None else found.ratios
    plan.rows, plan.chunks = manifest.total_rows, manifest.n_chunks
    plan.sequences_per_chunk = manifest.sequences_per_chunk
    sizes = object_bytes(manifest, ratios)
    for hook in manifest.hooks:
        size = manifest.n_chunks * sizes.pop(f"acts/{hook.name}")
        plan.hooks[hook.name] = {"d_in": hook.d_in, "bytes": size, "objects": manifest.n_chunks}
    acts = Size(sum(hook["bytes"] for hook in plan.hooks.values()), len(plan.hooks) * manifest.n_chunks)
    origins = Size(sum(sizes.values()), len(sizes)).times(manifest.n_chunks)
    metadata = metadata_size(manifest, len(what.runs), what.config.runs_url)
    if what.config.toy is not None:
        from penstock.producer.toy import Toy

        metadata += Size(len(Toy(what.config.toy).truth.encode()), 1).times(2)
    corpus = Size() if what.tokens is None else stored_size(what.tokens.store)
    if plan.estimated:
        share = manifest.corpus.n_sequences / what.corpus.manifest.n_sequences
        corpus = Size(int(corpus.bytes * share), int(corpus.objects * share))
    runs = sum((run_size(run) for run in what.runs.values()), Size())
    parts = {"activations": acts, "tokens, sequence, position": origins, "metadata": metadata}
    parts |= {"dataset": acts + origins + metadata, "corpus": corpus, "runs": runs}
    plan.parts = {name: _told(size) for name, size in parts.items()}
    plan.total = _told(acts + origins + metadata + corpus + runs)
    if manifest.retention == "window" and what.config.dataset.budget_bytes:
        plan.at_once = min(what.config.dataset.budget_bytes, (acts + origins).bytes)


def _told(size: Size) -> dict[str, int]:
    return {"bytes": size.bytes, "objects": size.objects}
