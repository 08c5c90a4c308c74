"""Protocol bugs, planted on purpose: the simulation must find each of them."""

import hashlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from penstock.producer import work
from penstock.store import chunks, index, queue
from penstock.store.arrays import ArraySpec
from penstock.store.chunks import Chunk, arranged
from penstock.store.commits import Commit, Committed, committed_indices, find_commit, list_commits
from penstock.store.heads import Head, StoredFile, kept_checkpoints
from penstock.store.layout import FORMAT_VERSION, checkpoint_prefix, floor_key, head_key
from penstock.store.objects import ObjectStore
from penstock.store.retention import Retention, newest_floor
from penstock.store.writer import DatasetWriter
from penstock.trainer.lineage import Lineage

Patch = Callable[[], Any]


def head_without_exclusive_create() -> Any:
    """A head is simply written."""

    def create(self: Lineage, head: Head) -> None:
        self.runs.put_guarded(head_key(self.run_id, head.n), head.record())
        self.head = head

    return patch.object(Lineage, "_create", create)


def head_before_its_checkpoint() -> Any:
    """A head is created, then what it names is stored."""

    def commit(self: Lineage, *, checkpoint: dict[str, bytes], **told: Any) -> Head:
        n, writer = self.head.n + 1, uuid.uuid4().hex
        base = checkpoint_prefix(self.run_id, n, writer)
        keys = {name: f"{base}{name}.safetensors" for name in checkpoint}
        stored = {
            name: StoredFile(
                key=key.removeprefix(f"{self.run_id}/"),
                size=len(checkpoint[name]),
                sha256=hashlib.sha256(checkpoint[name]).hexdigest(),
            )
            for name, key in keys.items()
        }
        told["history"] = None
        head = self._next(writer=writer, reason=None, checkpoint=stored, **told)
        self._create(head)
        for name, key in keys.items():
            self.runs.put(key, checkpoint[name])
        self._collect()
        return head

    return patch.object(Lineage, "commit", commit)


def _own(spec: ArraySpec, array: Any, chunk: Chunk) -> Any:
    payload = chunks.Payload(array, chunks.describe_bytes(spec.encode(array)))
    return chunks.describe(spec, payload, chunk.rows)


def overwrite_chunks() -> Any:
    """The last writer of a chunk's objects wins."""

    def store(self: DatasetWriter, spec: ArraySpec, index: int, chunk: Chunk, order: Any) -> Any:
        array = arranged(spec, chunk, order)
        self.store.put(spec.key("activations.zarr", index), spec.encode(array))
        return _own(spec, array, chunk)

    return patch.object(DatasetWriter, "_store", store)


def commit_of_ones_own_bytes() -> Any:
    """A commit describes what its writer made, and not what is stored."""

    def store(self: DatasetWriter, spec: ArraySpec, index: int, chunk: Chunk, order: Any) -> Any:
        array = arranged(spec, chunk, order)
        self.store.create(spec.key("activations.zarr", index), spec.encode(array))
        return _own(spec, array, chunk)

    return patch.object(DatasetWriter, "_store", store)


def feed_without_predecessor() -> Any:
    """A position is added to a feed whatever stands before it."""
    real = queue._script

    def script(client: Any, name: str) -> Any:
        if name != "feed":
            return real(client, name)
        return client.register_script(
            "local id = (ARGV[1] + 1) .. '-0'\n"
            "if redis.call('EXISTS', KEYS[1]) == 0 then return -1 end\n"
            "local added = redis.pcall('XADD', KEYS[1], id, 'chunk', ARGV[2])\n"
            "return type(added) == 'table' and 0 or 1"
        )

    return patch.object(queue, "_script", script)


def budget_in_commits() -> Any:
    """Committed chunks are counted against the budget, wherever they lie."""

    def limit(self: Retention) -> int:
        n = self._manifest.n_chunks
        if self._budget is None:
            return n
        ahead = [index for index in committed_indices(self._store, n) if index >= self.floor]
        return n if len(ahead) < self._budget else 0

    return patch.object(Retention, "limit", property(limit))


def readers_before_the_floor() -> Any:
    """Readers are listed before the floor is raised, and not again."""

    def advance(self: Retention) -> None:
        if self._budget is None:
            return
        needed = self._needed()
        n, self.floor = newest_floor(self._store)
        target = min(needed.values(), default=self.floor)
        if target > self.floor:
            record = {"format_version": FORMAT_VERSION, "n": n + 1, "floor": target}
            self._store.create_guarded(floor_key(n + 1), record)
            _, self.floor = newest_floor(self._store)
        self._delete_below(self.floor)

    return patch.object(Retention, "advance", advance)


def collection_by_a_non_owner() -> Any:
    """Whoever thinks that it owns the run removes all checkpoints but its own, before its head is made."""
    real = Lineage._create

    def create(self: Lineage, head: Head) -> None:
        kept = tuple(str(h.checkpoint_folder) for h in kept_checkpoints(self.runs, self.run_id, head))
        base = f"{self.run_id}/"
        for key, _ in list(self.runs.list(f"{base}checkpoints/")):
            if head.checkpoint and not key.removeprefix(base).startswith(kept):
                self.runs.delete(key)
        real(self, head)

    return patch.object(Lineage, "_create", create)


def index_of_what_is_not_committed() -> Any:
    """A block is indexed as soon as its last chunk is committed, the others as they were planned."""

    def listed(store: ObjectStore, n_chunks: int) -> Committed:
        found = list_commits(store, n_chunks)
        due = [0] if n_chunks - 1 in found.indices and not found.indexed else []
        return Committed(found.indices, found.indexed, due)

    def read(store: ObjectStore, index: int) -> Commit:
        return find_commit(store, index) or replace(
            next(c for i in range(1000) if (c := find_commit(store, i)) is not None), index=index
        )

    both = ExitStack()
    both.enter_context(patch.object(work, "list_commits", listed))
    both.enter_context(patch.object(index, "read_commit", read))
    return both


def feed_of_what_others_make() -> Any:
    """A producer takes every chunk's number for an index of its own dataset."""
    return patch.object(queue.FeedSpec, "among_all", lambda spec, is_committed: is_committed)


BUGS: dict[str, Patch] = {
    function.__name__: function
    for function in (
        head_without_exclusive_create,
        head_before_its_checkpoint,
        overwrite_chunks,
        commit_of_ones_own_bytes,
        feed_without_predecessor,
        feed_of_what_others_make,
        budget_in_commits,
        readers_before_the_floor,
        collection_by_a_non_owner,
        index_of_what_is_not_committed,
    )
}


@contextmanager
def planted(bug: str | None) -> Iterator[None]:
    """With a bug of that name, or none."""
    if bug is None:
        yield
        return
    with BUGS[bug]():
        yield
