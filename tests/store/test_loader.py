"""Windows and batches: every row once per epoch, in the order of a run, and errors that arrive."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.common.errors import DamagedObject, DataError, ObjectMissing, UserError
from penstock.store.arrays import BFLOAT16
from penstock.store.chunks import Chunk
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.layout import commit_key
from penstock.store.loader import AsStored, LoadedWindow, WindowLoader, WindowReader
from penstock.store.local import LocalStore
from penstock.store.order import ReadingOrder, batch_bounds
from penstock.store.writer import DatasetWriter
from services.synthetic import MLP, RESID, make_manifest
from services.waiting import eventually

ROWS = [40, 33, 40, 38, 40, 17, 1]
TOTAL = sum(ROWS)
HOOKS = [RESID, MLP]


def numbered(index: int) -> Chunk:
    """Rows whose bits say which row of the dataset they are, in every hook."""
    first, rows = sum(ROWS[:index]), ROWS[index]
    numbers = np.arange(first, first + rows, dtype=np.uint16)
    place = np.arange(rows)
    return Chunk(
        index=index,
        acts={
            RESID: np.repeat(numbers[:, None], 8, axis=1).view(BFLOAT16),
            MLP: np.repeat(numbers[:, None] + np.uint16(1000), 16, axis=1).view(BFLOAT16),
        },
        tokens=place.astype(np.int32),
        sequence=place.astype(np.int64),
        position=place.astype(np.int32),
    )


def make(directory: Path) -> Dataset:
    store = LocalStore(str(directory))
    writer = DatasetWriter(store, make_manifest(ROWS))
    for index in range(len(ROWS)):
        writer.write(index, numbered(index))
    writer.close()
    return open_dataset(store.url)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert loader_threads() == []


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "loader" or t.name.startswith("read")]


def row_numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    """Which rows a batch holds; every column of every hook must agree."""
    numbers = batch[RESID].view(torch.int16)[:, 0]
    assert torch.equal(batch[RESID].view(torch.int16), numbers[:, None].expand(-1, 8))
    if MLP in batch:
        assert torch.equal(batch[MLP].view(torch.int16), (numbers + 1000)[:, None].expand(-1, 16))
    return [int(number) for number in numbers]


def expected(dataset: Dataset, order: ReadingOrder, batch_rows: int) -> list[list[int]]:
    """The batches as the reading order defines them, read without a loader."""
    batches = []
    for number in range(order.n_windows):
        window = order.window(number)
        rows: list[int] = []
        for position in range(window.start, window.stop):
            acts = dataset.read_chunk(order.chunk_at(position)).acts[RESID]
            rows += acts[:, 0].view(np.uint16).tolist()
        shuffled = [rows[i] for i in order.row_order(window, len(rows))]
        batches += [shuffled[start:stop] for start, stop in batch_bounds(len(rows), batch_rows)]
    return batches


class Awaiting(AsStored):
    """A supply that does something about each position before it lets it be read."""

    def __init__(self, await_chunk: Callable[[int, int], None]) -> None:
        self._await = await_chunk

    def await_chunk(self, position: int, chunk: int) -> None:
        self._await(position, chunk)


def load(
    dataset: Dataset,
    hooks: list[str],
    order: ReadingOrder,
    first_window: int,
    await_chunk: Callable[[int, int], None] = lambda position, chunk: None,
) -> WindowLoader:
    return WindowLoader(WindowReader(dataset, hooks, order, Awaiting(await_chunk)), first_window)


def get(loader: WindowLoader) -> LoadedWindow:
    window = loader.get(timeout=30)
    assert window is not None
    return window


@pytest.mark.parametrize(("batch_rows", "window_chunks"), [(16, 3), (1000, 2), (7, 7), (16, 1)])
def test_every_row_comes_once_per_epoch(dataset: Dataset, batch_rows: int, window_chunks: int) -> None:
    seen: Counter[int] = Counter()
    for batch in dataset.batches(HOOKS, batch_rows, window_chunks, epochs=2, seed=5):
        assert set(batch) == {RESID, MLP}
        assert batch[RESID].dtype == torch.bfloat16
        rows = row_numbers(batch)
        assert 0 < len(rows) <= batch_rows
        seen.update(rows)
    assert seen == dict.fromkeys(range(TOTAL), 2)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_order_is_that_of_a_run(dataset: Dataset, seed: int) -> None:
    order = ReadingOrder(dataset.sizes, 3, 3, seed)
    found = [row_numbers(batch) for batch in dataset.batches(HOOKS, 16, 3, epochs=3, seed=seed)]
    assert found == expected(dataset, order, 16)


def test_the_order_is_golden(dataset: Dataset) -> None:
    iterator = dataset.batches([RESID], 12, 3, seed=5)
    first = next(iterator)
    iterator.close()
    assert row_numbers(first) == [56, 20, 79, 38, 28, 61, 40, 73, 39, 32, 108]


def test_rows_of_a_window_are_mixed(dataset: Dataset) -> None:
    iterator = dataset.batches([RESID], 50, 3)
    rows = row_numbers(next(iterator))
    iterator.close()
    edges = np.cumsum([0, *ROWS])
    assert {int(np.searchsorted(edges, row, side="right")) for row in rows} == {1, 2, 3}


def test_one_hook_alone_comes_in_the_same_order(dataset: Dataset) -> None:
    both = [row_numbers(batch) for batch in dataset.batches(HOOKS, 16, 3)]
    alone = [row_numbers(batch) for batch in dataset.batches([RESID], 16, 3)]
    assert both == alone


def test_a_hook_named_twice_is_read_once(dataset: Dataset) -> None:
    for batch in dataset.batches([RESID, RESID], 1000, 7):
        assert list(batch) == [RESID]


def test_a_hook_that_is_not_there_is_refused_at_once(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="'nothing' is not in this dataset"):
        dataset.batches(["nothing"])


def test_closing_stops_the_reading(dataset: Dataset) -> None:
    for taken in range(3):
        iterator = dataset.batches([RESID], 16, 1, epochs=50)
        for _ in range(taken):
            next(iterator)
        iterator.close()
        assert loader_threads() == []
        assert list(iterator) == []


def test_an_iteration_that_ends_stops_by_itself(dataset: Dataset) -> None:
    for _ in dataset.batches([RESID], 1000, 7):
        pass
    assert loader_threads() == []


def test_windows_go_on_from_any_of_them(dataset: Dataset) -> None:
    order = ReadingOrder(dataset.sizes, 2, 3, 5)
    every = expected(dataset, order, 16)
    for first in range(order.n_windows):
        loader = load(dataset, HOOKS, order, first)
        found: list[list[int]] = []
        for number in range(first, order.n_windows):
            loaded = get(loader)
            assert loaded.window == order.window(number)
            assert loaded.n_rows == len(loaded.acts[RESID])
            assert loaded.chunks == tuple(
                order.chunk_at(position) for position in range(loaded.window.start, loaded.window.stop)
            )
            found += [row_numbers(batch) for batch in loaded.batches(16)]
        loader.close()
        assert found == every[len(every) - len(found) :]
        assert found


def test_each_position_is_awaited_before_it_is_read(dataset: Dataset) -> None:
    order = ReadingOrder(dataset.sizes, 2, 3, 5)
    asked: list[tuple[int, int]] = []
    loader = load(dataset, [RESID], order, 0, lambda *wanted: asked.append(wanted))
    for _ in range(order.n_windows):
        get(loader)
    loader.close()
    assert asked == [(position, order.chunk_at(position)) for position in range(order.n_positions)]


def test_a_chunk_that_is_awaited_holds_only_its_window_up(dataset: Dataset) -> None:
    order = ReadingOrder(dataset.sizes, 1, 3, 5)
    committed = threading.Event()

    def await_chunk(position: int, chunk: int) -> None:
        if position == 4:
            committed.wait(30)

    loader = load(dataset, [RESID], order, 0, await_chunk)
    assert get(loader).window.number == 0
    assert loader.get(timeout=0.05) is None
    committed.set()
    assert get(loader).window.number == 1
    loader.close()


def test_close_ends_a_wait(dataset: Dataset) -> None:
    def await_chunk(position: int, chunk: int) -> None:
        assert loader.stop.wait(30)
        raise RuntimeError("stopped")

    loader = load(dataset, [RESID], ReadingOrder((7,), 1, 3, 0), 0, await_chunk)
    loader.close()
    assert loader_threads() == []


def test_an_error_of_the_reading_thread_reaches_the_consumer(dataset: Dataset) -> None:
    def await_chunk(position: int, chunk: int) -> None:
        if position == 3:
            raise RuntimeError("no more")

    loader = load(dataset, [RESID], ReadingOrder((7,), 1, 3, 0), 0, await_chunk)
    assert get(loader).window.number == 0
    with pytest.raises(RuntimeError, match="no more"):
        loader.get(timeout=30)
    loader.close()


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda store: store.delete(commit_key(4)), ObjectMissing),
        (lambda store: store.put(f"activations.zarr/acts/{RESID}/c/4/0", b"x"), DamagedObject),
    ],
)
def test_bad_chunks_stop_the_iteration_with_their_error(
    tmp_path: Path, spoil: Callable[[LocalStore], None], error: type[Exception]
) -> None:
    dataset = make(tmp_path)
    spoil(LocalStore(str(tmp_path)))
    seen = []
    batches = dataset.batches([RESID], 1000, 2)
    for _ in range(2):
        seen += row_numbers(next(batches))
    with pytest.raises(error, match=r"4\.json|c/4/0"):
        next(batches)
    assert sorted(seen) == list(range(sum(ROWS[:4]))), "nothing of the window with the bad chunk"
    eventually(lambda: loader_threads() == [])


def test_a_fault_in_transfer_is_read_again(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LocalStore.get
    spoilt: set[str] = set()
    lock = threading.Lock()

    def get_badly_once(store: LocalStore, key: str) -> bytes:
        with lock:
            first = key not in spoilt
            spoilt.add(key)
        data = real(store, key)
        return data[:-1] if first and RESID in key else data

    monkeypatch.setattr(LocalStore, "get", get_badly_once)
    seen = [row for batch in dataset.batches(HOOKS, 16, 3) for row in row_numbers(batch)]
    assert sorted(seen) == list(range(TOTAL))
    assert any(RESID in key for key in spoilt)


class Mending(AsStored):
    """A supply that notes what it was asked to mend, and does something about it."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self.asked: list[tuple[int, str]] = []
        self._act = act

    def mend(self, chunk: int, error: DataError) -> None:
        self.asked.append((chunk, str(error)))
        self._act(chunk)


def rows_of(*chunks: int) -> list[int]:
    """Numbers of all rows of some chunks."""
    edges = [sum(ROWS[:index]) for index in range(len(ROWS) + 1)]
    return [row for index in chunks for row in range(edges[index], edges[index + 1])]


def test_a_chunk_that_cannot_be_read_is_asked_for_until_it_can(tmp_path: Path) -> None:
    dataset = make(tmp_path)
    key = f"activations.zarr/acts/{RESID}/c/4/0"
    whole = dataset.store.get(key)
    dataset.store.delete(key)

    def act(chunk: int) -> None:
        dataset.store.put(key, whole if len(supply.asked) == 3 else b"not yet")

    supply = Mending(act)
    order = ReadingOrder(dataset.sizes, 1, 3, 5)
    loader = WindowLoader(WindowReader(dataset, HOOKS, order, supply), 0)
    found = [row_numbers(batch) for _ in range(order.n_windows) for batch in get(loader).batches(16)]
    loader.close()
    assert found == expected(dataset, order, 16)
    assert [chunk for chunk, _ in supply.asked] == [4, 4, 4]
    assert all("c/4/0" in error for _, error in supply.asked)


def test_a_chunk_that_is_quarantined_while_it_is_mended_is_left_out(tmp_path: Path) -> None:
    dataset = make(tmp_path)
    dataset.store.delete(f"activations.zarr/acts/{RESID}/c/4/0")
    supply = Mending(lambda chunk: dataset.store.put("quarantine/4.json", b""))
    order = ReadingOrder(dataset.sizes, 2, 3, 5)
    loader = WindowLoader(WindowReader(dataset, HOOKS, order, supply), 0)
    windows = [get(loader) for _ in range(order.n_windows)]
    loader.close()
    assert [chunk for chunk, _ in supply.asked] == [4], "later windows do not try it"
    for epoch in (0, 1):
        part = [window for window in windows if window.window.epoch == epoch]
        chunks = [chunk for window in part for chunk in window.chunks]
        assert sorted(chunks) == [0, 1, 2, 3, 5, 6]
        read = [row for window in part for batch in window.batches(16) for row in row_numbers(batch)]
        assert sorted(read) == rows_of(0, 1, 2, 3, 5, 6)
        assert sum(window.n_rows for window in part) == TOTAL - ROWS[4]


def test_a_quarantined_chunk_is_not_even_awaited(tmp_path: Path) -> None:
    dataset = make(tmp_path)
    dataset.store.put("quarantine/4.json", b"")
    order = ReadingOrder(dataset.sizes, 1, 1, 5)
    asked: list[int] = []
    loader = load(dataset, HOOKS, order, 0, lambda position, chunk: asked.append(chunk))
    windows = [get(loader) for _ in range(order.n_windows)]
    loader.close()
    assert asked == [0, 1, 2, 3, 5, 6]
    empty = windows[4]
    assert (empty.chunks, empty.n_rows, list(empty.batches(16))) == ((), 0, [])
    assert [window.chunks for window in windows] == [(0,), (1,), (2,), (3,), (), (5,), (6,)]


def test_what_nobody_can_mend_is_raised(tmp_path: Path) -> None:
    dataset = make(tmp_path)
    dataset.store.delete(f"activations.zarr/acts/{RESID}/c/4/0")

    def refuse(chunk: int) -> None:
        raise ObjectMissing("nobody can make it again")

    loader = WindowLoader(WindowReader(dataset, HOOKS, ReadingOrder((7,), 1, 3, 0), Mending(refuse)), 1)
    with pytest.raises(ObjectMissing, match="nobody can"):
        loader.get(timeout=30)
    loader.close()


def test_a_dataset_that_keeps_only_a_window_is_read_by_runs_alone(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    dataset = Dataset(store, make_manifest(ROWS, retention="window"))
    with pytest.raises(UserError, match="keeps only a window of its chunks: read it with a run"):
        dataset.batches([RESID])
