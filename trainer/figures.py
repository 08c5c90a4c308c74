"""The report's plots: matplotlib axes turned into inline SVG that follows the page's colours.

matplotlib writes literal colours, the page is read in light and dark. So every plot is drawn with
stand-in colours, and the finished SVG has them replaced by CSS variables of the page
(`_VARIABLES`). Text stays text: the browser sets it in the page's font, and it can be searched.

The same input gives the same bytes: element ids come from a fixed salt per figure, nothing is
dated, and the reader's own matplotlib settings are set aside.
"""

import io
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from penstock.trainer.svg import inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

COLORS = 8  # --s0 … --s7 in the page; with more SAEs than that they repeat
TONES = 2 * COLORS  # and --t0 … --t7, the same darker (lighter on dark), where marks alone tell SAEs apart
DASHES = ("", "5 2.5", "1.5 2", "8 2.5 1.5 2.5")  # one per hook, in units of the view box

# View box units. A figure is shown about 1.35 times as large on a desktop, 1.1 times on a phone.
WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 36
FONT = 10
STEPS = (1, 2, 2.5, 5, 10)  # between the ticks of an axis

# A line keeps at most this many points: more cannot be told apart at this size.
MAX_POINTS = 400
DOT_LAYERS = 4

INK, MUTED, GRID, SURFACE, PRODUCED, TRAINED = (f"#a1000{i}" for i in range(6))
_VARIABLES = dict(
    zip(
        (INK, MUTED, GRID, SURFACE, PRODUCED, TRAINED),
        ("--ink", "--muted", "--grid", "--surface", "--produced", "--trained"),
        strict=True,
    )
) | {f"#a{tone}000{i}": f"--{letter}{i}" for tone, letter in ((2, "s"), (3, "t")) for i in range(COLORS)}

T = TypeVar("T")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One SAE in a plot. `points` are finite (x, y), in order of x."""

    name: str
    color: int  # 0 … COLORS-1
    dash: int  # 0 … len(DASHES)-1
    points: Points


def series_color(index: int) -> str:
    return f"#a2000{index % COLORS}"


def tone(index: int) -> str:
    """A colour of its own for each of `TONES`."""
    return f"#a{2 + index // COLORS % 2}000{index % COLORS}"


def tone_variable(index: int) -> str:
    """The page's variable of a tone, for legends."""
    return _VARIABLES[tone(index)]


def dots(ax: "Axes", points: Points, color: str, size: float) -> None:
    """Many small dots, which show through where they are dense.

    Lines without length and with round ends: a few characters each in the page. They are dealt out to a few
    paths, as within a path nothing shows through.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    for share in (points[i::DOT_LAYERS] for i in range(DOT_LAYERS)):
        if share:
            path = Path([p for p in share for _ in range(2)], [Path.MOVETO, Path.LINETO] * len(share))
            style: dict[str, Any] = {"fill": False, "linewidth": size, "capstyle": "round", "alpha": 0.6}
            ax.add_patch(PathPatch(path, edgecolor=color, **style))


def sampled(items: Sequence[T], cap: int) -> list[T]:
    """At most `cap` items, evenly spaced, the first and the last among them."""
    if len(items) <= cap:
        return list(items)
    return [items[round(i * (len(items) - 1) / (cap - 1))] for i in range(cap)]


def curves(salt: str, alt: str, series: Sequence[Series], *, log_y: bool, unit_y: bool) -> str:
    """One line per SAE over rows trained.

    `unit_y`: a share whose best value is 1, see `cut_at_zero`.
    """
    lines = [s for s in series if s.points]
    if log_y:
        lines = [_replace_points(s, [p for p in s.points if p[1] > 0]) for s in lines]
    if not any(s.points for s in lines):
        return ""
    values = [y for s in lines for _, y in s.points]

    def paint(ax: "Axes") -> None:
        for s in lines:
            x, y = zip(*sampled(s.points, MAX_POINTS), strict=True) if s.points else ((), ())
            ax.plot(x, y, color=series_color(s.color), linestyle=_linestyle(s.dash), linewidth=1.6)
            if len(x) == 1:
                ax.plot(x, y, "o", color=series_color(s.color), markersize=4)
        if log_y:
            ax.set_yscale("log")
            log_view(ax.yaxis, min(values), max(values))
        elif unit_y:
            low = -0.04 if cut_at_zero(values) else min(values) - 0.03
            ax.set_ylim(low, max(1.02, *values))
        else:
            ax.set_ylim(min(0.0, min(values)), max(values) * 1.12 if max(values) > 0 else 1.0)
        start_at_zero(ax, max(x for s in lines for x, _ in s.points))
        ax.set_xlabel("rows trained")

    return draw(salt, alt, paint)


def cut_at_zero(shares: Sequence[float]) -> bool:
    """Whether a view of these ends at 0.

    The first steps can lie far below and would flatten everything after them. While nothing has
    risen above 0, they are all there is to see.
    """
    return bool(shares) and min(shares) < -0.01 and max(shares) > 0.1


def frontier(salt: str, alt: str, points: Sequence[tuple[Series, str]]) -> str:
    """Each SAE at (L0, a share whose best value is 1), with its name.

    The string of a pair names its family: members of a family, one hook and one architecture at
    several sparsities, are joined by a thin line. 1 is always in view.
    """
    shown = [(s, family) for s, family in points if s.points and s.points[0][0] > 0]
    if not shown:
        return ""
    xs = [s.points[0][0] for s, _ in shown]
    ys = [s.points[0][1] for s, _ in shown]

    def paint(ax: "Axes") -> None:
        ax.set_xscale("log")
        middle = math.sqrt(min(xs) * max(xs))
        reach = max(1.35 * math.sqrt(max(xs) / min(xs)), 2.0)
        ax.set_xlim(middle / reach, middle * reach)
        _ticks_for_log(ax.xaxis, middle / reach, middle * reach)
        below = max(0.05, 0.2 * (1 - min(ys)))
        top = max(1.0, *ys)
        ax.set_ylim(min(ys) - below, top + 0.06 * (top - min(ys) + below))
        ax.axhline(1.0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        for family in dict.fromkeys(f for _, f in shown):
            line = sorted(s.points[0] for s, f in shown if f == family)
            ax.plot(*zip(*line, strict=True), color=MUTED, linewidth=0.8, zorder=1)
        for s, _ in shown:
            ax.plot(*s.points[0], "o", markersize=6.5, color=series_color(s.color))
        _name_points(ax, [s for s, _ in shown])
        ax.set_xlabel("L0, active features per row")

    return draw(salt, alt, paint)


def density(
    salt: str,
    alt: str,
    color: str,
    edges: Sequence[float],
    counts: Sequence[float],
    never: float,
    *,
    of: str = "held-out rows",
) -> str:
    """Features by log10 of their firing frequency; those that never fired stand apart, left."""
    if len(edges) != len(counts) + 1 or len(counts) == 0:
        return ""
    span = edges[-1] - edges[0]
    apart = edges[0] - 0.09 * span

    def paint(ax: "Axes") -> None:
        widths = [b - a for a, b in itertools.pairwise(edges)]
        bars: dict[str, Any] = {"edgecolor": SURFACE, "linewidth": 0.5}
        ax.bar(edges[:-1], counts, widths, align="edge", color=color, **bars)
        ax.bar([apart], [never], 0.06 * span, color=MUTED, **bars)
        tallest = max(*counts, never, 1.0)
        ax.text(apart, never + 0.02 * tallest, f"{never:,.0f}", ha="center", color=INK)
        ax.axvline(edges[0] - 0.03 * span, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        ax.set_xlim(apart - 0.05 * span, edges[-1])
        ax.set_ylim(0, tallest * 1.16)
        step = max(1, math.ceil(span / 6))
        decades = range(math.ceil(edges[0]), math.floor(edges[-1]) + 1, step)
        # The first decade's label would run into "never" when it sits on the very edge.
        labelled = [d for d in decades if d - edges[0] > 0.06 * span]
        ax.set_xticks([apart, *labelled], ["never", *(decade(d) for d in labelled)])
        ax.set_xlabel(f"share of {of} on which a feature is active")

    return draw(salt, alt, paint)


def flow(salt: str, alt: str, produced: Points, trained: Points) -> str:
    """Cumulative rows committed and trained over seconds since producing began.

    The time in which both went on is shaded.
    """
    if not produced and not trained:
        return ""
    end = max(x for x, _ in [*produced, *trained])
    unit, name = (3600.0, "hours") if end > 3 * 3600 else (60.0, "minutes") if end > 180 else (1.0, "seconds")

    def paint(ax: "Axes") -> None:
        if produced and trained:
            both = max(produced[0][0], trained[0][0]), min(produced[-1][0], trained[-1][0])
            if both[0] < both[1]:
                ax.axvspan(both[0] / unit, both[1] / unit, color=GRID, alpha=0.55, linewidth=0)
        for points, color, style in ((produced, PRODUCED, "steps-post"), (trained, TRAINED, None)):
            if points:
                x, y = zip(*sampled(points, MAX_POINTS), strict=True)
                ax.plot([t / unit for t in x], y, color=color, drawstyle=style, linewidth=1.8)
        start_at_zero(ax, end / unit)
        ax.set_ylim(0, max(1.0, *(y for _, y in [*produced, *trained])) * 1.08)
        ax.set_xlabel(f"{name} since producing began")

    return draw(salt, alt, paint)


def compact(value: float, _: object = None) -> str:
    """A number as short as an axis wants it: 0.05, 32, 250k, 1.5M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def draw(salt: str, alt: str, paint: "Callable[[Axes], None]") -> str:
    """Run `paint` on fresh axes and return them as one inline `<svg>` element named `alt`."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "DejaVu Sans",
        "font.size": FONT,
        "text.color": INK,
        "text.parse_math": False,  # a name may hold a dollar sign
        "axes.labelcolor": MUTED,
        "axes.edgecolor": MUTED,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "xtick.minor.size": 0,
    }
    with style.context(["default", settings]), warnings.catch_warnings():
        # Widths are measured in DejaVu Sans; that it lacks a character does not matter here,
        # because the browser sets the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        across, up = (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT
        ax = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, across, up))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=STEPS))
            axis.set_major_formatter(FuncFormatter(compact))
        paint(ax)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    body = out.getvalue()
    for color, variable in _VARIABLES.items():
        body = body.replace(f": {color}", f": var({variable})")
    return inline(body, alt, WIDTH, HEIGHT)


def _replace_points(series: Series, points: Points) -> Series:
    return Series(series.name, series.color, series.dash, points)


def _linestyle(dash: int) -> "str | tuple[float, tuple[float, ...]]":
    pattern = tuple(float(part) / 1.6 for part in DASHES[dash % len(DASHES)].split())
    return (0.0, pattern) if pattern else "solid"


def start_at_zero(ax: "Axes", end: float) -> None:
    ax.set_xlim(0, end * 1.015 if end > 0 else 1.0)


def log_view(axis: "Axis", low: float, high: float) -> None:
    """Limits and ticks of a logarithmic axis over [low, high]."""
    margin = max((high / low) ** 0.06, 1.05)
    axis.set_view_interval(low / margin, high * margin, ignore=True)
    _ticks_for_log(axis, low / margin, high * margin)


def _ticks_for_log(axis: "Axis", low: float, high: float) -> None:
    """Ticks at decades, at 1-2-5 or, within less than a factor of five, at round steps."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if high / low > 300 else (1, 2, 5)
    every = math.ceil(len(decades) / 6)
    ticks = [m * 10.0**d for d in decades[::every] for m in steps if low <= m * 10.0**d <= high]
    axis.set_major_locator(FixedLocator(ticks) if high / low >= 5 else MaxNLocator(5, steps=STEPS))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(compact))


def _name_points(ax: "Axes", series: Sequence[Series]) -> None:
    """Write each name under its point or, where that is taken, above it.

    Names of points that lie on one heap stand beside it, one below the other in the order of the points, each
    with a line to its own.
    """
    import numpy as np

    # Where a point falls in the axes, from 0 to 1, and from there in the view box.
    to_axes = ax.transData + ax.transAxes.inverted()
    room = np.array([WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM])
    centers = [tuple(to_axes.transform(s.points[0]) * room + (LEFT, BOTTOM)) for s in series]
    # Boxes as left, bottom, right, top. Markers first: no name may cover one.
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in centers]
    heaps = _heaps(centers)
    for heap in (heap for heap in heaps if len(heap) > 2):
        widest = max(_half(series[i]) for i in heap) * 2
        start = max(centers[i][0] for i in heap) + 16
        right = start + widest <= WIDTH - RIGHT
        edge = start if right else min(centers[i][0] for i in heap) - 16
        middle = sum(centers[i][1] for i in heap) / len(heap)
        top = min(middle + 11 * (len(heap) - 1) / 2, HEIGHT - TOP - 5)
        top = max(top, BOTTOM + 8 + 11 * (len(heap) - 1))
        for row, i in enumerate(sorted(heap, key=lambda i: -centers[i][1])):
            y = top - 11 * row
            across = (edge, edge + widest) if right else (edge - widest, edge)
            taken.append((across[0], y - 5, across[1], y + 5))
            _write(ax, series[i], (edge, y), "left" if right else "right", towards=centers[i])
    alone = [i for heap in heaps if len(heap) <= 2 for i in heap]
    for i in sorted(alone, key=lambda i: -centers[i][1]):
        (x, y), half = centers[i], _half(series[i])
        middle = min(max(x, LEFT + half), WIDTH - RIGHT - half)
        places = [y + step for step in (-11, 11, -22, 22, -33, 33)]
        boxes = [(middle - half, v - 5, middle + half, v + 5) for v in places]
        inside = [b for b in boxes if b[1] > BOTTOM and b[3] < HEIGHT]
        free = [b for b in inside if not any(_overlap(b, t) for t in taken)]
        box = free[0] if free else boxes[0]
        taken.append(box)
        _write(ax, series[i], (middle, (box[1] + box[3]) / 2), "center")


def _heaps(centers: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Points that lie so close, one to the next, that their names would cover each other."""
    heaps: list[list[int]] = []
    for i, (x, y) in enumerate(centers):
        near = [
            h for h in heaps if any(abs(x - centers[j][0]) < 30 and abs(y - centers[j][1]) < 13 for j in h)
        ]
        heaps = [h for h in heaps if h not in near] + [[*(j for h in near for j in h), i]]
    return heaps


def _label(series: Series) -> str:
    name = " ".join(series.name.split())
    return name if len(name) <= 24 else name[:23] + "…"


def _half(series: Series) -> float:
    """Half of its name's width."""
    return 0.3 * FONT * len(_label(series))


def _write(
    ax: "Axes",
    series: Series,
    at: tuple[float, float],
    side: str,
    towards: tuple[float, float] | None = None,
) -> None:
    """A name, and a line from it to its point."""
    color = series_color(series.color)
    if towards is not None:
        gap = 2 if side == "left" else -2
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
        ends = {"xycoords": "figure points", "textcoords": "figure points"}
        ax.annotate("", towards, (at[0] - gap, at[1]), arrowprops=line, annotation_clip=False, **ends)
    text: dict[str, Any] = {"ha": side, "va": "center_baseline", "color": color}
    ax.annotate(_label(series), at, xycoords="figure points", **text)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def decade(exponent: int) -> str:
    """A power of ten as a share: 10⁻⁴, and 1 for all rows."""
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}" if exponent else "1"
