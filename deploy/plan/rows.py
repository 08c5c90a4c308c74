"""How many rows there will be: from the corpus, or from the beginning of the text."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from penstock.common.errors import ConfigError
from penstock.deploy.config import Config
from penstock.store.objects import open_store

if TYPE_CHECKING:
    from penstock.store.corpus import Corpus
    from penstock.store.manifest import Manifest

SAMPLE_TOKENS = 2_000_000
"""Training tokens that are looked at where there is no corpus yet."""

Say = Callable[[str], None]


@contextmanager
def planning_corpus(config: Config, say: Say) -> "Iterator[tuple[Corpus, float]]":
    """The corpus, or one of the beginning of the text in a temporary directory, and the seconds it took."""
    from penstock.common.model.files import find_model, load_tokenizer
    from penstock.producer.corpus import ensure_corpus
    from penstock.store.layout import MANIFEST

    tokenizer = load_tokenizer(find_model(config.model))
    settings = config.corpus
    if open_store(settings.url).exists(MANIFEST):
        yield ensure_corpus(settings, tokenizer, lambda done, wanted: None), 0.0
        return
    say(f"no corpus at {settings.url} yet: tokenising text into a temporary directory")
    most = min(settings.max_tokens or SAMPLE_TOKENS, SAMPLE_TOKENS)
    with tempfile.TemporaryDirectory(prefix="penstock-plan-") as directory:
        update = {"url": directory, "max_tokens": most}
        started = time.perf_counter()
        corpus = ensure_corpus(settings.model_copy(update=update), tokenizer, lambda done, wanted: None)
        yield corpus, time.perf_counter() - started


def is_sample(config: Config, corpus: "Corpus") -> bool:
    """Whether a corpus is only the beginning of the text."""
    wanted, there = config.corpus.max_tokens, corpus.manifest
    lead = 1 if there.bos == "prepend" else 0
    full = (there.n_sequences + 1) * (there.context - lead) > SAMPLE_TOKENS
    return there.max_tokens == SAMPLE_TOKENS != wanted and full


def extrapolated(config: Config, manifest: "Manifest") -> "Manifest":
    """The plan for the whole text, from that for its beginning: rows per sequence stay what they are."""
    per_sequence = manifest.total_rows / manifest.corpus.n_sequences
    body = manifest.context - (1 if manifest.corpus.bos == "prepend" else 0)
    tokens, rows = config.corpus.max_tokens, config.dataset.max_rows
    if tokens is None and rows is None:
        raise ConfigError(
            "corpus.max_tokens: without it and dataset.max_rows, nobody knows how long the text is before it "
            "is tokenised; run `penstock corpus CONFIG` first, or set one of them"
        )
    sequences = None if tokens is None else -(-tokens // body)
    if sequences is None or (rows is not None and rows <= sequences * per_sequence):
        sequences = int((rows or 0) / per_sequence) + 1
    elif rows is not None:
        raise ConfigError(
            f"dataset.max_rows: {rows} rows are asked for, but the corpus gives about "
            f"{int(sequences * per_sequence)}; raise corpus.max_tokens or lower dataset.max_rows"
        )
    n, left = divmod(sequences, manifest.sequences_per_chunk)
    if rows is not None and left:
        n, left = n + 1, 0  # chunks are made whole
    counts = [manifest.sequences_per_chunk] * n + ([left] if left else [])
    pin = manifest.corpus.model_copy(update={"n_sequences": sum(counts)})
    return manifest.model_copy(
        update={"corpus": pin, "rows": [round(count * per_sequence) for count in counts]}
    )
