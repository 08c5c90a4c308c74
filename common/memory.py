"""Memory of this machine and of this process."""

from pathlib import Path

import torch

UNKNOWN = 1 << 62


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
