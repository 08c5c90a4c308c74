"""Lines over positions and matrices of dictionaries, drawn as the run report's figures are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from penstock.trainer.figures import (
    BOTTOM,
    COLORS,
    HEIGHT,
    MUTED,
    TOP,
    draw,
    log_view,
    series_color,
)
from penstock.trainer.sweep.figures import Cells, heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAND = 1.96
"""Standard errors on either side of a mean, for 95 %."""
PER_FIGURE = COLORS
"""Lines that colours still tell apart."""
_ROOM = 0.34
"""Width for the lines' names, as a share of the positions'."""
_LETTERS = 17


def shared_out(names: Sequence[str], hooks: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Dictionaries as (place, colour) by figure, so that colours tell the lines of each apart.

    Where there are too many for one figure, a figure has all of a hook point, or the first of every hook
    point, the second of every one and so on, as kinds are mostly listed. If neither comes out well, figures
    are of one size.
    """
    many = len(names)
    if many <= PER_FIGURE:
        return [[(i, i) for i in range(many)]]
    met: dict[str, list[int]] = {}
    turns: dict[int, list[int]] = {}
    for i, hook in enumerate(hooks):
        met.setdefault(hook, []).append(i)
        turns.setdefault(len(met[hook]), []).append(i)
    ways = [list(way.values()) for way in (met, turns)]
    ways = [way for way in ways if all(2 <= len(some) <= PER_FIGURE for some in way)]
    count = math.ceil(many / PER_FIGURE)
    even = [list(range(many * i // count, many * (i + 1) // count)) for i in range(count)]
    best = min(ways, key=len, default=even)
    if len(met) <= PER_FIGURE and all(len({hooks[i] for i in some}) == len(some) for some in best):
        order = list(met)  # a hook point has the same colour in all figures
        return [[(i, order.index(hooks[i])) for i in some] for some in best]
    return [[(i, color) for color, i in enumerate(some)] for some in best]


def in_common(names: Sequence[str]) -> str:
    """What is the same in names whose parts are joined by `-`: topk of layer0-topk and layer1-topk."""
    parts = [name.split("-") for name in names]
    return "-".join(part for part in parts[0] if all(part in other for other in parts[1:]))


@dataclass(frozen=True)
class Line:
    """Means by position with their standard errors; null where there is none."""

    name: str
    means: Sequence[float | None]
    errors: Sequence[float | None]
    color: int = 0

    def points(self) -> list[tuple[int, float, float]]:
        """(position, mean, half of the band's width)."""
        pairs = enumerate(zip(self.means, self.errors, strict=True))
        return [(p, mean, BAND * (error or 0.0)) for p, (mean, error) in pairs if mean is not None]


def by_position(
    salt: str,
    alt: str,
    lines: Sequence[Line],
    trained_context: int,
    context: int,
    view: tuple[float, float] = (-math.inf, math.inf),
) -> Markup:
    """A line with its 95 % band per dictionary, each named at its end; where training ended is marked.

    The scale is logarithmic where values differ much and are above 0.

    Args:
        view: what values are of interest. The scale is linear and never goes beyond; a position whose band
            alone is as wide is left out.
    """
    width = view[1] - view[0]
    shown = [(line.color, line, [point for point in line.points() if 2 * point[2] < width]) for line in lines]
    shown = [entry for entry in shown if entry[2]]
    if not shown:
        return Markup("")
    values = [mean for _, _, points in shown for _, mean, _ in points]
    log_y = math.isinf(width) and min(values) > 0 and max(values) > 8 * min(values)

    def paint(ax: "Axes") -> None:
        for color, _, points in shown:
            x, y, half = (list(part) for part in zip(*points, strict=True))
            below = [max(a - h, 0.5 * a) if log_y else a - h for a, h in zip(y, half, strict=True)]
            above = [a + h for a, h in zip(y, half, strict=True)]
            ax.fill_between(x, below, above, color=series_color(color), alpha=0.2, linewidth=0)
            ax.plot(x, y, color=series_color(color), linewidth=1.3)
        ax.set_xlim(0, context * (1 + _ROOM))
        if log_y:
            ax.set_yscale("log")
            log_view(ax.yaxis, min(values), max(values))
        else:
            low, high = (min(max(value, view[0]), view[1]) for value in (min(values), max(values)))
            margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
            ax.set_ylim(low - margin, high + margin)
        ax.set_xticks(_ticks(context))
        if trained_context < context:
            # between the last position that was trained on and the first that was not
            ax.axvline(trained_context - 0.5, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        ax.set_xlabel("position (from 0)", loc="left")
        _name(ax, [(color, line.name, points[-1][1]) for color, line, points in shown], context)

    return Markup(draw(salt, alt, paint))


def _name(ax: "Axes", ends: list[tuple[int, str, float]], context: int) -> None:
    """Names at the ends of lines, moved apart where they would cover each other."""
    # a logarithmic axis transforms what it is given only once its limits are settled
    to_axes = ax.transData + ax.transAxes.inverted()
    height = HEIGHT - TOP - BOTTOM
    gap = 11.0 / height
    ends = [(color, name, min(max(y, ax.get_ylim()[0]), ax.get_ylim()[1])) for color, name, y in ends]
    wanted = sorted((float(to_axes.transform((0.0, y))[1]), color, name) for color, name, y in ends)
    places: list[float] = []
    for y, _, _ in wanted:
        places.append(max(y, places[-1] + gap) if places else max(y, 0.02))
    # what was pushed above the top pushes back
    limit = 0.98
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    start = 1 / (1 + _ROOM)
    for (y, color, name), place in zip(wanted, places, strict=True):
        ax.annotate(
            name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…",
            xy=(start + 0.004, y),
            xytext=(start + 0.035, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=series_color(color),
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0.0, 0.5),
                "color": series_color(color),
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )


def _ticks(context: int) -> list[int]:
    step = 2 ** max(0, math.ceil(math.log2(context / 5)))
    return list(range(0, context + 1, step))


def matrix(
    salt: str, alt: str, columns: Sequence[str], rows: Sequence[str], cells: Cells, axes: tuple[str, str]
) -> Markup:
    """Ratios as a heatmap with the first row at the top, colours by the logarithm."""
    reverse = list(reversed(cells)), list(reversed(rows))
    return Markup(heatmap(salt, alt, columns, reverse[1], reverse[0], axes, log=True))
