"""What is wrong with stored objects, and what would put it right.

Every object is one of three kinds: *guarded* records, which have a copy beside them; *derived* objects,
which follow from others (Zarr metadata, commits, index blocks); and *made* ones (chunks, corpus blocks,
checkpoints), which only their maker can make again. Only one content is valid for each, and nothing is
deleted.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from penstock.common.errors import DataError, ObjectMissing, PenstockError
from penstock.store.arrays import ArraySpec, dataset_arrays, zarr_metadata
from penstock.store.chunks import describe_stored, is_as_committed, load_payload, restore_commit
from penstock.store.commits import Commit, read_commit
from penstock.store.corpus import Corpus, corpus_arrays
from penstock.store.dataset import Dataset
from penstock.store.index import Columns, IndexBlock, encode_block, read_block
from penstock.store.layout import (
    ARRAYS,
    BLOCK_CHUNKS,
    CORPUS_ARRAYS,
    MANIFEST,
    block_range,
    commit_key,
    copy_key,
    index_key,
)
from penstock.store.objects import ObjectStore
from penstock.store.records import decode_record
from penstock.store.retention import newest_floor
from penstock.store.truth import truth_faults

GUARDED_FOLDERS = ("readers/", "detached/", "floor/", "quarantine/")


@dataclass(frozen=True)
class Fault:
    """An object that is not as it must be.

    Attributes:
        problem: which one, and what is wrong, in one line.
        remedy: what `penstock repair` does about it.
        restore: does it, where nothing but the store is needed.
        chunk: the chunk that must be made again.
    """

    problem: str
    remedy: str
    restore: Callable[[], None] | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        return f"{self.problem}; repair {self.remedy}"


def guarded_faults(store: ObjectStore, keys: Iterable[str]) -> Iterator[Fault]:
    """Check records and their copies against each other.

    Args:
        keys: of records, of copies, or both.
    """
    for key in sorted({key.removesuffix(".copy").removesuffix(".json") + ".json" for key in keys}):
        states = [_record_state(store, name) for name in (key, copy_key(key))]
        (record, problem), (copy, copy_problem) = states
        if record is not None and copy is not None and record != copy:
            copy, copy_problem = None, f"{store.url}/{copy_key(key)} is not what its record says"
        if record is None and copy is None:
            yield Fault(problem, "cannot help: its copy is gone, too")
        elif record is None:
            yield Fault(problem, "restores it from its copy", _writer(store, key, copy or b""))
        elif copy is None:
            yield Fault(copy_problem, "writes it from its record", _writer(store, copy_key(key), record))


def _record_state(store: ObjectStore, key: str) -> tuple[bytes | None, str]:
    try:
        data = store.get(key)
        decode_record(data, f"{store.url}/{key}")
    except DataError as error:
        return None, str(error)
    return data, ""


def _writer(store: ObjectStore, key: str, data: bytes) -> Callable[[], None]:
    return lambda: store.put(key, data)


def manifest_faults(store: ObjectStore) -> Iterator[Fault]:
    """Check the manifest of a dataset or corpus, which everything else is checked by."""
    yield from guarded_faults(store, [MANIFEST])


def dataset_faults(dataset: Dataset, on_chunk: Callable[[int], None] = lambda index: None) -> Iterator[Fault]:
    """Check everything of a dataset whose manifest is whole.

    Args:
        on_chunk: called with each chunk's index once it is checked.
    """
    store = dataset.store
    kept = [key for folder in GUARDED_FOLDERS for key, _ in store.list(folder)]
    provenance = [key for key, _ in store.list("provenance/")]
    yield from guarded_faults(store, kept)
    yield from _provenance_faults(store, provenance)
    yield from _gaps(store, kept)
    for problem, restore in truth_faults(dataset):
        remedy = "restores it from its copy" if restore else "cannot help: its copy is gone, too"
        yield Fault(problem, remedy, restore)
    specs = dataset_arrays(dataset.manifest)
    yield from _zarr_faults(store, ARRAYS, specs)
    try:
        floor = newest_floor(store)[1] if dataset.manifest.retention == "window" else 0
    except DataError:
        floor = 0  # reported above
    gone = dataset.quarantined()
    told = {index for key in provenance if (index := _index_of(key)) is not None}
    for block, indices in groupby(sorted(dataset.committed() | told), lambda index: index // BLOCK_CHUNKS):
        indexed, problem = _read_index(dataset, block)
        commits: list[Commit] = []
        for index in indices:
            try:
                commits.append(read_commit(store, index))
                commit: Commit | None = commits[-1]
            except DataError as error:
                yield _commit_fault(dataset, index, str(error), indexed)
                commit = indexed.commit(index) if indexed else None
            if commit is not None and index >= floor and index not in gone:
                yield from _chunk_faults(store, commit, specs)
            on_chunk(index)
        yield from _index_faults(dataset, block, commits, problem)


def _provenance_faults(store: ObjectStore, keys: list[str]) -> Iterator[Fault]:
    """Of a chunk's producers one is enough: others may have died between a record and its copy."""
    by_chunk: dict[int | None, dict[str, list[Fault]]] = {}
    for stem in sorted({key.rsplit(".", 1)[0] for key in keys}):
        pair = list(guarded_faults(store, [f"{stem}.json"]))
        by_chunk.setdefault(_index_of(stem), {})[stem] = pair
    for index, pairs in by_chunk.items():
        half = {stem for stem in pairs if not {f"{stem}.json", f"{stem}.copy"} <= set(keys)}
        told = index is None or any(not pair for pair in pairs.values()) or not _is_committed(store, index)
        for stem, pair in pairs.items():
            if not (told and stem in half):
                yield from pair


def _index_of(key: str) -> int | None:
    """The chunk whose provenance a key holds."""
    stem = key.removeprefix("provenance/").split("-")[0]
    return int(stem) if stem.isdecimal() else None


def _is_committed(store: ObjectStore, index: int) -> bool:
    return store.exists(commit_key(index))


def _gaps(store: ObjectStore, keys: list[str]) -> Iterator[Fault]:
    stems = (key.removeprefix("floor/").rsplit(".", 1)[0] for key in keys if key.startswith("floor/"))
    numbers = {int(stem) for stem in stems if stem.isdecimal()}
    for n in sorted(set(range(max(numbers, default=0))) - numbers):
        yield Fault(f"{store.url}/floor/{n}.json is missing", "cannot help: its copy is gone, too")


def _chunk_faults(store: ObjectStore, commit: Commit, specs: list[ArraySpec]) -> Iterator[Fault]:
    index = commit.index
    for spec in specs:
        if not is_as_committed(store, spec, commit):
            yield Fault(_object_problem(store, spec, commit), f"makes chunk {index} again", chunk=index)


def _object_problem(store: ObjectStore, spec: ArraySpec, commit: Commit) -> str:
    try:
        load_payload(store, spec, commit.index)
    except DataError as error:
        return str(error)
    return f"{store.url}/{spec.key(ARRAYS, commit.index)} is damaged: its bytes are not those committed"


def _read_index(dataset: Dataset, block: int) -> tuple[IndexBlock | None, str]:
    """An index block, or what is wrong with it."""
    chunks = block_range(block, dataset.n_chunks)
    try:
        return read_block(dataset.store, Columns.of(dataset.manifest), chunks), ""
    except DataError as error:
        return None, str(error)


def _index_faults(dataset: Dataset, block: int, commits: list[Commit], problem: str) -> Iterator[Fault]:
    """An index block follows from its commits: from all that there are to be, each whole.

    Args:
        commits: those of the block that can be read.
        problem: why the index block cannot be read, if so.
    """
    store, key = dataset.store, index_key(block)
    columns, remedy = Columns.of(dataset.manifest), "writes it from the commits"
    complete = len(commits) == len(block_range(block, dataset.n_chunks))
    if not complete or not all(columns.describes(commit) for commit in commits):
        if problem and store.exists(key):
            yield Fault(problem, remedy)  # once these are there again
        return
    data = encode_block(columns, commits)
    if not problem and store.get(key) != data:
        problem = f"{store.url}/{key} is damaged: it is not what its commits say"
    if problem:
        yield Fault(problem, remedy, _writer(store, key, data))


def _commit_fault(dataset: Dataset, index: int, problem: str, indexed: IndexBlock | None) -> Fault:
    """A commit is told by its index block, and follows from its chunk's objects, if these are whole."""
    if indexed is not None:
        told = indexed.commit(index)
        return Fault(problem, "writes it from the index", lambda: restore_commit(dataset.store, told))
    try:
        commit = describe_stored(dataset.store, dataset.manifest, index)
    except PenstockError:
        return Fault(problem, f"makes chunk {index} again", chunk=index)
    return Fault(problem, "derives it from its chunk", lambda: restore_commit(dataset.store, commit))


def _zarr_faults(store: ObjectStore, group: str, specs: list[ArraySpec]) -> Iterator[Fault]:
    for name, data in zarr_metadata(tuple(specs)).items():
        key = f"{group}/{name}"
        try:
            there = store.get(key)
            # another version of zarr-python may write the same in other bytes
            if there == data or json.loads(there) == json.loads(data):
                continue
            problem = f"{store.url}/{key} is damaged: it does not describe this dataset"
        except ObjectMissing as error:
            problem = str(error)
        except ValueError:
            problem = f"{store.url}/{key} is damaged: it is not JSON"
        yield Fault(problem, "writes it from the manifest", _writer(store, key, data))


def corpus_faults(corpus: Corpus, on_block: Callable[[str], None] = lambda key: None) -> Iterator[Fault]:
    """Check everything of a corpus whose manifest is whole."""
    specs = corpus_arrays(corpus.manifest)
    yield from _zarr_faults(corpus.store, CORPUS_ARRAYS, specs)
    try:
        corpus.documents()
    except DataError as error:
        yield Fault(str(error), "packs the text again")
    for spec in specs:
        for block in range(len(corpus.manifest.blocks[spec.path])):
            try:
                corpus.block(spec, block)
            except DataError as error:
                yield Fault(str(error), "packs the text again")
            on_block(spec.key(CORPUS_ARRAYS, block))
