"""Building a corpus: documents, tokenised once, packed into sequences, permuted by seed.

Files are taken in an order drawn from the seed (rows of a dataset in their own) and joined, each followed
by the end-of-text token; the stream is cut into sequences of `context` tokens, each starting with BOS if so
configured. A sequence may thus hold parts of several documents; `document` says which. The rest that does
not fill a sequence is left out. Held-out documents are packed likewise, apart.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from penstock.common.documents import (
    HELD_OUT_RULE,
    Document,
    is_held_out,
    read_documents,
    standard_library_paths,
)
from penstock.common.errors import ConfigError, ObjectMissing, PlanMismatch, UserError
from penstock.common.model.files import LoadedTokenizer
from penstock.common.permutation import permutation
from penstock.common.settings import Settings
from penstock.producer.hub import TableText, dataset_documents, find_commit, is_commit
from penstock.producer.text import file_paths
from penstock.store.corpus import (
    HELD_OUT,
    TRAIN,
    Corpus,
    PackedText,
    mend_corpus,
    open_corpus,
    write_corpus,
)
from penstock.store.objects import open_store

NO_DOCUMENT = -1
"""`document` of a sequence's BOS, which belongs to none."""

_ENCODE_AT_ONCE = 64


class CorpusSettings(Settings):
    """Which text, and how it is packed."""

    url: str = "corpus"
    """Where the corpus is stored: a path (relative to workdir) or s3://…"""
    text: Literal["standard-library", "files", "dataset"] = "standard-library"
    """The running interpreter's own sources, files by pattern, or a Hugging Face dataset."""
    files: list[str] = []
    """Glob patterns of UTF-8 text files, for text: files."""
    dataset: str | None = None
    """Directory of a Hugging Face dataset, or its hub name (owner/name), for text: dataset."""
    dataset_config: str | None = None
    """Configuration of that dataset, where it has several."""
    split: str | None = None
    """Split of that dataset; null takes train, or the first one."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); the commit is what gets recorded, and counts from then on."""
    column: str = "text"
    """Column that holds the text, for text: dataset."""
    context: int = Field(256, ge=2)
    """Tokens per sequence, BOS included."""
    bos: Literal["prepend", "none"] = "prepend"
    """Whether each sequence starts with the model's BOS token."""
    max_tokens: int | None = Field(None, ge=1)
    """Stop after about this many training tokens; null takes all."""
    max_held_out_tokens: int | None = Field(200_000, ge=1)
    """Stop after about this many held-out tokens; null takes all."""
    seed: int = 0
    """Seed of the order of documents and of the permutation of sequences."""

    @model_validator(mode="after")
    def _has_its_source(self) -> Self:
        if self.text == "files" and not self.files:
            raise ValueError("files must list patterns when text is files")
        if self.text == "dataset" and not self.dataset:
            raise ValueError("dataset must name a directory or a hub dataset when text is dataset")
        for field in ("dataset_config", "split", "revision"):
            if self.text != "dataset" and getattr(self, field) is not None:
                raise ValueError(f"{field} goes with text: dataset")
        return self

    def description(self, commit: str | None = None) -> str:
        """One line for manifests and reports; nothing of this machine in it.

        Args:
            commit: of the hub's dataset, if the text is from there.
        """
        if self.text == "standard-library":
            return "Python standard library sources"
        if self.text == "files":
            return "files: " + ", ".join(Path(pattern).name for pattern in self.files)
        name = self.dataset or ""
        parts = [f"dataset: {name} at {commit[:12]}" if commit else f"dataset: {Path(name).name}"]
        parts += [f"config {self.dataset_config}"] if self.dataset_config else []
        parts += [f"split {self.split}"] if self.split else []
        return ", ".join([*parts, f"column {self.column}"])


Progress = Callable[[int, int | None], None]
"""Called with tokens done and tokens wanted (None: unknown)."""


def ensure_corpus(settings: CorpusSettings, tokenizer: LoadedTokenizer, progress: Progress) -> Corpus:
    """Open the corpus at the configured URL, building it if it is not there.

    Raises:
        PlanMismatch: the URL holds a corpus made with other settings.
        ConfigError: the text cannot be read, or gives too few tokens for one sequence.
        Unavailable: the hub does not answer.
    """
    store = open_store(settings.url)
    try:
        corpus = open_corpus(settings.url)
    except ObjectMissing:
        store.probe()
        commit = (
            find_commit(settings.dataset or "", settings.revision) if settings.text == "dataset" else None
        )
        names, splits = _pack_splits(settings, tokenizer, commit, progress)
        write_corpus(store, _plan(settings, tokenizer, commit), splits, names)
        return open_corpus(settings.url)
    _check_plan(settings, corpus, tokenizer)
    return corpus


def repack_corpus(settings: CorpusSettings, tokenizer: LoadedTokenizer, progress: Progress) -> int:
    """Make a damaged corpus whole again from its text; returns how many objects were written.

    Raises:
        PlanMismatch: settings or text are not those that it was made with.
    """
    corpus = open_corpus(settings.url)
    _check_plan(settings, corpus, tokenizer)
    names, splits = _pack_splits(settings, tokenizer, corpus.manifest.revision, progress)
    return mend_corpus(corpus, splits, names)


def _check_plan(settings: CorpusSettings, corpus: Corpus, tokenizer: LoadedTokenizer) -> None:
    there = corpus.manifest.model_dump()
    # a branch may have moved on since: the commit that was recorded counts
    commit = settings.revision if is_commit(settings.revision) else corpus.manifest.revision
    for field, value in _plan(settings, tokenizer, commit).items():
        if there[field] != value:
            raise PlanMismatch(
                f"{settings.url} holds another corpus: {field} is {there[field]} there and {value} here; "
                "choose another corpus.url"
            )


def _plan(settings: CorpusSettings, tokenizer: LoadedTokenizer, commit: str | None) -> dict[str, object]:
    return {
        "description": settings.description(commit),
        "revision": commit,
        "tokenizer_sha256": tokenizer.sha256,
        "special_ids": _special_ids(tokenizer),
        "bos": settings.bos,
        "context": settings.context,
        "seed": settings.seed,
        "held_out_rule": HELD_OUT_RULE,
        "max_tokens": settings.max_tokens,
        "max_held_out_tokens": settings.max_held_out_tokens,
    }


def _special_ids(tokenizer: LoadedTokenizer) -> list[int]:
    """The tokenizer's special tokens; BOS and end of text even if it does not mark them as such."""
    ends = {number for number in (tokenizer.bos_id, tokenizer.eos_id) if number is not None}
    return sorted(ends | set(tokenizer.special_ids))


def _documents(settings: CorpusSettings, commit: str | None) -> Generator[Document]:
    if settings.text == "dataset":
        table = (settings.dataset or "", settings.column, settings.dataset_config, settings.split, commit)
        yield from dataset_documents(TableText(*table))
        return
    standard = settings.text == "standard-library"
    paths = standard_library_paths() if standard else file_paths(settings.files)
    order = permutation(len(paths), settings.seed, "documents")
    yield from read_documents([paths[i] for i in order])


class _Stream:
    """Tokens of one split, growing until its limit."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.count = 0
        self.tokens: list[np.ndarray] = []
        self.documents: list[np.ndarray] = []

    @property
    def full(self) -> bool:
        return self.limit is not None and self.count >= self.limit

    def add(self, ids: list[int], document: int) -> None:
        self.tokens.append(np.asarray(ids, np.int32))
        self.documents.append(np.full(len(ids), document, np.int32))
        self.count += len(ids)


def _pack_splits(
    settings: CorpusSettings, tokenizer: LoadedTokenizer, commit: str | None, progress: Progress
) -> tuple[list[str], dict[str, PackedText]]:
    if settings.bos == "prepend" and tokenizer.bos_id is None:
        raise UserError("corpus.bos: the tokenizer has no BOS token; set corpus.bos to none")
    streams = {
        TRAIN: _Stream(settings.max_tokens),
        HELD_OUT: _Stream(settings.max_held_out_tokens),
    }
    names: list[str] = []
    batch: list[Document] = []

    def flush() -> None:
        for document, encoding in zip(
            batch,
            tokenizer.tokenizer.encode_batch_fast([d.text for d in batch], add_special_tokens=False),
            strict=True,
        ):
            stream = streams[HELD_OUT if is_held_out(document.path) else TRAIN]
            if stream.full:
                continue
            end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
            stream.add(encoding.ids + end, len(names))
            names.append(document.path)
        batch.clear()
        progress(streams[TRAIN].count, settings.max_tokens)

    with closing(_documents(settings, commit)) as documents:
        for document in documents:
            # held-out documents are few: do not tokenise the rest of a split that is full
            if streams[HELD_OUT if is_held_out(document.path) else TRAIN].full:
                continue
            batch.append(document)
            # what is left to read for a full training split is held-out documents, which are far between
            if len(batch) == _ENCODE_AT_ONCE or streams[TRAIN].full:
                flush()
                if all(stream.full for stream in streams.values()):
                    break
    flush()
    splits = {split: _pack(settings, tokenizer, stream, split) for split, stream in streams.items()}
    if not len(splits[TRAIN].tokens):
        raise ConfigError(
            f"corpus: the text gives {streams[TRAIN].count} tokens, fewer than one sequence of "
            f"{settings.context}; add text or lower corpus.context"
        )
    return names, splits


def _pack(settings: CorpusSettings, tokenizer: LoadedTokenizer, stream: _Stream, split: str) -> PackedText:
    lead = 1 if settings.bos == "prepend" else 0
    body = settings.context - lead
    tokens = np.concatenate(stream.tokens) if stream.tokens else np.zeros(0, np.int32)
    documents = np.concatenate(stream.documents) if stream.documents else np.zeros(0, np.int32)
    n = len(tokens) // body
    packed = np.full((n, settings.context), tokenizer.bos_id or 0, np.int32)
    owner = np.full((n, settings.context), NO_DOCUMENT, np.int32)
    packed[:, lead:] = tokens[: n * body].reshape(n, body)
    owner[:, lead:] = documents[: n * body].reshape(n, body)
    order = permutation(n, settings.seed, "corpus", split)
    packed, owner = packed[order], owner[order]
    special = np.isin(packed, _special_ids(tokenizer)).sum(axis=1, dtype=np.int32)
    return PackedText(packed, owner, special)
