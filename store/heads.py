"""Heads: the numbered, exclusively created commits of a run, and the chain they form.

A head says: everything up to this position is trained, and here is the checkpoint. The newest head and
its chain of parents are the run; whoever keeps data for a run asks them how far it is.
"""

from collections.abc import Iterator
from itertools import takewhile
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from penstock.common.errors import DamagedObject, ObjectMissing
from penstock.store.layout import FORMAT_VERSION, head_key
from penstock.store.manifest import check_format
from penstock.store.objects import ObjectStore

Status = Literal["running", "done", "failed", "cancelled"]
TERMINAL: tuple[Status, ...] = ("done", "failed", "cancelled")

CHECKPOINTS_KEPT = 2
"""Checkpoints of the lineage that stay: the newest, and one to fall back to."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StoredFile(_Part):
    """A checkpoint's file: key below the run, size in bytes and SHA-256 of its bytes."""

    key: str = Field(pattern=r"^checkpoints/[^/]+/.")
    size: NonNegativeInt
    sha256: str


class Head(_Part):
    """A numbered commit of a run.

    Attributes:
        n: dense number, 0, 1, 2, …
        parent: the head it continues; None for the first.
        writer: unique to the process that made it.
        kind: `takeover` (a worker begins here) or `progress`.
        status: running, or how the run ended.
        position: chunks trained on, over all epochs; the next to read.
        step, rows: optimizer steps and rows trained on.
        checkpoint: name -> file, for weights and optimizer; empty before the first.
        history: key of the metric history since the parent, or None.
        environment: torch, threads, device: what bits depend on.
        metrics: per SAE, the figures of its last window.
        reason: why, for failed, cancelled and fallen-back heads.
    """

    n: NonNegativeInt
    parent: NonNegativeInt | None
    writer: str
    kind: Literal["takeover", "progress"]
    status: Status
    position: NonNegativeInt
    step: NonNegativeInt
    rows: NonNegativeInt
    environment: dict[Annotated[str, Field(pattern=r"^[a-z]+$")], str | int | bool]
    checkpoint: dict[str, StoredFile] = {}
    history: str | None = None
    metrics: dict[str, dict[str, float]] = {}
    reason: str | None = None
    time: float = 0.0

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL

    @property
    def checkpoint_folder(self) -> str | None:
        """`checkpoints/<n>-<writer>/`, below the run; None before the first checkpoint."""
        for stored in self.checkpoint.values():
            return "/".join(stored.key.split("/")[:2]) + "/"
        return None

    def record(self) -> dict[str, Any]:
        return self.model_dump(mode="json") | {"format_version": FORMAT_VERSION}


def read_head(runs: ObjectStore, run_id: str, n: int) -> Head:
    """Read one head.

    Raises:
        ObjectMissing, DamagedObject
    """
    key = head_key(run_id, n)
    record = runs.get_record(key)
    check_format(record, f"{runs.url}/{key}")
    del record["format_version"]
    try:
        head = Head.model_validate(record)
    except ValidationError as error:
        raise DamagedObject(f"{runs.url}/{key} is not a head") from error
    if record.keys() != Head.model_fields.keys():
        raise DamagedObject(f"{runs.url}/{key} is not a head: a field is missing")
    if head.n != n or (head.parent is not None and head.parent >= n):
        raise DamagedObject(f"{runs.url}/{key} does not belong there: it is head {head.n}")
    return head


def head_numbers(runs: ObjectStore, run_id: str) -> set[int]:
    """Numbers of the heads that a listing shows: a hint."""
    stems = (key.rsplit("/", 1)[-1] for key, _ in runs.list(f"{run_id}/heads/"))
    numbers = (stem.removesuffix(".json") for stem in stems if stem.endswith(".json"))
    return {int(number) for number in numbers if number.isdecimal()}


def newest_head(runs: ObjectStore, run_id: str, known: Head | None = None) -> Head | None:
    """The head with the highest number, or None. A listing is settled by reading until none follows.

    Args:
        known: one that was the newest. Heads are dense: reading goes on from there, without a listing.
    """
    head, n = known, known.n if known else -1
    if known is None:
        n = max(head_numbers(runs, run_id), default=-1)
        head = read_head(runs, run_id, n) if n >= 0 else None
    while True:
        n += 1
        try:
            head = read_head(runs, run_id, n)
        except ObjectMissing:
            return head


def links(runs: ObjectStore, run_id: str, head: Head | None) -> Iterator[Head]:
    """The lineage that ends in a head, newest first, read only as far as it is looked at."""
    while head is not None:
        yield head
        head = None if head.parent is None else read_head(runs, run_id, head.parent)


def chain(runs: ObjectStore, run_id: str, head: Head | None) -> list[Head]:
    """The lineage that ends in a head, newest first."""
    return list(links(runs, run_id, head))


def kept_checkpoints(runs: ObjectStore, run_id: str, head: Head | None) -> list[Head]:
    """One head for each checkpoint of the lineage that is kept, newest first."""
    kept: list[Head] = []
    for link in links(runs, run_id, head):
        if link.checkpoint_folder is None:
            break
        if all(link.checkpoint_folder != other.checkpoint_folder for other in kept):
            kept.append(link)
        if len(kept) == CHECKPOINTS_KEPT:
            break
    return kept


def needed_from(runs: ObjectStore, run_id: str, start: int) -> int | None:
    """The lowest position that a run may still read, or None once it has ended.

    That of its older kept checkpoint: it may have to fall back to it.

    Args:
        start: where the run begins.
    """
    head = newest_head(runs, run_id)
    if head is not None and head.terminal:
        return None
    kept = kept_checkpoints(runs, run_id, head)
    return kept[-1].position if len(kept) == CHECKPOINTS_KEPT else start


def barren_takeovers(runs: ObjectStore, run_id: str, head: Head | None) -> int:
    """How many workers in a row have taken the run over without getting it any further."""
    return sum(1 for _ in takewhile(lambda link: link.kind == "takeover", links(runs, run_id, head)))
