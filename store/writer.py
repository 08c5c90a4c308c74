"""Writing a dataset: objects first, first writer wins, then the commit."""

import time
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from penstock.common.errors import DataError, ModelError, ObjectMissing
from penstock.common.permutation import permutation
from penstock.store.arrays import ArraySpec, create_arrays, dataset_arrays
from penstock.store.chunks import (
    Chunk,
    Part,
    Payload,
    arranged,
    commit_of,
    describe,
    describe_bytes,
    is_as_committed,
    is_finite,
    load_payload,
    restore_commit,
)
from penstock.store.commits import Commit, create_commit, read_commit
from penstock.store.index import CommitIndex
from penstock.store.layout import ARRAYS, provenance_key
from penstock.store.manifest import Manifest, publish_manifest
from penstock.store.objects import ObjectStore


class DatasetWriter:
    """Writes chunks of a dataset: objects first, first writer wins, then the commit.

    Args:
        pool: stores a chunk's objects side by side; one of its own by default.
    """

    def __init__(self, store: ObjectStore, manifest: Manifest, pool: Executor | None = None) -> None:
        self.store = store
        self.manifest = publish_manifest(store, manifest)
        self.specs = dataset_arrays(self.manifest)
        create_arrays(store, ARRAYS, self.specs)
        self.pool = pool or ThreadPoolExecutor(len(self.specs), thread_name_prefix="put")

    def write(self, index: int, chunk: Chunk, worker: str | None = None) -> tuple[Commit, bool]:
        """Store and commit a chunk.

        Args:
            worker: who makes it, for provenance.

        Returns:
            The commit as stored, and whether this call made it.

        Raises:
            DamagedObject: an object is there already and is not a whole chunk.
            ModelError: the rows are not finite; nothing was stored.
            ValueError: they are not what the manifest plans.
        """
        self._check(index, chunk)
        order = permutation(chunk.rows, self.manifest.seed, "chunk", index)
        parts = list(self.pool.map(lambda spec: self._store(spec, index, chunk, order), self.specs))
        commit = commit_of(self.manifest, index, dict(zip(self.specs, parts, strict=True)))
        if worker is not None:
            told = {"index": index, "worker": worker, "time": time.time()}
            self.store.put_guarded(provenance_key(index, worker), told)
        if create_commit(self.store, commit):
            return commit, True
        return read_commit(self.store, index), False

    def mend(self, index: int, chunk: Chunk) -> bool:
        """Make a committed chunk whole again from a recomputation.

        Nothing is deleted first: only one content is valid, and objects that have it stay untouched.

        Returns:
            False if the recomputation is not what was committed; nothing was changed.
        """
        self._check(index, chunk)
        order = permutation(chunk.rows, self.manifest.seed, "chunk", index)
        try:
            commit = read_commit(self.store, index)
        except DataError as error:
            indexed = CommitIndex(self.store, self.manifest).find(index)
            if indexed is None and isinstance(error, ObjectMissing):
                self.write(index, chunk)
                return True
            commit = indexed or self._remember(index, chunk, order)
        broken: dict[str, bytes] = {}
        for spec in self.specs:
            if not is_as_committed(self.store, spec, commit):
                data = spec.encode(arranged(spec, chunk, order))
                if commit.objects.get(spec.path) != describe_bytes(data):
                    return False
                broken[spec.key(ARRAYS, index)] = data
        for key, data in broken.items():
            self.store.put(key, data)
        restore_commit(self.store, commit)
        return True

    def close(self) -> None:
        self.pool.shutdown()

    def _check(self, index: int, chunk: Chunk) -> None:
        """Refuse what must not be stored, before anything is."""
        if chunk.rows != self.manifest.rows[index]:
            raise ValueError(f"chunk {index} has {chunk.rows} rows, not {self.manifest.rows[index]}")
        for spec in self.specs:
            given = chunk.array(spec.path)
            if given.dtype != spec.dtype or given.shape[1:] != spec.shape[1:]:
                raise ValueError(
                    f"chunk {index}: {spec.path} is {given.dtype} {list(given.shape)}, not "
                    f"{spec.dtype} [rows{''.join(f', {n}' for n in spec.shape[1:])}]"
                )
        if not all(self.pool.map(is_finite, chunk.acts.values())):
            raise ModelError("the model gave non-finite activations; nothing was committed")

    def _store(self, spec: ArraySpec, index: int, chunk: Chunk, order: npt.NDArray[np.int64]) -> Part:
        """Store one array of a chunk. Only as many at a time are laid out as there are threads for it."""
        array = arranged(spec, chunk, order)
        data = spec.encode(array)
        payload = Payload(array, describe_bytes(data))
        if not self.store.create(spec.key(ARRAYS, index), data):
            # Someone was here before: what is stored counts, if it is whole.
            payload = load_payload(self.store, spec, index)
        return describe(spec, payload, chunk.rows)

    def _remember(self, index: int, chunk: Chunk, order: npt.NDArray[np.int64]) -> Commit:
        """The commit of a chunk whose commit is damaged: whole objects count, the rest is recomputed."""
        parts = {}
        for spec in self.specs:
            try:
                payload = load_payload(self.store, spec, index)
            except DataError:
                array = arranged(spec, chunk, order)
                payload = Payload(array, describe_bytes(spec.encode(array)))
            parts[spec] = describe(spec, payload, chunk.rows)
        return commit_of(self.manifest, index, parts)
