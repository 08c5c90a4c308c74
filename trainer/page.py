"""What pages are made of: values as text, figures with their data, and the templates' environment.

Anything may be missing: such a value is shown as "—".
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files

from jinja2 import Environment, FunctionLoader
from markupsafe import Markup

MISSING = "—"


@dataclass(frozen=True)
class Card:
    """One figure with what belongs to it. `svg` is empty when there is nothing to draw."""

    title: str
    note: str
    svg: Markup
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    legend: Sequence[tuple[str, str, str]] = field(default=())  # name, CSS colour, dash pattern
    numeric: Sequence[bool] = field(default=())  # columns; by default all but the first
    source: str = ""  # where all of the rows are


def render(template: str, **values: object) -> str:
    """A page from one of this room's templates: one file that asks nothing of a network."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_read)
    )
    filters = (bar, count, duration, number, or_dash, percent, ratio, setting, size, when)
    environment.filters |= {write.__name__: write for write in filters}
    return environment.get_template(template).render(style=Markup(_read("page.css")), **values)


def _read(name: str) -> str:
    return files("penstock.trainer").joinpath(name).read_text(encoding="utf-8")


def finite(value: object) -> float | None:
    """`value` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        amount = float(value)
    except OverflowError:  # JSON has integers that no float holds
        return None
    return amount if math.isfinite(amount) else None


def _shown(write: Callable[[float], str]) -> Callable[[object], str]:
    """A filter that writes finite numbers and gives "—" for everything else."""

    @functools.wraps(write)
    def filter_(value: object) -> str:
        amount = finite(value)
        return MISSING if amount is None else write(amount).replace("-", "\N{MINUS SIGN}")

    return filter_


@_shown
def count(value: float) -> str:
    return f"{value:,.0f}"


@_shown
def number(value: float) -> str:
    """Four significant digits, as many as a table can use."""
    plain = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"
    return plain.removesuffix(".")


@_shown
def setting(value: float) -> str:
    return f"{value:g}"


@_shown
def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


@_shown
def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


@_shown
def size(value: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    step = min(len(units) - 1, int(math.log10(max(1.0, abs(value))) / 3))
    return f"{value / 1000**step:.3g} {units[step]}"


def when(value: object) -> str:
    """A Unix time in UTC, to the minute."""
    amount = finite(value)
    try:
        if amount is not None:
            return datetime.fromtimestamp(amount, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        pass  # a number no calendar has
    return MISSING


def bar(value: object) -> str:
    """A share as a CSS width: 0 to 100 %."""
    return f"{100 * min(1.0, max(0.0, finite(value) or 0.0)):.2f}%"


def ratio(value: object, whole: object) -> float | None:
    part, of = finite(value), finite(whole)
    return part / of if part is not None and of else None


def or_dash(value: object) -> str:
    """Text, or "—" where there is none. (An undefined template value is false.)"""
    if isinstance(value, float) and not math.isfinite(value):
        return MISSING
    return str(value) if value or value == 0 else MISSING
