"""Permutations that never change: argsorts of a fixed counter hash of (seed, purpose, index).

Library generators change between versions and languages; a dataset's order must not. The hash is
SplitMix64's finaliser (Steele, Lea & Flood 2014) over a key derived from the seed and purpose; golden
values are held by tests, and any language can implement it in a few lines.
"""

import hashlib

import numpy as np
import numpy.typing as npt

_GAMMA = 0x9E3779B97F4A7C15


def derive_key(seed: int, *purpose: str | int) -> int:
    """A 64-bit key for one use of a seed, e.g. `derive_key(0, "window", 3)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def counter_hash(key: int, n: int) -> npt.NDArray[np.uint64]:
    """[n] pseudo-random 64-bit integers: SplitMix64 outputs number 1…n of the stream `key`."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permutation(n: int, seed: int, *purpose: str | int) -> npt.NDArray[np.int64]:
    """[n] a permutation of 0…n−1, the same for ever for the same arguments."""
    order = np.argsort(counter_hash(derive_key(seed, *purpose), n), kind="stable")
    return order.astype(np.int64)
