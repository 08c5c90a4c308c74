"""A corpus as stored: packed token sequences, permuted once, in checksummed blocks.

<corpus url>/manifest.json       written last; its digest stands for the whole corpus
<corpus url>/documents.json      the documents' names
<corpus url>/corpus.zarr/        for each of train/ and held_out/:
    tokens    int32 [n_sequences, context]
    document  int32 [n_sequences, context]   index into documents.json; −1 for a sequence's BOS
    special   int32 [n_sequences]            special tokens in each sequence
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from penstock.common.errors import DamagedObject, ObjectMissing, PlanMismatch
from penstock.store.arrays import (
    ArraySpec,
    create_arrays,
    decode_payload,
    encode_payload,
    payload_checksum,
)
from penstock.store.layout import CORPUS_ARRAYS, DOCUMENTS, FORMAT_VERSION, MANIFEST
from penstock.store.manifest import check_format, describe_difference
from penstock.store.objects import ObjectStore, open_store
from penstock.store.records import crc32c, decode_record, encode_record

BLOCK_SEQUENCES = 1024
"""Sequences in one block: one Zarr chunk per array."""

TRAIN, HELD_OUT = "train", "held_out"


class CorpusManifest(BaseModel):
    """What a corpus is.

    `blocks[array]` holds the crc32c of the values of each of the array's blocks, `content_sha256` is over
    all stored blocks in order: by it the manifest's digest stands for every token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: int
    description: str
    revision: str | None
    tokenizer_sha256: str
    special_ids: list[int]
    bos: str
    context: PositiveInt
    seed: int
    held_out_rule: str
    max_tokens: int | None
    max_held_out_tokens: int | None
    n_sequences: NonNegativeInt
    n_held_out: NonNegativeInt
    n_documents: NonNegativeInt
    block_sequences: PositiveInt
    blocks: dict[str, list[int]]
    content_sha256: str
    documents_crc32c: int

    def encode(self) -> bytes:
        return encode_record(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's bytes, hexadecimal."""
        return hashlib.sha256(self.encode()).hexdigest()


@dataclass(frozen=True)
class PackedText:
    """Packed sequences of one split: tokens and document [n, context], special [n], all int32."""

    tokens: npt.NDArray[np.int32]
    document: npt.NDArray[np.int32]
    special: npt.NDArray[np.int32]


class Corpus:
    """Read access to a stored corpus."""

    def __init__(self, store: ObjectStore, manifest: CorpusManifest) -> None:
        self.store = store
        self.manifest = manifest

    def tokens(self, start: int, stop: int, split: str = TRAIN) -> npt.NDArray[np.int32]:
        """[stop − start, context] token ids of consecutive sequences, checked."""
        return self._read(split, "tokens", start, stop)

    def special_counts(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """[stop − start] special tokens in each training sequence."""
        return self._read(TRAIN, "special", start, stop)

    def n_sequences(self, split: str) -> int:
        return self.manifest.n_sequences if split == TRAIN else self.manifest.n_held_out

    def documents(self) -> list[str]:
        """The documents' names; `document` arrays index into it."""
        data = self.store.get(DOCUMENTS)
        if crc32c(data) != self.manifest.documents_crc32c:
            raise DamagedObject(f"{self.store.url}/{DOCUMENTS} is damaged: build the corpus again")
        paths = decode_record(data, DOCUMENTS).get("paths")
        if not isinstance(paths, list):
            raise DamagedObject(f"{self.store.url}/{DOCUMENTS} is not a list of documents")
        return paths

    def _read(self, split: str, name: str, start: int, stop: int) -> npt.NDArray[np.int32]:
        if not 0 <= start <= stop <= self.n_sequences(split):
            raise ValueError(f"sequences {start}…{stop} of {self.n_sequences(split)} {split} ones")
        spec = next(s for s in corpus_arrays(self.manifest) if s.path == f"{split}/{name}")
        size = self.manifest.block_sequences
        parts = []
        for block in range(start // size, -(-stop // size)):
            rows = self.block(spec, block)
            parts.append(rows[max(0, start - block * size) : stop - block * size])
        return np.concatenate(parts) if parts else np.zeros((0, *spec.shape[1:]), np.int32)

    def block(self, spec: ArraySpec, block: int) -> npt.NDArray[np.int32]:
        """One stored block of an array, checked against the manifest."""
        key = spec.key(CORPUS_ARRAYS, block)
        data = self.store.get(key)
        name = f"{self.store.url}/{key}"
        rows = decode_payload(data, spec.dtype, spec.chunk_shape, name).view(np.int32)
        if payload_checksum(data) != self.manifest.blocks[spec.path][block]:
            raise DamagedObject(f"{name} is damaged: it is not the block that belongs there")
        return rows


def open_corpus(url: str) -> Corpus:
    """Open a corpus read-only.

    Raises:
        ObjectMissing: there is none, or it is not complete.
        DamagedObject: its manifest is damaged.
    """
    store = open_store(url)
    record = store.get_record(MANIFEST)
    check_format(record, f"{store.url}/{MANIFEST}")
    try:
        manifest = CorpusManifest.model_validate(record)
    except ValidationError as error:
        raise DamagedObject(f"{store.url}/{MANIFEST} is not a corpus manifest") from error
    size = manifest.block_sequences
    planned = {spec.path: -(-spec.shape[0] // size) for spec in corpus_arrays(manifest)}
    if {path: len(checksums) for path, checksums in manifest.blocks.items()} != planned:
        raise DamagedObject(
            f"{store.url}/{MANIFEST} is not a corpus manifest: its blocks are not its arrays'"
        )
    return Corpus(store, manifest)


def write_corpus(
    store: ObjectStore,
    plan: dict[str, object],
    splits: dict[str, PackedText],
    documents: list[str],
) -> CorpusManifest:
    """Store a packed corpus; the manifest comes last and makes it visible.

    Args:
        plan: the manifest's descriptive fields.
        splits: `train` and `held_out`.
        documents: names of the documents that `document` arrays index.

    Raises:
        PlanMismatch: the URL holds another corpus.
    """
    specs, blocks, content = [], {}, hashlib.sha256()
    payloads = dict(_payloads(splits, documents))
    for split, packed in splits.items():
        for name in ("tokens", "document", "special"):
            spec = _array(f"{split}/{name}", getattr(packed, name).shape, BLOCK_SEQUENCES)
            specs.append(spec)
            n_blocks = -(-spec.shape[0] // BLOCK_SEQUENCES)
            stored = [payloads[spec.key(CORPUS_ARRAYS, block)] for block in range(n_blocks)]
            blocks[spec.path] = [payload_checksum(data) for data in stored]
            for data in stored:
                content.update(data)
    manifest = CorpusManifest.model_validate(
        plan
        | {
            "format_version": FORMAT_VERSION,
            "n_sequences": len(splits[TRAIN].tokens),
            "n_held_out": len(splits[HELD_OUT].tokens),
            "n_documents": len(documents),
            "block_sequences": BLOCK_SEQUENCES,
            "blocks": blocks,
            "content_sha256": content.hexdigest(),
            "documents_crc32c": crc32c(payloads[DOCUMENTS]),
        }
    )
    create_arrays(store, CORPUS_ARRAYS, specs)
    for key, data in payloads.items():
        if not store.create(key, data) and store.get(key) != data:
            raise PlanMismatch(
                f"{store.url} holds parts of another corpus ({key}); remove it or choose another url"
            )
    if not store.create_guarded(MANIFEST, manifest.model_dump(mode="json")):
        there = open_corpus(store.url).manifest
        if there != manifest:
            raise PlanMismatch(
                f"{store.url} holds another corpus: {describe_difference(there, manifest)}; "
                "choose another corpus url"
            )
    return manifest


def mend_corpus(corpus: Corpus, splits: dict[str, PackedText], documents: list[str]) -> int:
    """Make a corpus whole again from its text, packed anew; returns how many objects were written.

    Raises:
        PlanMismatch: the text is not the one that the corpus was made of; nothing was written.
    """
    store, wanted = corpus.store, dict(_payloads(splits, documents))
    for spec in corpus_arrays(corpus.manifest):
        for block, checksum in enumerate(corpus.manifest.blocks[spec.path]):
            data = wanted.get(spec.key(CORPUS_ARRAYS, block))
            if data is None or payload_checksum(data) != checksum:
                raise PlanMismatch(f"{store.url}: the text is not the one that this corpus was made of")
    if crc32c(wanted[DOCUMENTS]) != corpus.manifest.documents_crc32c:
        raise PlanMismatch(f"{store.url}: the documents are not those that this corpus was made of")
    broken = [key for key, data in wanted.items() if _stored(store, key) != data]
    for key in broken:
        store.put(key, wanted[key])
    return len(broken)


def _stored(store: ObjectStore, key: str) -> bytes | None:
    try:
        return store.get(key)
    except ObjectMissing:
        return None


def _payloads(splits: dict[str, PackedText], documents: list[str]) -> Iterator[tuple[str, bytes]]:
    """Key -> bytes of every object of a corpus but the manifest and the Zarr metadata."""
    yield DOCUMENTS, encode_record({"format_version": FORMAT_VERSION, "paths": documents})
    for split, packed in splits.items():
        for name in ("tokens", "document", "special"):
            array = getattr(packed, name)
            spec = _array(f"{split}/{name}", array.shape, BLOCK_SEQUENCES)
            for start in range(0, len(array), BLOCK_SEQUENCES):
                block = np.zeros(spec.chunk_shape, np.int32)
                part = array[start : start + BLOCK_SEQUENCES]
                block[: len(part)] = part
                yield spec.key(CORPUS_ARRAYS, start // BLOCK_SEQUENCES), encode_payload(block)


def _array(path: str, shape: tuple[int, ...], block_sequences: int) -> ArraySpec:
    names = ("sequence", "position") if len(shape) == 2 else ("sequence",)
    split = path.split("/")[0]
    dimension_names = (f"{split}_{names[0]}", *names[1:])
    return ArraySpec(path, shape, block_sequences, np.dtype(np.int32), dimension_names)


def corpus_arrays(manifest: CorpusManifest) -> list[ArraySpec]:
    """All arrays of a corpus."""
    counts = {TRAIN: manifest.n_sequences, HELD_OUT: manifest.n_held_out}
    size = manifest.block_sequences
    specs = []
    for split, n in counts.items():
        specs.append(_array(f"{split}/tokens", (n, manifest.context), size))
        specs.append(_array(f"{split}/document", (n, manifest.context), size))
        specs.append(_array(f"{split}/special", (n,), size))
    return specs
