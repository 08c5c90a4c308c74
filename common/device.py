"""torch devices: from a setting, and what kind of hardware one is."""

import platform
from pathlib import Path

import torch

from penstock.common.errors import ConfigError


def open_device(name: str, field: str) -> torch.device:
    """The device that a setting names.

    Args:
        field: the setting, for the message.

    Raises:
        ConfigError: no such device, or not here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{field}: {name!r} is not a torch device; try cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{field}: {name} is asked for, but torch sees no CUDA device here")
    return device


def device_kind(device: torch.device) -> str:
    """The kind of hardware: another instruction set, vendor or card gives other bits."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"cpu {platform.machine()} {_cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}"


def _cpu_vendor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":")[1].strip()
    return platform.processor() or "unknown"
