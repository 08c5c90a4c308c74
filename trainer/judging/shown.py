"""What an experiment shows: figures and tables, each with all of its data."""

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Shown:
    """A figure or table with all of its data. `svg` is empty for a plain table."""

    name: str
    title: str
    note: str
    columns: list[str]
    rows: list[list[object]]
    svg: Markup = Markup("")  # noqa: RUF009 (a string, which nobody can change)
