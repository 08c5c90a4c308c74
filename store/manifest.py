"""The dataset manifest: the resolved plan of a dataset, written once and never changed.

A chunk is a pure function of (manifest, index). Nothing in it says where or when it was made, so the
same plan gives the same bytes anywhere.
"""

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from penstock.common.errors import DamagedObject, OtherFormat, PlanMismatch, UserError
from penstock.common.settings import one_line
from penstock.store.layout import FORMAT_VERSION, MANIFEST
from penstock.store.objects import ObjectStore
from penstock.store.records import encode_record

LANGUAGE_MODEL, TOY, OWN = "language-model", "toy", "own"
"""What `source.kind` can be: which made the rows."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CorpusPin(_Part):
    """Which tokens: the corpus by its digest."""

    digest: str
    description: str
    first_sequence: NonNegativeInt
    """The first sequence of the permuted corpus that is used."""
    n_sequences: NonNegativeInt
    """Sequences used, from that one on."""
    context: PositiveInt
    tokenizer_sha256: str
    special_ids: list[int]
    bos: str
    held_out_rule: str

    @property
    def end(self) -> int:
        """The sequence after the last one used."""
        return self.first_sequence + self.n_sequences


class SourcePin(_Part):
    """What turns tokens into rows."""

    kind: str
    name: str
    revision: str | None
    weights_sha256: str
    drop_special: bool
    """Rows of special tokens (BOS, end of text, padding) are left out."""


class Numerics(_Part):
    """What the bits of an activation depend on besides weights and tokens."""

    device: str
    torch: str
    threads: NonNegativeInt
    compute_dtype: str
    attention: str
    capture: str
    """Where activations were taken: at the model's own modules, or through TransformerLens's bridge."""
    libraries: str
    """Versions of what runs the model's code."""
    sequences_per_forward: PositiveInt
    allow_mixed: bool


class HookSpec(_Part):
    """One captured hook point."""

    name: str
    d_in: PositiveInt


class Manifest(_Part):
    """The whole plan. `rows[i]` is the number of rows in chunk i."""

    format_version: int
    corpus: CorpusPin
    source: SourcePin
    numerics: Numerics
    hooks: list[HookSpec]
    sequences_per_chunk: PositiveInt
    rows_per_chunk: PositiveInt
    rows: list[NonNegativeInt]
    seed: int
    codec: str
    """How activations are stored; see `store/arrays.py`."""
    retention: Literal["keep", "window"]
    """Whether chunks stay, or are deleted once every registered run has read them."""

    @property
    def n_chunks(self) -> int:
        return len(self.rows)

    @property
    def total_rows(self) -> int:
        return sum(self.rows)

    @property
    def context(self) -> int:
        return self.corpus.context

    @property
    def of_text(self) -> bool:
        """Whether the rows are a language model's on a corpus."""
        return self.source.kind not in (TOY, OWN)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's bytes, hexadecimal."""
        return hashlib.sha256(self.encode()).hexdigest()

    def encode(self) -> bytes:
        return encode_record(self.model_dump(mode="json"))

    def d_in(self, hook_name: str) -> int:
        """Width of a hook point.

        Raises:
            UserError: the dataset does not hold it.
        """
        for hook in self.hooks:
            if hook.name == hook_name:
                return hook.d_in
        have = ", ".join(hook.name for hook in self.hooks)
        raise UserError(f"hook {hook_name!r} is not in this dataset, which holds {have}")

    def largest_object_bytes(self) -> int:
        """Stored bytes of the largest object of a chunk."""
        return self.rows_per_chunk * max([8, *(2 * hook.d_in for hook in self.hooks)]) + 4

    def chunk_bytes(self) -> int:
        """Stored bytes of one full chunk, all objects together; uncompressed, the most that it can take."""
        per_row = sum(2 * hook.d_in for hook in self.hooks) + 4 + 8 + 4
        header = 0 if self.codec == "bytes+crc32c" else 16
        return self.rows_per_chunk * per_row + 4 * (len(self.hooks) + 3) + header * len(self.hooks)


def load_manifest(store: ObjectStore) -> Manifest:
    """Read a dataset's manifest.

    Raises:
        ObjectMissing: no dataset there.
        DamagedObject: it fails its checksum.
        UserError: it is of a newer format.
    """
    record = store.get_record(MANIFEST)
    check_format(record, f"{store.url}/{MANIFEST}")
    try:
        return Manifest.model_validate(record)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, e["loc"])) for e in error.errors()[:3])
        raise DamagedObject(f"{store.url}/{MANIFEST} is not a manifest: {one_line(fields)}") from error


def check_format(record: dict[str, Any], name: str) -> None:
    """Refuse a record of another format version, naming both."""
    version = record.get("format_version")
    if type(version) is not int:  # true is an int, too
        raise DamagedObject(f"{name} is damaged: it carries no format version")
    if version != FORMAT_VERSION:
        raise OtherFormat(
            f"{name} has format version {one_line(str(version), 60)}; this version of penstock reads "
            f"{FORMAT_VERSION}: upgrade penstock"
        )


def publish_manifest(store: ObjectStore, manifest: Manifest) -> Manifest:
    """Write the manifest, or check that the one already there is the same plan.

    Returns:
        The manifest as stored; with `allow_mixed` its numerics may be another producer's.

    Raises:
        PlanMismatch: the URL holds another plan; the message names what differs.
    """
    if store.create_guarded(MANIFEST, manifest.model_dump(mode="json")):
        return manifest
    there = load_manifest(store)
    check_same_plan(store.url, there, manifest)
    return there


def check_same_plan(url: str, there: Manifest, manifest: Manifest) -> None:
    """Raises PlanMismatch if what a URL holds was made to another plan than ours."""
    if there.numerics.allow_mixed and manifest.numerics.allow_mixed:
        manifest = manifest.model_copy(update={"numerics": there.numerics})
    if there == manifest:
        return
    raise PlanMismatch(
        f"{url} holds another dataset: {describe_difference(there, manifest)}; "
        "choose another dataset url, or restore the settings it was made with"
    )


def describe_difference(there: BaseModel, here: BaseModel) -> str:
    """'field is A there and B here' for each differing leaf, a few at most."""
    found = list(_differences("", there.model_dump(), here.model_dump()))
    shown = "; ".join(f"{name} is {a} there and {b} here" for name, a, b in found[:3])
    return shown + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _differences(path: str, a: Any, b: Any) -> list[tuple[str, str, str]]:
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in sorted(a.keys() | b.keys()):
            found += _differences(f"{path}.{key}".lstrip("."), a.get(key), b.get(key))
        return found
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return [(path, f"{len(a)} long: {_short(a)}", f"{len(b)} long: {_short(b)}")]
        return [leaf for i in range(len(a)) for leaf in _differences(f"{path}.{i}", a[i], b[i])]
    return [] if a == b else [(path, _short(a), _short(b))]


def _short(value: Any) -> str:
    return one_line(str(value), 60)
