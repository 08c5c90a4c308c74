"""Plots of tasks and features, drawn as the run report's are (`trainer/figures.py`).

Values that are missing are left out.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.trainer.figures import (
    GRID,
    INK,
    MUTED,
    compact,
    dots,
    draw,
    log_view,
    sampled,
    series_color,
    tone,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = Sequence[float | None]
Group = tuple[str, str, Sequence[tuple[float, float]]]
"""Name, colour and points (x, y)."""

MAX_DOTS = 200
"""Dots of a group that are drawn; its data hold all of them."""
MAX_LINES = 160
LABEL_CHARACTERS = 12
SMALL = 7.5
_GOLDEN = 0.6180339887


def strips(
    salt: str, alt: str, names: Sequence[str], groups: Sequence[tuple[str, str, Sequence[Values]]]
) -> str:
    """Values in a column per name, one dot each, spread sideways; the column's median as a line.

    Args:
        groups: what is told apart: name, colour, and values per column.
    """
    columns = [[v for _, _, values in groups for v in values[x] if v is not None] for x in range(len(names))]
    every = [v for column in columns for v in column]
    if not every:
        return ""

    def paint(ax: "Axes") -> None:
        ax.axhline(0.0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        for _, color, values in groups:
            places = [
                (x + 0.7 * ((i * _GOLDEN) % 1 - 0.5), v)
                for x in range(len(names))
                for i, v in enumerate(sampled([v for v in values[x] if v is not None], MAX_DOTS))
            ]
            dots(ax, places, color, 2.2)
        for x, column in enumerate(columns):
            if column:
                middle = float(np.median(column))
                ax.plot([x - 0.38, x + 0.38], [middle, middle], color=INK, linewidth=1.6)
        _columns(ax, names)
        _view(ax, min(every), max(every))

    return draw(salt, alt, paint)


def parallel(
    salt: str,
    alt: str,
    names: Sequence[str],
    groups: Sequence[tuple[str, str, Sequence[Sequence[float]]]],
) -> str:
    """A thin line per item across the columns, and a thick one for the median of each group.

    Args:
        groups: name, colour, and lines, each with a value per column.
    """
    every = [value for _, _, lines in groups for line in lines for value in line]
    if not every or len(names) < 2:
        return ""
    share = max(1, MAX_LINES // len(groups))

    def paint(ax: "Axes") -> None:
        for _, color, lines in groups:
            for line in sampled(lines, share):
                ax.plot(range(len(names)), line, color=color, linewidth=0.5, alpha=0.25)
        for _, color, lines in groups:
            if lines:
                ax.plot(range(len(names)), np.median(lines, axis=0), color=color, linewidth=1.8)
        _columns(ax, names)
        _view(ax, min(every), max(every))

    return draw(salt, alt, paint)


def scatter(
    salt: str, alt: str, groups: Sequence[Group], axes: tuple[str, str], *, log_x: bool = False
) -> str:
    """A dot per pair; on a logarithmic axis those at or below 0 are left out.

    Args:
        axes: what x and y are.
    """
    shown = [(c, [p for p in points if p[0] > 0 or not log_x]) for _, c, points in groups]
    every = [point for _, points in shown for point in points]
    if not every:
        return ""

    def paint(ax: "Axes") -> None:
        ax.axhline(0.0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        if log_x:
            ax.set_xscale("log")
        for color, points in shown:
            dots(ax, sampled(points, MAX_DOTS), color, 2.4)
        low, high = min(x for x, _ in every), max(x for x, _ in every)
        if log_x:
            log_view(ax.xaxis, low, high)
        else:
            margin = 0.04 * (high - low) or 1.0
            ax.set_xlim(low - margin, high + margin)
        ax.set_xlabel(axes[0])
        _view(ax, min(y for _, y in every), max(y for _, y in every))

    return draw(salt, alt, paint)


def levels(
    salt: str, alt: str, names: Sequence[str], values: Values, level: float, label: str, spread: Values
) -> str:
    """A share per column with ± its standard error, beside a level that is the same for all."""
    if all(value is None for value in values):
        return ""

    def paint(ax: "Axes") -> None:
        ax.axhline(level, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        ax.annotate(label, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=INK)
        shares = [value for value in values if value is not None]
        for x, (value, error) in enumerate(zip(values, spread, strict=True)):
            if value is not None:
                ax.plot([x, x], [value - (error or 0), value + (error or 0)], color=MUTED, linewidth=1.2)
                ax.plot(x, value, "o", color=series_color(0), markersize=5.5)
                under: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top"}
                ax.annotate(
                    f"{value:.2f}", (x, value - (error or 0)), (0, -4), color=MUTED, fontsize=SMALL, **under
                )
        ax.set_ylim(0, min(1.02, 1.25 * max(level, *shares)))
        _columns(ax, names)

    return draw(salt, alt, paint)


def stacks(
    salt: str, alt: str, names: Sequence[str], groups: Sequence[tuple[str, str, Sequence[float]]]
) -> str:
    """Bars of several parts, each with its size written into it.

    Args:
        groups: name, colour, and size per bar.
    """
    if not names:
        return ""
    tallest = max(sum(sizes[x] for _, _, sizes in groups) for x in range(len(names))) or 1

    def paint(ax: "Axes") -> None:
        bottoms = [0.0] * len(names)
        for _, color, sizes in groups:
            bars: dict[str, Any] = {"width": 0.62, "alpha": 0.75, "linewidth": 0}
            ax.bar(range(len(names)), sizes, bottom=bottoms, color=color, **bars)
            for x, size in enumerate(sizes):
                if size > 0.045 * tallest:
                    middle = bottoms[x] + size / 2
                    ax.text(x, middle, compact(size), ha="center", va="center", color=INK, fontsize=SMALL)
            bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
        _columns(ax, names)
        ax.set_ylim(0, 1.03 * tallest)

    return draw(salt, alt, paint)


def effects(salt: str, alt: str, columns: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> str:
    """A dot per feature in a column per dictionary, linear around 0 and logarithmic farther off.

    Args:
        columns: name, and (feature, effect) in order; the numbers of the first and the last are written.
    """
    every = [abs(value) for _, found in columns for _, value in found]
    if not any(every):
        return ""
    near = 10.0 ** (math.floor(math.log10(max(every))) - 2)

    def paint(ax: "Axes") -> None:
        ax.set_yscale("symlog", linthresh=near, linscale=0.5)
        ax.axhline(0.0, color=MUTED, linewidth=0.8)
        for x, (_, found) in enumerate(columns):
            some = sampled(found, MAX_DOTS)
            places = [(x + 0.5 * ((i * _GOLDEN) % 1 - 0.5), v) for i, (_, v) in enumerate(some)]
            dots(ax, places, tone(x), 4.0)
            for (feature, value), at in zip(found[:1], places[:1], strict=True):
                _number(ax, feature, (at[0], value), 4, tone(x))
            for (feature, value), at in zip(found[1:][-1:], places[1:][-1:], strict=True):
                _number(ax, feature, (at[0], value), -4, tone(x))
        _columns(ax, [name for name, _ in columns])
        top = max(0.0, *(value for _, found in columns for _, value in found))
        low = min(0.0, *(value for _, found in columns for _, value in found))
        ax.set_ylim(min(2.2 * low, low - near), max(2.2 * top, top + near))
        ticks = [near * factor for factor in (1, 10, 100)]
        ax.set_yticks([-t for t in reversed(ticks)] + [0.0, *ticks])
        ax.yaxis.set_major_formatter(lambda value, _: compact(value))
        ax.set_yticks([], minor=True)
        ax.set_ylim(min(2.2 * low, low - near), max(2.2 * top, top + near))

    return draw(salt, alt, paint)


def _number(ax: "Axes", feature: int, at: tuple[float, float], up: int, color: str) -> None:
    side = "bottom" if up > 0 else "top"
    text: dict[str, Any] = {"ha": "center", "va": side, "fontsize": SMALL, "color": color}
    ax.annotate(str(feature), at, (0, up), textcoords="offset points", **text)


def _columns(ax: "Axes", names: Sequence[str]) -> None:
    """Names below columns; of many, as many as there is room for."""
    every = math.ceil(len(names) / 12)
    short = [name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "…" for name in names]
    size = SMALL if len(names) > 5 or max(map(len, short)) > 8 else 9.0
    ax.set_xticks(range(0, len(names), every), short[::every], fontsize=size)
    # two rows, where one has no room for all of them
    if sum(map(len, short[::every])) * size * 0.6 > 310:
        for label in ax.get_xticklabels()[1::2]:
            label.set_y(-0.06)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.grid(visible=True, axis="y", color=GRID)


def _view(ax: "Axes", low: float, high: float) -> None:
    room = (high - low) or 1.0
    ax.set_ylim(low - 0.05 * room, high + 0.06 * room)
