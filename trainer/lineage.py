"""A run's lineage: one chain of exclusively created heads.

A head says: everything up to this position is trained, and here is the checkpoint. It is created after
its checkpoint is stored; whoever finds its number taken has been replaced and stops. Taking a run over
is a head too, so that a worker that was only slow is fenced off from then on.
"""

import hashlib
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from penstock.common.errors import DamagedObject, DataError, Fenced, ObjectMissing
from penstock.common.logs import LOGGER
from penstock.store.layout import FORMAT_VERSION, checkpoint_prefix, head_key, history_key
from penstock.store.manifest import check_format
from penstock.store.objects import ObjectStore
from penstock.store.records import encode_record

Status = Literal["running", "done", "failed", "cancelled"]
TERMINAL: tuple[Status, ...] = ("done", "failed", "cancelled")

CHECKPOINTS_KEPT = 2
"""Checkpoints of the lineage that stay: the newest, and one to fall back to."""


@dataclass(frozen=True)
class StoredFile:
    """A checkpoint's file: key below the run, size in bytes and SHA-256 of its bytes."""

    key: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Head:
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

    n: int
    parent: int | None
    writer: str
    kind: Literal["takeover", "progress"]
    status: Status
    position: int
    step: int
    rows: int
    environment: dict[str, Any]
    checkpoint: dict[str, StoredFile] = field(default_factory=dict)
    history: str | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
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
        return asdict(self) | {"format_version": FORMAT_VERSION}


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
        files = {name: StoredFile(**f) for name, f in record.pop("checkpoint").items()}
        head = Head(**record, checkpoint=files)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedObject(f"{runs.url}/{key} is not a head") from error
    if head.n != n:
        raise DamagedObject(f"{runs.url}/{key} is head {head.n}")
    return head


def newest_head(runs: ObjectStore, run_id: str) -> Head | None:
    """The head with the highest number, or None. A listing is settled by reading until none follows."""
    listed = [
        int(key.rsplit("/", 1)[-1].removesuffix(".json"))
        for key, _ in runs.list(f"{run_id}/heads/")
        if key.endswith(".json")
    ]
    n = max(listed, default=-1)
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


class Lineage:
    """One worker's hold on a run, from its takeover head on.

    Use `take_over` to get one.
    """

    def __init__(self, runs: ObjectStore, run_id: str, head: Head) -> None:
        self.runs = runs
        self.run_id = run_id
        self.head = head
        self.takeover = head

    def load(self) -> dict[str, bytes]:
        """The checkpoint's files by name, each checked.

        Raises:
            DamagedObject, ObjectMissing
        """
        return load_checkpoint(self.runs, self.run_id, self.head)

    def commit(
        self,
        *,
        position: int,
        step: int,
        rows: int,
        checkpoint: dict[str, bytes],
        history: list[dict[str, Any]],
        metrics: dict[str, dict[str, float]],
        status: Status = "running",
    ) -> Head:
        """Store a checkpoint and its history, then commit the head that makes them count.

        Raises:
            Fenced: another worker has continued the run; nothing of ours counts.
        """
        n, writer = self.head.n + 1, uuid.uuid4().hex
        stored = {}
        for name, data in checkpoint.items():
            key = f"{checkpoint_prefix(self.run_id, n, writer)}{name}.safetensors"
            self.runs.put(key, data)
            inner = key.removeprefix(f"{self.run_id}/")
            stored[name] = StoredFile(inner, len(data), hashlib.sha256(data).hexdigest())
        head = replace(
            self.head,
            n=n,
            parent=self.head.n,
            writer=writer,
            kind="progress",
            status=status,
            position=position,
            step=step,
            rows=rows,
            checkpoint=stored,
            history=self._store_history(n, writer, history),
            metrics=metrics,
            reason=None,
            time=time.time(),
        )
        self._create(head)
        self._collect()
        return head

    def end(self, status: Status, reason: str) -> Head:
        """End the run as it was at the last head: nothing trained since is kept."""
        writer = uuid.uuid4().hex
        head = replace(
            self.head,
            n=self.head.n + 1,
            parent=self.head.n,
            writer=writer,
            kind="progress",
            status=status,
            history=None,
            reason=reason,
            time=time.time(),
        )
        self._create(head)
        return head

    def _store_history(self, n: int, writer: str, history: list[dict[str, Any]]) -> str | None:
        if not history:
            return None
        key = history_key(self.run_id, n, writer)
        self.runs.put(key, encode_record({"format_version": FORMAT_VERSION, "points": history}))
        return key.removeprefix(f"{self.run_id}/")

    def _create(self, head: Head) -> None:
        key = head_key(self.run_id, head.n)
        if not self.runs.create_record(key, head.record()):
            # a retried create can meet its own landed write
            there = read_head(self.runs, self.run_id, head.n)
            if there.writer != head.writer:
                raise Fenced(f"run {self.run_id}: head {head.n} was committed by another worker; stopping")
        self.head = head

    def _collect(self) -> None:
        """Remove checkpoints behind the ones kept. Only the writer of the newest head may."""
        kept: list[str] = []
        for head in links(self.runs, self.run_id, self.head):
            folder = head.checkpoint_folder
            if folder is not None and folder not in kept:
                kept.append(folder)
            if len(kept) == CHECKPOINTS_KEPT:
                break
        base = f"{self.run_id}/"
        for key, _ in list(self.runs.list(f"{base}checkpoints/")):
            inner = key.removeprefix(base)
            number = int(inner.split("/")[1].split("-", 1)[0])
            # a higher number may be a checkpoint that its writer is still storing
            if number < self.head.n and not inner.startswith(tuple(kept)):
                self.runs.delete(key)


def load_checkpoint(
    runs: ObjectStore, run_id: str, head: Head, names: Iterable[str] | None = None
) -> dict[str, bytes]:
    """A head's checkpoint files by name (all by default), each checked against the head.

    Raises:
        DamagedObject, ObjectMissing
    """
    files = {}
    for name in head.checkpoint if names is None else names:
        stored = head.checkpoint[name]
        data = runs.get(f"{run_id}/{stored.key}")
        if len(data) != stored.size or hashlib.sha256(data).hexdigest() != stored.sha256:
            raise DamagedObject(f"{runs.url}/{run_id}/{stored.key} is damaged")
        files[name] = data
    return files


def load_history(runs: ObjectStore, run_id: str, head: Head | None) -> list[dict[str, Any]]:
    """All metric points along the lineage that ends in a head, oldest first."""
    points: list[dict[str, Any]] = []
    for link in reversed(chain(runs, run_id, head)):
        if link.history:
            points += runs.get_record(f"{run_id}/{link.history}")["points"]
    return points


def take_over(runs: ObjectStore, run_id: str, environment: dict[str, Any]) -> Lineage | None:
    """Continue a run from its newest usable head, fencing off whoever had it.

    A head whose checkpoint is damaged is passed over for its parent, and the new head says so.

    Returns:
        The lineage, or None if the run has ended.
    """
    while True:
        newest = newest_head(runs, run_id)
        if newest is not None and newest.terminal:
            return None
        base, reason = _usable(runs, run_id, newest)
        head = Head(
            n=0 if newest is None else newest.n + 1,
            parent=None if base is None else base.n,
            writer=uuid.uuid4().hex,
            kind="takeover",
            status="running",
            position=0 if base is None else base.position,
            step=0 if base is None else base.step,
            rows=0 if base is None else base.rows,
            environment=environment,
            checkpoint={} if base is None else base.checkpoint,
            metrics={} if base is None else base.metrics,
            reason=reason,
            time=time.time(),
        )
        lineage = Lineage(runs, run_id, head)
        try:
            lineage._create(head)
            return lineage
        except Fenced:
            continue  # someone else took it over in between: look again


def _usable(runs: ObjectStore, run_id: str, head: Head | None) -> tuple[Head | None, str | None]:
    reason = None
    while head is not None:
        try:
            load_checkpoint(runs, run_id, head)
            return head, reason
        except DataError as error:
            reason = f"fell back from head {head.n}: {error}"
            LOGGER.warning("run %s %s", run_id, reason)
            head = None if head.parent is None else read_head(runs, run_id, head.parent)
    return None, reason
