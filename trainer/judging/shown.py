"""What an experiment shows: figures and tables, each with all of its data."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from penstock.trainer.figures import tone_variable

AT_ONCE = 20
"""Rows that a table shows without being asked."""


@dataclass(frozen=True)
class Table:
    """What the page's table has where the data would not fit: a selection, or the same turned round."""

    columns: list[str]
    rows: list[list[object]]


@dataclass(frozen=True)
class Shown:
    """A figure or table with all of its data. `svg` is empty for a plain table.

    Attributes:
        rows: all data, as the CSV has them.
        table: what the page has in their stead.
        folded: the page's table opens when asked to; long ones do anyway.
        legend: name, variable of the page with its colour, and dash pattern.
    """

    name: str
    title: str
    note: str
    columns: list[str]
    rows: list[list[object]]
    svg: Markup = Markup("")  # noqa: RUF009 (a string, which nobody can change)
    table: Table | None = None
    legend: tuple[tuple[str, str, str], ...] = ()
    folded: bool = False


def with_l0(name: str, l0: float | None) -> str:
    """A dictionary's name where its figures stand."""
    return name if l0 is None else f"{name} (L0 {l0:.1f})"


def keyed(names: Sequence[str], first: int = 0) -> tuple[tuple[str, str, str], ...]:
    """A legend for names in the order of tones, from one of them on."""
    return tuple((name, tone_variable(first + i), "") for i, name in enumerate(names))
