"""Reading a dataset: chunks written once by producers (`writer.py`), read by anyone.

Only committed chunks exist. A missing Zarr chunk reads as zeros, silently, through any Zarr reader;
here chunk objects are fetched by key, absence is an error, and every object's size and crc32c are
compared with the commit before a row is used.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from penstock.common.errors import DamagedObject, UserError
from penstock.store.arrays import dataset_arrays
from penstock.store.chunks import UNUSED, Array, Chunk, describe_bytes
from penstock.store.commits import Commit, Moments, committed_indices, list_commits, read_commit
from penstock.store.index import CommitIndex, overall_moments
from penstock.store.layout import ARRAYS, POSITION, SEQUENCE, TOKENS, acts_array
from penstock.store.manifest import Manifest, load_manifest
from penstock.store.objects import ObjectStore, open_store

if TYPE_CHECKING:
    from penstock.store.loader import Batches
    from penstock.store.lookup import Context, Rows
    from penstock.store.torch_dataset import TorchBatches


class Dataset:
    """Read access to a dataset. Needs neither Redis nor a language model."""

    def __init__(self, store: ObjectStore, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._specs = {spec.path: spec for spec in dataset_arrays(manifest)}
        self._index = CommitIndex(store, manifest)

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def n_chunks(self) -> int:
        """Planned chunks (N)."""
        return self.manifest.n_chunks

    @property
    def sizes(self) -> tuple[int]:
        """Planned chunks, as one of the parts that a reader may read as one."""
        return (self.n_chunks,)

    def d_in(self, hook_name: str) -> int:
        """Width of a hook point.

        Raises:
            UserError: the dataset does not hold it.
        """
        try:
            return self.manifest.d_in(hook_name)
        except UserError as error:
            raise UserError(f"{self.url}: {error}") from error

    def committed(self) -> set[int]:
        """Indices of the chunks that a listing shows as committed."""
        return committed_indices(self.store, self.n_chunks)

    def moments(self) -> tuple[dict[str, Moments], int]:
        """Moments of each hook over all rows committed so far, and over how many chunks they were taken.

        Chunks whose commits are not indexed yet are represented by a few of them. Without a committed
        chunk there are no moments.
        """
        return overall_moments(self.store, self._index, list_commits(self.store, self.n_chunks))

    def commit(self, index: int) -> Commit:
        """The commit of a chunk, from an index block if there is one.

        Raises:
            ObjectMissing: there is none.
            DamagedObject: it is damaged, or not one of this dataset.
        """
        return self._index.find(index) or self._read_commit(index)

    def _read_commit(self, index: int) -> Commit:
        commit = read_commit(self.store, index)
        if commit.objects.keys() != self._specs.keys() or len(commit.moments) != len(self.manifest.hooks):
            raise DamagedObject(f"{self.url}: the commit of chunk {index} is not one of this dataset")
        return commit

    def read_chunk(self, index: int, hooks: Sequence[str] | None = None) -> Chunk:
        """Read the used rows of a committed chunk, every object checked against the commit.

        Args:
            index: chunk index.
            hooks: hook points to read; all of them by default.

        Raises:
            ObjectMissing: the chunk is not committed, or an object of it is gone.
            DamagedObject: an object's bytes are not what was committed.
            UserError: the dataset does not hold a hook.
        """
        names = [hook.name for hook in self.manifest.hooks] if hooks is None else list(hooks)
        for name in names:
            self.manifest.d_in(name)
        indexed = self._index.find(index)
        if indexed is None:
            return self._read_chunk(self._read_commit(index), names)
        try:
            return self._read_chunk(indexed, names)
        except DamagedObject:
            # only the commit itself may call a chunk damaged
            commit = self._read_commit(index)
            if commit == indexed:
                raise
            return self._read_chunk(commit, names)

    def _read_chunk(self, commit: Commit, names: Sequence[str]) -> Chunk:
        index = commit.index
        arrays = {path: self.read_object(path, commit) for path in (TOKENS, SEQUENCE, POSITION)}
        used = int(np.count_nonzero(arrays[SEQUENCE] != UNUSED))
        if used != commit.rows:
            raise DamagedObject(f"{self.url}: chunk {index} has {used} rows, not {commit.rows}")
        return Chunk(
            index=index,
            acts={name: self.read_object(acts_array(name), commit)[:used] for name in names},
            tokens=arrays[TOKENS][:used].view(np.int32),
            sequence=arrays[SEQUENCE][:used].view(np.int64),
            position=arrays[POSITION][:used].view(np.int32),
        )

    def batches(
        self,
        hooks: Sequence[str],
        batch_rows: int = 4096,
        window_chunks: int | None = None,
        epochs: int = 1,
        seed: int = 0,
    ) -> "Batches":
        """Shuffled torch batches {hook: [≤ batch_rows, d_in] bfloat16} of all chunks.

        Rows of `window_chunks` consecutive chunks are mixed in memory, by default of as many as 1 GiB of the
        hooks' rows; the next window is read while this one is used. The order is that of a training run
        with the same settings.
        """
        from penstock.store.joined import JoinedDataset

        return JoinedDataset([self]).batches(hooks, batch_rows, window_chunks, epochs, seed)

    def as_torch(
        self,
        hooks: Sequence[str],
        batch_rows: int = 4096,
        window_chunks: int | None = None,
        epochs: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        with_tokens: bool = False,
        partial: bool = False,
    ) -> "TorchBatches":
        """The batches of `batches` as a `torch.utils.data.IterableDataset` that can be stopped and resumed.

        Args:
            rank, world_size: rank r of W gets the batches whose number is r modulo W.
            with_tokens: each batch also holds `tokens`, `sequence` and `position` of its rows.
            partial: of a dataset that is not complete, read the chunks that are committed now.

        Raises:
            UserError: a setting is out of range, the dataset does not hold a hook, or it is not complete.
        """
        from penstock.store.torch_dataset import TorchBatches

        return TorchBatches(
            self, hooks, batch_rows, window_chunks, epochs, seed, rank, world_size, with_tokens, partial
        )

    def as_numpy(self, hook: str, start: int = 0, stop: int | None = None) -> Array:
        """[rows, d_in] bfloat16: used rows [start, stop) in stored order. See `lookup.as_numpy`."""
        from penstock.store.lookup import as_numpy

        return as_numpy(self, hook, start, stop)

    def rows(
        self,
        tokens: Sequence[int],
        hooks: Sequence[str] | None = None,
        limit: int | None = 1000,
        partial: bool = False,
    ) -> "Rows":
        """The rows of some token ids, in stored order. See `lookup.find_rows`."""
        from penstock.store.lookup import find_rows

        return find_rows(self, tokens, hooks, limit, partial)

    def context(self, sequence: int, position: int, before: int = 16, after: int = 16) -> "Context":
        """The token ids around a row. See `lookup.context`."""
        from penstock.store.lookup import context

        return context(self, sequence, position, before, after)

    def __reduce__(self) -> tuple[object, ...]:
        # another process opens the store anew: connections do not travel
        return _opened_again, (self.url, self.manifest)

    def quarantined(self) -> set[int]:
        """Indices of the chunks that no producer could make again as committed: readers skip them."""
        stems = (key.rsplit("/", 1)[-1] for key, _ in self.store.list("quarantine/"))
        names = (stem.removesuffix(".json") for stem in stems if stem.endswith(".json"))
        return {int(name) for name in names if name.isdecimal()}

    def read_object(self, path: str, commit: Commit) -> Array:
        """One array's values of a committed chunk, unused rows included, checked against the commit.

        Raises:
            ObjectMissing, DamagedObject
        """
        spec = self._specs[path]
        key = spec.key(ARRAYS, commit.index)
        name = f"{self.url}/{key}"
        data = self.store.get(key)
        expected = commit.objects.get(path)
        array = spec.decode(data, name)
        if expected is None or expected != describe_bytes(data):
            raise DamagedObject(f"{name} is damaged: its bytes are not those committed")
        return array


def open_dataset(url: str) -> Dataset:
    """Open a dataset read-only.

    Raises:
        ObjectMissing: there is none at that URL.
        DamagedObject, UserError: its manifest is damaged or of a newer format.
    """
    store = open_store(url)
    return Dataset(store, load_manifest(store))


def _opened_again(url: str, manifest: Manifest) -> Dataset:
    return Dataset(open_store(url), manifest)
