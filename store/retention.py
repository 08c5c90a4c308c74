"""Which chunks may be made and which may go: readers, floors and the budget.

With `retention: window` a dataset holds a budget of chunks ahead of its *floor*, the lowest position that
any reader still needs. Chunk i may be made if and only if i < floor + budget, lowest first. What all
registered runs have read is deleted; nothing else ever is, and nothing while no run reads the dataset.

    readers/<run>.json    a run reads the dataset; created before it looks at the floor
    detached/<run>.json   it no longer does, by command or because it made no progress for too long
    floor/<n>.json        dense and exclusive; the newest counts

Who deletes raises the floor first and lists readers then; who registers creates the record first and
reads the floor then. So a reader is either seen, or it sees the floor.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from penstock.common.errors import DamagedObject, ObjectMissing, StoreError, UserError
from penstock.common.logs import LOGGER
from penstock.store.arrays import ArraySpec, dataset_arrays
from penstock.store.heads import needed_from, newest_head
from penstock.store.layout import (
    ARRAYS,
    FORMAT_VERSION,
    config_key,
    detached_key,
    floor_key,
    reader_key,
)
from penstock.store.manifest import Manifest, check_format
from penstock.store.objects import ObjectStore, open_store


@dataclass(frozen=True)
class Reader:
    """A run that reads a dataset.

    Attributes:
        start: the position that it asked to begin at.
        needs: chunks that it must be able to have ahead of its floor, or it would wait for ever.
    """

    run: str
    runs_url: str
    start: int
    needs: int


def register_reader(store: ObjectStore, reader: Reader, keeps_window: bool = True) -> int:
    """Make sure that nothing a run needs is deleted from now on; returns the floor it begins at.

    Args:
        keeps_window: the dataset has `retention: window`.

    Raises:
        UserError: the run was detached before, or an equal one of another runs URL is registered.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "run": reader.run,
        "runs_url": reader.runs_url,
        "start": reader.start,
        "needs": reader.needs,
    }
    if not store.create_guarded(reader_key(reader.run), record):
        there = read_reader(store, reader.run).runs_url
        if keeps_window and there != reader.runs_url:
            raise UserError(
                f"run {reader.run} reads {store.url} for {there} already, and its chunks are kept for that "
                "one only; give the run another name or seed"
            )
    if store.exists(detached_key(reader.run)):
        raise UserError(f"run {reader.run} was detached from {store.url} and cannot read it again")
    return max(reader.start, newest_floor(store)[1])


def read_reader(store: ObjectStore, run_id: str) -> Reader:
    """Raises ObjectMissing, DamagedObject."""
    key = reader_key(run_id)
    record = store.get_record(key)
    check_format(record, f"{store.url}/{key}")
    reader = Reader(*(record.get(name) for name in ("run", "runs_url", "start", "needs")))  # type: ignore[arg-type]
    texts, numbers = (reader.run, reader.runs_url), (reader.start, reader.needs)
    if not all(isinstance(t, str) for t in texts) or not all(type(n) is int and n >= 0 for n in numbers):
        raise DamagedObject(f"{store.url}/{key} is not a reader")
    return reader


def readers(store: ObjectStore) -> list[Reader]:
    """All readers that were not detached.

    Raises:
        DamagedObject: a record is damaged: nobody knows what may be deleted then.
    """
    runs = _names(store, "readers/") - _names(store, "detached/")
    return [read_reader(store, run) for run in sorted(runs)]


def detach_reader(store: ObjectStore, run_id: str, reason: str) -> bool:
    """Say durably that a run reads the dataset no longer; False if that was said before."""
    if store.exists(detached_key(run_id)):
        return False
    record = {"format_version": FORMAT_VERSION, "run": run_id, "reason": reason, "time": time.time()}
    return store.create_guarded(detached_key(run_id), record)


def detached_because(store: ObjectStore, run_id: str) -> str | None:
    """Why a run was detached, or None if it was not."""
    if not store.exists(detached_key(run_id)):
        return None
    return str(store.get_record(detached_key(run_id)).get("reason"))


def newest_floor(store: ObjectStore, known: int = -1) -> tuple[int, int]:
    """Number and position of the newest floor; (−1, 0) if there is none.

    Args:
        known: the number of one that was the newest. Floors are dense: reading goes on from there, and
            costs the same however many there are.
    """
    n = known
    if n < 0:
        n = max((int(name) for name in _names(store, "floor/") if name.isdecimal()), default=-1)
    floor = _read_floor(store, n) if n >= 0 else 0
    while True:
        try:
            floor = _read_floor(store, n + 1)
        except ObjectMissing:
            return n, floor
        n += 1


def _read_floor(store: ObjectStore, n: int) -> int:
    record = store.get_record(floor_key(n))
    check_format(record, f"{store.url}/{floor_key(n)}")
    floor = record.get("floor")
    if type(floor) is not int or floor < 0 or record.get("n") != n:
        raise DamagedObject(f"{store.url}/{floor_key(n)} is not a floor")
    return floor


def _names(store: ObjectStore, prefix: str) -> set[str]:
    keys = (key for key, _ in store.list(prefix))
    return {key.removeprefix(prefix).removesuffix(".json") for key in keys if key.endswith(".json")}


class Retention:
    """Raises the floor, deletes what lies behind it, and says how far chunks may be made.

    Args:
        store, manifest: of the dataset.
        budget_chunks: chunks that may lie ahead of the floor; None keeps everything.
        detach_after: seconds without a new head after which a reader is detached; None never does.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        budget_chunks: int | None,
        detach_after: float | None = None,
        open_runs: Callable[[str], ObjectStore] = open_store,
    ) -> None:
        self.floor = 0
        self._store = store
        self._manifest = manifest
        self._budget = budget_chunks
        self._detach_after = detach_after
        self._open_runs = open_runs
        self._runs: dict[str, ObjectStore] = {}
        self._known_floor = -1
        self._unneeded = 0
        self._deleted_to = 0
        self._slowest = ""

    @property
    def limit(self) -> int:
        """The first chunk index that may not be made yet."""
        n = self._manifest.n_chunks
        return n if self._budget is None else min(n, self.floor + self._budget)

    @property
    def waiting_for(self) -> str:
        """For whom chunks are not made: the slowest reader, or that there is none."""
        return self._slowest or "a run to be submitted: none reads the dataset"

    def advance(self) -> None:
        """Raise the floor to what readers still need, and delete what lies behind it.

        Raises:
            UserError: a reader needs more chunks at once than the budget holds.
            DamagedObject: a reader's record or head is damaged.
        """
        if self._budget is None:
            return
        # the floor before the readers: another deleter may raise it between a look at them and one at it
        n, self.floor = self._newest_floor()
        needed = self._needed()
        target = min(needed.values(), default=self.floor)
        if target > self.floor:
            # the floor first, then the readers again: whoever registers in between is seen or sees it
            record = {"format_version": FORMAT_VERSION, "n": n + 1, "floor": target}
            self._store.create_guarded(floor_key(n + 1), record)
            _, self.floor = self._newest_floor()
            needed = self._needed()
        self._unneeded = min([self.floor, *needed.values()])
        self._delete_below(self._unneeded)
        self._name_slowest(needed)

    def look(self) -> None:
        """Learn where `advance` would raise the floor to, and change nothing.

        What it gives is for watching only: nothing may be made or deleted by it.

        Raises:
            UserError, DamagedObject: as `advance`.
        """
        if self._budget is None:
            return
        _, self.floor = self._newest_floor()
        needed = self._needed()
        self.floor = max(self.floor, min(needed.values(), default=self.floor))
        self._name_slowest(needed)

    def _name_slowest(self, needed: dict[str, int]) -> None:
        slowest = min(needed, key=lambda run: needed[run], default="")
        self._slowest = f"run {slowest}, which still needs chunk {needed[slowest]}" if slowest else ""

    def is_deleted(self, index: int) -> bool:
        """Whether a chunk was deleted when last looked: it lies behind the floor and all readers.

        Behind the floor alone does not do: who registers while it is raised begins at the one before.
        """
        return index < self._unneeded

    def is_needed(self, index: int) -> bool:
        """Whether anybody may still read a chunk, asked of the store now.

        Raises:
            UserError, DamagedObject: as `advance`.
        """
        if self._budget is None:
            return True
        _, floor = self._newest_floor()
        return index >= floor or index >= min([floor, *self._needed().values()])

    def _newest_floor(self) -> tuple[int, int]:
        self._known_floor, floor = newest_floor(self._store, self._known_floor)
        return self._known_floor, floor

    def _needed(self) -> dict[str, int]:
        """Run -> lowest position that it may still read, of all readers that have not ended."""
        found = {}
        for reader in readers(self._store):
            position = self._position(reader)
            if position is None or self._expired(reader):
                continue
            if self._budget is not None and reader.needs > self._budget:
                raise UserError(
                    f"dataset.budget_bytes: holds {self._budget} chunks, but run {reader.run} needs "
                    f"{reader.needs} at once; raise it, or detach the run"
                )
            found[reader.run] = position
        return found

    def _position(self, reader: Reader) -> int | None:
        runs = self._runs_of(reader)
        try:
            start = int(runs.get_record(config_key(reader.run))["start"])
        except ObjectMissing:
            return reader.start  # being submitted
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedObject(f"{runs.url}/{config_key(reader.run)} is not a run config") from error
        return needed_from(runs, reader.run, start)

    def _expired(self, reader: Reader) -> bool:
        if self._detach_after is None:
            return False
        head = newest_head(self._runs_of(reader), reader.run)
        if head is None or time.time() - head.time < self._detach_after:
            return False
        reason = f"no head for {self._detach_after / 3600:.3g} h, as dataset.detach_after_hours says"
        LOGGER.warning("run %s is detached: %s", reader.run, reason)
        detach_reader(self._store, reader.run, reason)
        return True

    def _runs_of(self, reader: Reader) -> ObjectStore:
        if reader.runs_url not in self._runs:
            self._runs[reader.runs_url] = self._open_runs(reader.runs_url)
        return self._runs[reader.runs_url]

    def _delete_below(self, position: int) -> None:
        # retained datasets are read once, in order: a position is a chunk index
        if position <= self._deleted_to:
            return
        specs = dataset_arrays(self._manifest)
        if self._deleted_to == 0:
            # once, with what earlier producers and slow ones left behind
            keys = {key for key, _ in self._store.list(f"{ARRAYS}/")}
            for spec in specs:
                for index in range(position):
                    if spec.key(ARRAYS, index) in keys:
                        self._store.delete(spec.key(ARRAYS, index))
        else:
            for index in range(self._deleted_to, position):
                delete_chunk(self._store, specs, index)
        self._deleted_to = position


def delete_chunk(store: ObjectStore, specs: list[ArraySpec], index: int) -> None:
    """Remove a chunk's objects; its commit stays."""
    for spec in specs:
        store.delete(spec.key(ARRAYS, index))


def check_quota(manifest: Manifest, quota_bytes: int | None, budget_bytes: int | None) -> None:
    """Refuse a dataset early that would outgrow its quota.

    Raises:
        StoreError: with the numbers.
    """
    if quota_bytes is None:
        return
    planned = manifest.n_chunks * manifest.chunk_bytes()
    if manifest.retention == "window" and budget_bytes is not None:
        planned = min(planned, budget_bytes)
    if planned > quota_bytes:
        raise StoreError(
            f"dataset.quota_bytes: the dataset would take {planned:,} bytes and the quota is "
            f"{quota_bytes:,}; lower dataset.max_rows, raise the quota, or use retention: window"
        )


def budget_chunks(manifest: Manifest, budget_bytes: int | None) -> int | None:
    """How many chunks a budget holds; None for a dataset that is kept.

    Raises:
        UserError: a window without a budget, or with one that holds no chunk.
    """
    if manifest.retention == "keep":
        return None
    if budget_bytes is None:
        raise UserError("dataset.budget_bytes: retention: window needs a budget")
    chunks = budget_bytes // manifest.chunk_bytes()
    if chunks < 1:
        raise UserError(
            f"dataset.budget_bytes: {budget_bytes:,} bytes hold no chunk, which takes "
            f"{manifest.chunk_bytes():,}"
        )
    return chunks
