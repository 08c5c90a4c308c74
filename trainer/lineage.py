"""A run's lineage: one worker's hold on a chain of exclusively created heads.

A head is created after its checkpoint is stored; whoever finds its number taken has been replaced and
stops. Taking a run over is a head too, so that a worker that was only slow is fenced off from then on.
"""

import hashlib
import random
import time
import uuid
from collections.abc import Iterable
from typing import Any

from penstock.common.errors import DamagedObject, DataError, Fenced, ObjectMissing, Unavailable
from penstock.common.logs import LOGGER
from penstock.common.redact import redact
from penstock.store.heads import Head, Status, StoredFile, chain, kept_checkpoints, newest_head, read_head
from penstock.store.layout import FORMAT_VERSION, checkpoint_prefix, head_key, history_key
from penstock.store.manifest import check_format
from penstock.store.objects import ObjectStore

TAKEOVER_TRIES = 50
"""Attempts at the next head number; each one lost means that somebody else has made it."""


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
            stored[name] = StoredFile(key=inner, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        head = self._next(
            writer=writer,
            status=status,
            position=position,
            step=step,
            rows=rows,
            checkpoint=stored,
            history=self._store_history(n, writer, history),
            metrics=metrics,
            reason=None,
        )
        self._create(head)
        self._collect()
        return head

    def end(self, status: Status, reason: str) -> Head:
        """End the run as it was at the last head: nothing trained since is kept."""
        head = self._next(writer=uuid.uuid4().hex, status=status, history=None, reason=redact(reason))
        self._create(head)
        return head

    def _next(self, **changes: Any) -> Head:
        """The head after ours: what does not change stays as it is."""
        numbers = {"n": self.head.n + 1, "parent": self.head.n}
        told = {"kind": "progress", "time": time.time()}
        return self.head.model_copy(update=numbers | told | changes)

    def _store_history(self, n: int, writer: str, history: list[dict[str, Any]]) -> str | None:
        if not history:
            return None
        key = history_key(self.run_id, n, writer)
        self.runs.put_guarded(key, {"format_version": FORMAT_VERSION, "points": history})
        return key.removeprefix(f"{self.run_id}/")

    def _create(self, head: Head) -> None:
        key = head_key(self.run_id, head.n)
        if not self.runs.create_guarded(key, head.record()):
            raise Fenced(f"run {self.run_id}: head {head.n} was committed by another worker; stopping")
        self.head = head

    def _collect(self) -> None:
        """Remove checkpoints behind the ones kept. Only the writer of the newest head may."""
        kept = [str(h.checkpoint_folder) for h in kept_checkpoints(self.runs, self.run_id, self.head)]
        base = f"{self.run_id}/"
        for key, _ in list(self.runs.list(f"{base}checkpoints/")):
            inner = key.removeprefix(base)
            number = inner.split("/")[1].split("-", 1)[0]
            # a higher number may be a checkpoint that its writer is still storing
            if number.isdecimal() and int(number) < self.head.n and not inner.startswith(tuple(kept)):
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
        stored = head.checkpoint.get(name)
        if stored is None:
            raise ObjectMissing(f"{runs.url}/{run_id}: head {head.n} has no checkpoint of {name}")
        data = runs.get(f"{run_id}/{stored.key}")
        if len(data) != stored.size or hashlib.sha256(data).hexdigest() != stored.sha256:
            raise DamagedObject(f"{runs.url}/{run_id}/{stored.key} is damaged")
        files[name] = data
    return files


def load_history(runs: ObjectStore, run_id: str, head: Head | None) -> list[dict[str, Any]]:
    """All metric points along the lineage that ends in a head, oldest first.

    Raises:
        ObjectMissing, DamagedObject
    """
    points: list[dict[str, Any]] = []
    for link in reversed(chain(runs, run_id, head)):
        if link.history:
            record = runs.get_record(f"{run_id}/{link.history}")
            check_format(record, f"{runs.url}/{run_id}/{link.history}")
            found = record.get("points")
            if not isinstance(found, list):
                raise DamagedObject(f"{runs.url}/{run_id}/{link.history} is not a metric history")
            points += found
    return points


def take_over(runs: ObjectStore, run_id: str, environment: dict[str, Any], start: int = 0) -> Lineage | None:
    """Continue a run from its newest usable head, fencing off whoever had it.

    A head whose checkpoint is damaged is passed over for its parent, and the new head says so.

    Args:
        start: the position that the run begins at.

    Returns:
        The lineage, or None if the run has ended.

    Raises:
        Unavailable: others keep being faster.
    """
    for attempt in range(TAKEOVER_TRIES):
        newest = newest_head(runs, run_id)
        if newest is not None and newest.terminal:
            return None
        base, reason = _usable(runs, run_id, newest)
        lineage = Lineage(runs, run_id, _takeover_head(newest, base, environment, start, reason))
        try:
            lineage._create(lineage.head)
            return lineage
        except Fenced:
            LOGGER.info("run %s: someone else was faster to continue it; looking again", run_id)
            time.sleep(random.uniform(0.0, 0.1 * (attempt + 1)))
    raise Unavailable(f"run {run_id}: others were faster to take it over {TAKEOVER_TRIES} times in a row")


def _takeover_head(
    newest: Head | None, base: Head | None, environment: dict[str, Any], start: int, reason: str | None
) -> Head:
    return Head(
        n=0 if newest is None else newest.n + 1,
        parent=None if base is None else base.n,
        writer=uuid.uuid4().hex,
        kind="takeover",
        status="running",
        position=start if base is None else base.position,
        step=0 if base is None else base.step,
        rows=0 if base is None else base.rows,
        environment=environment,
        checkpoint={} if base is None else base.checkpoint,
        metrics={} if base is None else base.metrics,
        reason=reason,
        time=time.time(),
    )


def _usable(runs: ObjectStore, run_id: str, head: Head | None) -> tuple[Head | None, str | None]:
    reason = None
    while head is not None:
        try:
            load_checkpoint(runs, run_id, head)
            return head, reason
        except DataError as error:
            reason = redact(f"fell back from head {head.n}: {error}")
            LOGGER.warning("run %s %s", run_id, reason)
            head = None if head.parent is None else read_head(runs, run_id, head.parent)
    return None, reason
