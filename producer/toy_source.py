"""Toy data as a dataset: the plan, and the source of its chunks.

A sequence is a block of rows that are made together. Given the ground truth its rows are independent of each
other (with `draw: batch`, given its probabilities, too), so that nothing would be gained by mixing them.
"""

from collections.abc import Callable
from importlib.metadata import version

import numpy as np

from penstock.common.errors import ConfigError, nearest
from penstock.producer.plan import DatasetSettings, end_of_earlier, sequences_per_chunk
from penstock.producer.toy import READ, TARGET, Toy
from penstock.store.arrays import BFLOAT16, PLAIN
from penstock.store.chunks import Array, Chunk
from penstock.store.layout import FORMAT_VERSION
from penstock.store.manifest import TOY, CorpusPin, HookSpec, Manifest, Numerics, SourcePin

NONE = "none"


def plan_toy(settings: DatasetSettings, toy: Toy) -> Manifest:
    """Resolve settings to a manifest. What stands there for the corpus are the numbers of sequences.

    Raises:
        ConfigError: a hook point does not exist, max_rows is missing, or a chunk would be too large.
    """
    hooks = _hooks(settings, toy)
    if settings.max_rows is None:
        raise ConfigError("dataset.max_rows: toy data have no end of their own; say how many rows to make")
    context, width = toy.settings.rows_per_sequence, toy.settings.d_in
    digest = toy.truth.digest
    first = end_of_earlier(
        settings, digest, "this one's ground truth; toy data of the same settings go together"
    )
    per_chunk = sequences_per_chunk(settings, context, [width] * len(hooks))
    n_sequences = -(-settings.max_rows // context)
    per_chunk = min(per_chunk, n_sequences)
    whole, left = divmod(n_sequences, per_chunk)
    numpy = f"numpy {version('numpy')}"
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus=CorpusPin(
            digest=digest,
            description=describe(toy),
            first_sequence=first,
            n_sequences=n_sequences,
            context=context,
            tokenizer_sha256=NONE,
            special_ids=[],
            bos=NONE,
            held_out_rule="sequences drawn with keys of their own",
        ),
        source=SourcePin(kind=TOY, name=TOY, revision=None, weights_sha256=digest, drop_special=False),
        numerics=Numerics(
            device="any",
            torch=NONE,
            threads=0,
            compute_dtype="float32",
            attention=NONE,
            capture=NONE,
            libraries=numpy if settings.codec == PLAIN else f"{numpy}, numcodecs {version('numcodecs')}",
            sequences_per_forward=1,
            allow_mixed=settings.allow_mixed,
        ),
        hooks=[HookSpec(name=name, d_in=width) for name in hooks],
        sequences_per_chunk=per_chunk,
        rows_per_chunk=per_chunk * context,
        rows=[per_chunk * context] * whole + ([left * context] if left else []),
        seed=settings.seed,
        codec=settings.codec,
        retention=settings.retention,
    )


def describe(toy: Toy) -> str:
    """Toy data in one line."""
    s = toy.settings
    return f"toy data: {s.total_features} features in {s.d_in} dimensions, seed {s.seed}"


def _hooks(settings: DatasetSettings, toy: Toy) -> list[str]:
    for name in settings.hooks:
        if name not in (READ, TARGET):
            raise ConfigError(
                f"dataset.hooks: toy data have no {name!r}, only {READ} and {TARGET}."
                f"{nearest(name, [READ, TARGET])}"
            )
    if toy.settings.label_noise and TARGET not in settings.hooks:
        raise ConfigError(f"toy.label_noise: only {TARGET} has it; add {TARGET} to dataset.hooks")
    return list(dict.fromkeys(settings.hooks))


class ToySource:
    """Makes chunks of toy data: a pure function of (manifest, index).

    Args:
        progress: called after each sequence.
    """

    def __init__(self, manifest: Manifest, toy: Toy, progress: Callable[[], None] = lambda: None) -> None:
        self._manifest = manifest
        self._toy = toy
        self._progress = progress

    def chunk(self, index: int) -> Chunk:
        manifest, toy = self._manifest, self._toy
        first = manifest.corpus.first_sequence + index * manifest.sequences_per_chunk
        last = min(first + manifest.sequences_per_chunk, manifest.corpus.end)
        context, rows = manifest.context, manifest.rows[index]
        acts: dict[str, Array] = {hook.name: np.empty((rows, hook.d_in), BFLOAT16) for hook in manifest.hooks}
        for place, sequence in enumerate(range(first, last)):
            made = toy.rows(sequence)
            for name, out in acts.items():
                out[place * context : (place + 1) * context] = made[name].astype(BFLOAT16)
            self._progress()
        return Chunk(
            index=index,
            acts=acts,
            tokens=np.zeros(rows, np.int32),
            sequence=np.repeat(np.arange(first, last, dtype=np.int64), context),
            position=np.tile(np.arange(context, dtype=np.int32), last - first),
        )
