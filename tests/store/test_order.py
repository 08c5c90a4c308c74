"""The reading order: every chunk once per epoch, windows inside epochs, batches that cover all rows."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.permutation import permutation
from penstock.store.order import ReadingOrder, batch_bounds, first_chunk, locate

SIZES = st.lists(st.integers(1, 15), min_size=1, max_size=4).map(tuple)
ORDERS = st.builds(
    ReadingOrder,
    sizes=SIZES,
    epochs=st.integers(1, 4),
    window_chunks=st.integers(1, 50),
    seed=st.integers(0, 2**40),
)


def chunks(order: ReadingOrder) -> list[int]:
    return [order.chunk_at(position) for position in range(order.n_positions)]


@given(ORDERS)
def test_every_chunk_comes_once_per_epoch(order: ReadingOrder) -> None:
    n = order.n_chunks
    read = chunks(order)
    assert len(read) == n * order.epochs
    for epoch in range(order.epochs):
        assert sorted(read[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(ORDERS)
def test_the_first_epoch_reads_each_dataset_in_its_own_order(order: ReadingOrder) -> None:
    read = chunks(order)[: order.n_chunks]
    for part, size in enumerate(order.sizes):
        own = [chunk for chunk in read if locate(order.sizes, chunk)[0] == part]
        assert [locate(order.sizes, chunk)[1] for chunk in own] == list(range(size))
    if len(order.sizes) == 1:
        assert read == list(range(order.n_chunks))


@given(SIZES)
def test_chunks_are_numbered_through(sizes: tuple[int, ...]) -> None:
    numbers = [first_chunk(sizes, part) + index for part, size in enumerate(sizes) for index in range(size)]
    assert numbers == list(range(sum(sizes)))
    places = [(part, index) for part, size in enumerate(sizes) for index in range(size)]
    assert [locate(sizes, chunk) for chunk in numbers] == places
    for outside in (-1, sum(sizes)):
        with pytest.raises(IndexError):
            locate(sizes, outside)


def test_datasets_are_interleaved_evenly() -> None:
    """Of every stretch of the first epoch each dataset has about its share; the seed says which chunks."""
    sizes = (600, 200)
    read = chunks(ReadingOrder(sizes, 1, 8, seed=5))
    for start in range(0, 800, 100):
        second = sum(chunk >= 600 for chunk in read[start : start + 100])
        assert 10 <= second <= 40, "25 are to be expected, with a standard deviation of 4"
    assert chunks(ReadingOrder(sizes, 1, 8, seed=6)) != read


@given(ORDERS)
def test_windows_cover_all_positions_without_crossing_epochs(order: ReadingOrder) -> None:
    windows = [order.window(number) for number in range(order.n_windows)]
    covered = [p for window in windows for p in range(window.start, window.stop)]
    assert covered == list(range(order.n_positions))
    for window in windows:
        assert 0 < window.stop - window.start <= order.window_chunks
        assert window.start // order.n_chunks == (window.stop - 1) // order.n_chunks == window.epoch
    short = Counter(w.epoch for w in windows if w.stop - w.start < order.window_chunks)
    assert all(count == 1 for count in short.values()), "only the last of an epoch may be short"


@given(ORDERS)
def test_windows_are_found_by_their_start(order: ReadingOrder) -> None:
    starts = {order.window(number).start: number for number in range(order.n_windows)}
    starts[order.n_positions] = order.n_windows
    for position in range(order.n_positions + 1):
        if position in starts:
            assert order.window_starting_at(position) == starts[position]
        else:
            with pytest.raises(ValueError, match="not a window boundary"):
                order.window_starting_at(position)


@given(st.integers(0, 5000), st.integers(1, 600))
def test_batches_cover_all_rows_near_equally(n_rows: int, batch_rows: int) -> None:
    bounds = batch_bounds(n_rows, batch_rows)
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(n_rows))
    sizes = [stop - start for start, stop in bounds]
    assert len(sizes) == -(-n_rows // batch_rows)
    if sizes:
        assert max(sizes) <= batch_rows
        assert max(sizes) - min(sizes) <= 1


def test_batches_are_golden() -> None:
    assert batch_bounds(10, 4) == [(0, 3), (3, 6), (6, 10)]
    assert batch_bounds(8, 4) == [(0, 4), (4, 8)]
    assert batch_bounds(3, 4) == [(0, 3)]
    assert batch_bounds(0, 4) == []


def test_epochs_are_golden() -> None:
    order = ReadingOrder(sizes=(10,), epochs=3, window_chunks=4, seed=7)
    assert chunks(order) == [
        *[0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        *[4, 8, 9, 0, 6, 5, 1, 7, 3, 2],
        *[2, 0, 5, 9, 6, 7, 4, 3, 1, 8],
    ]


def test_epochs_of_several_datasets_are_golden() -> None:
    order = ReadingOrder(sizes=(5, 3, 2), epochs=2, window_chunks=4, seed=7)
    assert chunks(order) == [
        *[0, 5, 1, 8, 2, 9, 6, 3, 4, 7],
        *[4, 8, 9, 0, 6, 5, 1, 7, 3, 2],
    ]


def test_the_order_depends_on_the_seed_and_not_on_the_window() -> None:
    first = chunks(ReadingOrder((30,), 2, 4, seed=0))
    assert chunks(ReadingOrder((30,), 2, 7, seed=0)) == first
    assert chunks(ReadingOrder((30,), 2, 4, seed=1)) != first
    assert chunks(ReadingOrder((30,), 3, 4, seed=0))[:60] == first, "more epochs only go on"


def test_rows_are_permuted_anew_in_each_window() -> None:
    order = ReadingOrder(sizes=(10,), epochs=2, window_chunks=4, seed=7)
    permuted = [order.row_order(order.window(number), 50) for number in range(order.n_windows)]
    for number, rows in enumerate(permuted):
        assert np.array_equal(np.sort(rows), np.arange(50))
        assert np.array_equal(rows, permutation(50, 7, "window", number))
    assert len({tuple(rows.tolist()) for rows in permuted}) == order.n_windows
