"""What `penstock plan` finds out."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prices:
    """What storing a GB (10⁹ bytes) for a month and a GPU (or machine) for an hour cost; None: not given."""

    gb_month: float | None = None
    gpu_hour: float | None = None
    months: float = 1.0


@dataclass
class Plan:
    """What `penstock plan` says; see `text.py` for how. Bytes, seconds and counts.

    Attributes:
        estimated: rows are extrapolated from the beginning of the text.
        committed: chunks that are there already.
        parts: bytes and objects of hooks, of the rest of the arrays, and so on.
        at_once: the most bytes of chunks at any time, below their total with `retention: window`.
        memory, device_memory: per kind of process, bytes.
        seconds: per phase; empty without a probe.
        rates: rows per second.
        costs: money; empty without prices.
    """

    url: str
    rows: int = 0
    chunks: int = 0
    sequences_per_chunk: int = 0
    estimated: bool = False
    committed: int = 0
    hooks: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
    at_once: int | None = None
    processes: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    device_memory: dict[str, int] = field(default_factory=dict)
    free_memory: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)
