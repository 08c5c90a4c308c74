"""A sweep's numbers in rows and columns: families, grids over penalty and size, CSV files."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.trainer.sweep.measure import Record

SYMBOLS = {"alpha": "α", "l1_coefficient": "λ", "k": "k", "l0_target": "L0 target", "l0_coefficient": "L0 λ"}


@dataclass(frozen=True)
class Family:
    """The SAEs of one kind on one hook point: what a heatmap shows."""

    hook_name: str
    architecture: str
    penalty: str | None
    records: Sequence[Record]

    @property
    def title(self) -> str:
        return f"{self.architecture} on {self.hook_name}"

    @property
    def penalties(self) -> list[float]:
        return sorted({penalty_value(record) for record in self.records} - {math.nan})

    @property
    def sizes(self) -> list[int]:
        return sorted({record["d_sae"] for record in self.records})

    def size_names(self) -> list[str]:
        """Sizes as multiples of the number of true features, where that is known."""
        ratios = {record["d_sae"]: record["size_ratio"] for record in self.records}
        return [f"{size:,}" if ratios[size] is None else f"{ratios[size]:g}×" for size in self.sizes]

    def cells(self, field: str) -> list[list[float | None]]:
        """[sizes][penalties] means over seeds; None where nothing is known."""
        return [
            [
                _mean(r.get(field) for r in self.records if r["d_sae"] == size and penalty_value(r) == value)
                for value in self.penalties
            ]
            for size in self.sizes
        ]


def families(records: Iterable[Record]) -> list[Family]:
    """Records by hook point, kind and penalty, in order of appearance."""
    found: dict[tuple[str, str, str | None], list[Record]] = {}
    for record in records:
        key = record["hook_name"], record["architecture"], record["penalty"]
        found.setdefault(key, []).append(record)
    return [Family(*key, members) for key, members in found.items()]


def penalty_value(record: Record) -> float:
    """To three digits, as in the grid; 0 for kinds that have no penalty."""
    penalty = record["penalty"]
    return float(f"{record[penalty]:.3g}") if penalty else 0.0


def write_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV; None is an empty cell, numbers keep all their digits."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def all_fields(records: Sequence[Record]) -> list[Record]:
    """The records with the same keys, in order of appearance."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [{key: record.get(key) for key in keys} for record in records]


def _mean(values: Iterable[Any]) -> float | None:
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None
