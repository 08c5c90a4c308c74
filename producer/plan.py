"""From settings, corpus and model to the manifest: every number a dataset depends on."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from penstock.common.errors import ConfigError, ObjectMissing
from penstock.common.settings import Settings
from penstock.producer.memory import bytes_held
from penstock.store.arrays import PLAIN
from penstock.store.corpus import Corpus
from penstock.store.layout import FORMAT_VERSION
from penstock.store.manifest import (
    LANGUAGE_MODEL,
    CorpusPin,
    HookSpec,
    Manifest,
    Numerics,
    SourcePin,
    load_manifest,
)
from penstock.store.objects import MAX_CREATE_BYTES, open_store

if TYPE_CHECKING:
    from penstock.common.model.language_model import LanguageModel

TARGET_OBJECT_BYTES = 32 * 1024 * 1024
"""Chunks are sized so that the largest object stays below this."""


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class DatasetSettings(Settings):
    """Which activations are stored, and how."""

    url: str = "dataset"
    """Where the dataset is stored: a path (relative to workdir) or s3://…"""
    hooks: list[str] = Field(min_length=1)
    """Hook points, TransformerLens names or patterns (`blocks.*.hook_resid_post`), from one forward pass."""
    after: Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])] = []
    """URL or URLs of earlier datasets of the same corpus: this one begins where the last of them ends."""
    max_rows: int | None = Field(None, ge=1)
    """Plan about this many rows at least; null uses all that the corpus has left."""
    sequences_per_chunk: int | None = Field(None, ge=1)
    """Sequences in one chunk; null chooses so that the largest object is at most 32 MiB and memory_bytes
    suffices."""
    memory_bytes: int = Field(4_000_000_000, ge=1)
    """Bytes of chunks that a producer may hold at a time; the model and its forward pass come on top."""
    sequences_per_forward: int = Field(16, ge=1)
    """Sequences in one forward pass. Bits depend on it."""
    drop_special: bool = True
    """Leave out rows of special tokens: BOS, end of text, padding."""
    seed: int = 0
    """Seed of the order of rows inside each chunk."""
    codec: Literal["bytes+crc32c", "bytes+blosc+crc32c"] = "bytes+crc32c"
    """How activations are stored: as they are, or compressed by about a third without loss."""
    retention: Literal["keep", "window"] = "keep"
    """Whether chunks stay, or are deleted once every submitted run has read them."""
    budget_bytes: int | None = Field(None, ge=1)
    """Bytes of chunks that may lie ahead of the slowest run, for retention: window."""
    quota_bytes: int | None = Field(None, ge=1)
    """Refuse to begin a dataset that would take more bytes than this."""
    detach_after_hours: float | None = Field(None, gt=0)
    """Detach a run that committed no head for this long, for retention: window; null never does."""
    allow_mixed: bool = False
    """Accept producers whose numerics (device, torch, threads) differ; bits may then differ."""

    @model_validator(mode="after")
    def _has_its_budget(self) -> Self:
        if self.retention == "window" and self.budget_bytes is None:
            raise ValueError("budget_bytes must be set when retention is window")
        if self.retention == "keep" and self.budget_bytes is not None:
            raise ValueError("budget_bytes goes with retention: window; quota_bytes limits a kept dataset")
        return self


def plan_dataset(settings: DatasetSettings, corpus: Corpus, model: "LanguageModel") -> Manifest:
    """Resolve settings to a manifest.

    Raises:
        ConfigError: the corpus does not fit the model or is used up, or a chunk would be too large.
        ModelError: a hook point does not exist.
    """
    if corpus.manifest.context > model.context:
        raise ConfigError(
            f"corpus.context: {corpus.manifest.context} tokens, but {model.files.name} reads at most "
            f"{model.context}"
        )
    hooks = model.resolve(settings.hooks)
    widths = model.widths(hooks)
    sequences = sequences_per_chunk(settings, corpus.manifest.context, list(widths.values()))
    first = first_sequence(settings, corpus)
    rows = _rows(settings, corpus, first, sequences)
    n_sequences = min(len(rows) * sequences, corpus.manifest.n_sequences - first)
    lead = 1 if settings.drop_special and corpus.manifest.bos == "prepend" else 0
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus=CorpusPin(
            digest=corpus.manifest.digest,
            description=corpus.manifest.description,
            first_sequence=first,
            n_sequences=n_sequences,
            context=corpus.manifest.context,
            tokenizer_sha256=corpus.manifest.tokenizer_sha256,
            special_ids=corpus.manifest.special_ids,
            bos=corpus.manifest.bos,
            held_out_rule=corpus.manifest.held_out_rule,
        ),
        source=SourcePin(
            kind=LANGUAGE_MODEL,
            name=model.files.label,
            revision=model.files.revision,
            weights_sha256=model.files.weights_sha256(),
            drop_special=settings.drop_special,
        ),
        numerics=numerics(model, settings, hooks),
        hooks=[HookSpec(name=name, d_in=widths[name]) for name in hooks],
        sequences_per_chunk=sequences,
        rows_per_chunk=sequences * (corpus.manifest.context - lead),
        rows=rows,
        seed=settings.seed,
        codec=settings.codec,
        retention=settings.retention,
    )


def numerics(model: "LanguageModel", settings: DatasetSettings, hooks: list[str]) -> Numerics:
    """What the bits of this process's activations, and of the objects that hold them, depend on."""
    # not above: settings are read by processes that have no use for torch
    import torch

    from penstock.common.device import device_kind

    libraries = ["transformer-lens", "transformers"]
    if settings.codec != PLAIN:
        libraries.append("numcodecs")  # carries the compressor
    return Numerics(
        device=device_kind(model.device),
        torch=torch.__version__,
        threads=torch.get_num_threads() if model.device.type == "cpu" else 0,
        compute_dtype=str(model.dtype).removeprefix("torch."),
        attention=model.attention,
        capture=model.way(hooks),
        # the bridge may compute attention itself, so its version matters as much as the model's code
        libraries=", ".join(f"{name} {version(name)}" for name in libraries),
        sequences_per_forward=settings.sequences_per_forward,
        allow_mixed=settings.allow_mixed,
    )


def sequences_per_chunk(settings: DatasetSettings, context: int, widths: list[int]) -> int:
    """As the settings say, or the largest power of two whose widest object stays within the target, and its
    chunk in memory.

    Args:
        context: rows of a sequence, at most.
        widths: of the hook points.

    Raises:
        ConfigError: an object would be too large.
    """
    sequences = settings.sequences_per_chunk or _fitting(settings, 2 * context, widths)
    largest = sequences * context * 2 * max(widths)
    if largest >= MAX_CREATE_BYTES - 1024:
        raise ConfigError(
            f"dataset.sequences_per_chunk: {sequences} makes objects of {largest / 2**20:.0f} MiB; "
            "they must stay under 64 MiB"
        )
    return sequences


def _fitting(settings: DatasetSettings, per_sequence: int, widths: list[int]) -> int:
    sequences = 1
    while 2 * sequences * per_sequence * max(widths) <= TARGET_OBJECT_BYTES:
        chunk, largest = (2 * sequences * per_sequence * d for d in (sum(widths), max(widths)))
        if bytes_held(chunk, largest, 1) > settings.memory_bytes:
            break
        sequences *= 2
    return sequences


def first_sequence(settings: DatasetSettings, corpus: Corpus) -> int:
    """The corpus sequence that a dataset begins at: where the last of those before it ends.

    Raises:
        ConfigError: an earlier dataset is not there or is of another corpus, or nothing is left.
    """
    at = f"which is at {corpus.store.url}; a dataset of another corpus needs no dataset.after"
    first = end_of_earlier(settings, corpus.manifest.digest, at)
    if first >= corpus.manifest.n_sequences:
        raise ConfigError(
            f"dataset.after: the datasets before it use all {corpus.manifest.n_sequences} sequences of the "
            "corpus; make a corpus of other text and a dataset of that"
        )
    return first


def end_of_earlier(settings: DatasetSettings, digest: str, hint: str) -> int:
    """Where the last of the datasets in `dataset.after` ends; 0 without any.

    Args:
        digest: of the corpus, which must be theirs, too.
        hint: what to say after naming both.

    Raises:
        ConfigError: one is not there or is of another corpus.
    """
    ends = [0]
    for url in settings.after:
        try:
            there = load_manifest(open_store(url)).corpus
        except ObjectMissing as error:
            try:
                # it was there when this dataset was begun, and may be gone since
                return load_manifest(open_store(settings.url)).corpus.first_sequence
            except ObjectMissing:
                raise ConfigError(f"dataset.after: no dataset at {url}; make it first") from error
        if there.digest != digest:
            raise ConfigError(
                f"dataset.after: {url} is of the corpus {there.digest[:12]} ({there.description}) and not of "
                f"{digest[:12]}, {hint}"
            )
        ends.append(there.end)
    return max(ends)


def _rows(settings: DatasetSettings, corpus: Corpus, first: int, sequences: int) -> list[int]:
    """Rows of each chunk: tokens less those dropped."""
    left = corpus.manifest.n_sequences - first
    kept = np.full(left, corpus.manifest.context, np.int64)
    if settings.drop_special:
        kept -= corpus.special_counts(first, first + left)
    rows = [int(kept[i : i + sequences].sum()) for i in range(0, left, sequences)]
    if settings.max_rows is None:
        return rows
    enough = int(np.searchsorted(np.cumsum(rows), settings.max_rows)) + 1
    if enough > len(rows):
        raise ConfigError(
            f"dataset.max_rows: {settings.max_rows} rows are asked for, but the corpus "
            f"{'has' if first else 'gives'} {sum(rows)}{' left' if first else ''}; add text, raise "
            "corpus.max_tokens or lower dataset.max_rows"
        )
    return rows[:enough]
