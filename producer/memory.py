"""What a producer holds of its chunks in memory, and how many objects it may write at a time.

One chunk is being made while another is being stored. Of the latter each writing thread holds one array
twice, laid out and encoded. The allocator keeps some of what was given back: as much again per thread, and a
quarter of everything, by measurement. The model and its forward pass come on top.
"""

from penstock.common.errors import ConfigError

STORE_THREADS = 8
"""Objects written at a time, at most."""
OBJECTS_PER_THREAD = 4
KEPT = 1.25


def bytes_held(chunk_bytes: int, largest_object: int, threads: int) -> int:
    """The most that a producer holds of its chunks."""
    return int(KEPT * (2 * chunk_bytes + OBJECTS_PER_THREAD * threads * largest_object))


def store_threads(chunk_bytes: int, largest_object: int, memory_bytes: int) -> int:
    """Objects that may be written at a time within a budget.

    Raises:
        ConfigError: not even one.
    """
    threads = int((memory_bytes / KEPT - 2 * chunk_bytes) // (OBJECTS_PER_THREAD * max(1, largest_object)))
    if threads < 1:
        needed = bytes_held(chunk_bytes, largest_object, 1)
        raise ConfigError(
            f"dataset.memory_bytes: {memory_bytes / 1e6:,.0f} MB, but chunks of {chunk_bytes / 1e6:,.0f} MB "
            f"need {needed / 1e6:,.0f} MB; raise it, or lower dataset.sequences_per_chunk"
        )
    return min(STORE_THREADS, threads)
