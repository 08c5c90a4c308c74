"""Memory of this machine and of this process."""

import ctypes
from pathlib import Path

import torch

UNKNOWN = 1 << 62


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
_OWN_MAPPING = 2**28
"""Blocks of this size on, windows for instance, are mapped one by one and unmapped when freed: no holes."""


def keep_freed_memory() -> None:
    """Let the allocator of this process keep what is freed for what is allocated next.

    glibc hands large blocks back to the kernel as soon as they are freed. Every forward pass and every step
    allocates the same blocks again, and gets them as pages of 4 KiB that are zeroed one fault at a time: a
    quarter of a processor's time. The process keeps the most memory that it ever needed instead. Does nothing
    where the C library is another one.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        libc.mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING)


def free_bytes(device: torch.device) -> int:
    """What is free on a device; `UNKNOWN` where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _field("/proc/meminfo", "MemAvailable", UNKNOWN) if device.type == "cpu" else UNKNOWN


def held_bytes() -> int:
    """What this process has in memory; 0 where nobody says."""
    return _field("/proc/self/status", "VmRSS", 0)


def peak_bytes() -> int:
    """The most that this process had in memory since `reset_peak`; 0 where nobody says."""
    return _field("/proc/self/status", "VmHWM", 0)


def reset_peak() -> None:
    """Forget the most that this process had in memory, where the system lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _field(file: str, name: str, unknown: int) -> int:
    path = Path(file)
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return unknown
