"""Permutations never change: golden values, and the published generator as an oracle."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.permutation import counter_hash, derive_key, permutation

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """One output, as the paper writes it, in Python's own integers."""
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_hash_gives_the_published_values() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert counter_hash(1234567, 5).tolist() == published


@given(st.integers(0, MASK), st.integers(0, 50))
def test_hash_is_splitmix64(key: int, n: int) -> None:
    expected = [splitmix64((key + i * 0x9E3779B97F4A7C15) & MASK) for i in range(1, n + 1)]
    assert counter_hash(key, n).tolist() == expected


@pytest.mark.parametrize(
    ("seed", "purpose", "key"),
    [(0, ("window", 0), 11726845889029274815), (7, ("epoch", 1), 16310736734530568869)],
)
def test_keys_are_golden(seed: int, purpose: tuple[str | int, ...], key: int) -> None:
    assert derive_key(seed, *purpose) == key


def test_permutations_are_golden() -> None:
    assert permutation(10, 0, "window", 0).tolist() == [8, 0, 4, 3, 9, 2, 1, 6, 7, 5]
    assert permutation(10, 7, "epoch", 1).tolist() == [4, 8, 9, 0, 6, 5, 1, 7, 3, 2]
    long = permutation(10007, 3, "chunk", 5)
    digest = hashlib.sha256(long.astype("<i8").tobytes()).hexdigest()
    assert digest == "647a00676eb215784532df6a343388307dfa505fd8a9501136d2354b27097fb0"


@given(st.integers(0, 3000), st.integers(-(2**40), 2**40), st.integers(0, 2**40))
def test_every_index_comes_once(n: int, seed: int, index: int) -> None:
    order = permutation(n, seed, "chunk", index)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_seeds_and_purposes_give_different_orders() -> None:
    orders = [
        permutation(100, *arguments)
        for arguments in [(0, "chunk", 0), (1, "chunk", 0), (0, "chunk", 1), (0, "window", 0)]
    ]
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
