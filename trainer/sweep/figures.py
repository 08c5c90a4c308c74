"""The sweep's plots, drawn as the run report's are (`trainer/figures.py`)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.trainer.figures import (
    BOTTOM,
    COLORS,
    GRID,
    HEIGHT,
    LEFT,
    MUTED,
    RIGHT,
    TOP,
    WIDTH,
    compact,
    draw,
    log_view,
    series_color,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = Sequence[Sequence[float | None]]
Points = Sequence[tuple[float, float]]

MARKERS = "osD^vP*X"
_DARK, _LIGHT = "#14181a", "#ffffff"


def heatmap(
    salt: str,
    alt: str,
    columns: Sequence[str],
    rows: Sequence[str],
    cells: Cells,
    axes: tuple[str, str],
    *,
    log: bool = False,
    among: Sequence[float] | None = None,
) -> str:
    """Values of a grid, lowest row at the bottom, each written into its cell; what is missing stays empty.

    Args:
        cells: [rows][columns].
        axes: what columns and rows are.
        log: colours by the logarithm; values of 0 and below get a colour below the lowest of the others.
        among: values that colours reach over, these among them; by default these alone.
    """
    known = [value for line in cells for value in line if value is not None]
    if not known:
        return ""
    scale = known if among is None else among
    scaled = [[_scaled(value, log, scale) for value in line] for line in cells]
    ends = [v for v in (_scaled(value, log, scale) for value in scale) if v is not None]
    low, high = min(ends, default=0.0), max(ends, default=0.0)

    def paint(ax: "Axes") -> None:
        from matplotlib import colormaps
        from matplotlib.colors import to_hex
        from matplotlib.patches import Rectangle

        colours = colormaps["viridis"]
        across, up = (WIDTH - LEFT - RIGHT) / len(columns), (HEIGHT - TOP - BOTTOM) / len(rows)
        size = max(4.0, min(13.0, across / 2.9, 0.6 * up))
        for y, line in enumerate(scaled):
            for x, place in enumerate(line):
                value = cells[y][x]
                share = 0.5 if place is None or high == low else (place - low) / (high - low)
                fill = GRID if place is None else to_hex(colours(share))
                ax.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=fill, linewidth=0))
                if value is not None:
                    ink = _DARK if share > 0.55 else _LIGHT
                    ax.text(x, y, brief(value), ha="center", va="center", color=ink, fontsize=size)
        ax.grid(visible=False)
        ax.set_xlim(-0.5, len(columns) - 0.5)
        ax.set_ylim(-0.5, len(rows) - 0.5)
        ax.set_xticks(range(len(columns)), columns, fontsize=min(11.0, size + 1.5))
        ax.set_yticks(range(len(rows)), rows)
        ax.tick_params(length=0)
        ax.set_xlabel(axes[0])
        ax.annotate(axes[1], (2, BOTTOM - 22), xycoords="figure points", color=MUTED)

    return draw(salt, alt, paint)


def lines(
    salt: str,
    alt: str,
    series: Sequence[tuple[int, Points]],
    axes: tuple[str, str],
    *,
    log_y: bool = True,
) -> str:
    """Values over a logarithmic axis, a line per colour; points at or below 0 on a log axis are left out."""
    shown = [(color, [p for p in points if p[0] > 0 and (p[1] > 0 or not log_y)]) for color, points in series]
    shown = [(color, points) for color, points in shown if points]
    if not shown:
        return ""
    xs = [x for _, points in shown for x, _ in points]
    ys = [y for _, points in shown for _, y in points]

    def paint(ax: "Axes") -> None:
        ax.set_xscale("log")
        for color, points in shown:
            x, y = zip(*points, strict=True)
            marker = MARKERS[color // COLORS % len(MARKERS)]
            ax.plot(x, y, color=series_color(color), linewidth=1.5, marker=marker, markersize=3.5)
        log_view(ax.xaxis, min(xs), max(xs))
        if log_y:
            ax.set_yscale("log")
            log_view(ax.yaxis, min(ys), max(ys))
        else:
            low = max(min(ys), -0.05)
            ax.set_ylim(low - 0.05 * (max(ys) - low + 0.1), max(1.02, *ys))
        ax.set_xlabel(axes[0])

    return draw(salt, alt, paint)


def brief(value: float) -> str:
    """A number as short as a cell wants it: .92, 12, 1.2k."""
    if not math.isfinite(value):
        return ""
    size = abs(value)
    if size >= 1000:
        return compact(float(f"{value:.2g}"))
    text = f"{value:.0f}" if size >= 99.5 else f"{value:.2g}" if size >= 1 or size < 0.005 else f"{value:.2f}"
    text = text.replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")
    return text.replace("0.", ".", 1) if 0 < size < 1 else text


def _scaled(value: float | None, log: bool, known: Sequence[float]) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    if not log:
        return value
    positive = [v for v in known if v > 0 and math.isfinite(v)]
    floor = min(positive, default=1.0) / 2
    return math.log(max(value, floor))
