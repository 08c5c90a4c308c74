"""What is shown of metrics by position (`positions.py`)."""

import math
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from penstock.trainer import figures
from penstock.trainer.judging.drawing import Line, by_position, in_common, shared_out
from penstock.trainer.judging.sequences.positions_tables import (
    band,
    beyond,
    errors,
    mean_of,
    overall,
    place,
    told_value,
)
from penstock.trainer.judging.shown import Shown, Table, with_l0

METRICS = (
    ("l0", "L0", "Active features per row. Flat where a dictionary treats all positions alike"),
    ("l1", "L1", "Sum of feature activations per row. Flat where a dictionary treats all positions alike"),
    (
        "squared_error",
        "Squared error",
        "Σ(x − x̂)² per row, in raw units of the activations. It rises with their size: read it beside ‖x‖",
    ),
    ("norm", "Norm", "‖x‖ of the clean activations that are replaced: the same for all of a hook point"),
    (
        "explained_variance",
        "Explained variance",
        "1 is perfect, 0 is what the mean of all rows gives at every position",
    ),
    (
        "delta_ce",
        "ΔCE",
        "Cross-entropy in nats that the dictionary costs here: 0 is nothing, and it can be negative",
    ),
    ("kl", "KL", "KL(clean ‖ spliced) in nats: how much predictions change here, for better or worse"),
    (
        "ce_recovered_zero",
        "CE recovered, zeros",
        "1 is the model itself, 0 is zeros in place of the activations",
    ),
    (
        "ce_recovered_mean",
        "CE recovered, mean",
        "1 is the model itself, 0 is their mean in place of the activations",
    ),
)
VIEWS = {
    "explained_variance": (-0.5, 1.0),
    "ce_recovered_zero": (-0.5, 1.5),
    "ce_recovered_mean": (-0.5, 1.5),
}
"""Beyond these, metrics are not drawn: a denominator near 0 at some position would flatten all the others."""


def show(record: dict[str, Any]) -> list[Shown]:
    """Figures overall, by position, within the trained context and beyond it; densities."""
    return [
        overall(record),
        errors(record),
        *beyond(record),
        *(shown for metric in METRICS for shown in _by_position(record, *metric)),
        _model_alone(record),
        *(_density(record, one) for one in record["dictionaries"] if _counted(one)),
    ]


def _by_position(record: dict[str, Any], metric: str, title: str, note: str) -> Iterator[Shown]:
    """One figure, or several where there are more dictionaries than colours."""
    dictionaries = record["dictionaries"]
    names = [one["name"] for one in dictionaries]
    shares = shared_out(names, [place(one) for one in dictionaries])
    for turn, share in enumerate(shares, start=1):
        some = [dictionaries[i] for i, _ in share]
        found = [(one, one["metrics"][metric]["by_position"]) for one in some]
        end, which = "", ""
        if len(shares) > 1:
            end = f"-{turn}"
            which = f", {in_common([one['name'] for one in some]) or f'{turn} of {len(shares)}'}"
        lines = [
            Line(one["name"], values["mean"], values["error"], color)
            for (one, values), (_, color) in zip(found, share, strict=True)
        ]
        told = "; ".join(f"{one['name']}: {told_value(mean_of(one['metrics'], metric))}" for one in some)
        svg = _drawn(
            record, f"positions {metric}{end}", f"{title} by position. Overall {told}", lines, metric
        )
        rows: list[list[object]] = [
            [one["name"], place(one), one["l0"], position, *band(mean, error)]
            for one, values in found
            for position, (mean, error) in enumerate(zip(values["mean"], values["error"], strict=True))
        ]
        columns = ["dictionary", "hook point", "l0", "position", "mean", "standard error", "low", "high"]
        labels = [with_l0(one["name"], one["l0"]) for one in some]
        yield Shown(
            f"positions-{metric}{end}",
            f"{title} by position{which}",
            f"{note}. {_marked(record)}{_cut(metric)}",
            columns,
            rows,
            svg,
            _some_positions(record, labels, [values["mean"] for _, values in found]),
            tuple((label, f"--s{color}", "") for label, (_, color) in zip(labels, share, strict=True)),
        )


def _some_positions(record: dict[str, Any], labels: list[str], means: list[list[float | None]]) -> Table:
    """Values at the ends of what was trained on and of what was not, and in between."""
    trained, context = record["trained_context"], record["context"]
    last = context - 1
    while last and all(values[last] is None for values in means):
        last -= 1
    ends = {1, trained - 1, trained, last}
    chosen = sorted(p for p in ends | set(range(0, context, max(1, context // 8))) if 0 < p <= last)
    return Table(["position", *labels], [[p, *(values[p] for values in means)] for p in chosen])


def _model_alone(record: dict[str, Any]) -> Shown:
    """What the model itself does, without which a change of a metric cannot be read."""
    values = record["ce_clean"]["by_position"]
    line = Line("clean", values["mean"], values["error"])
    mean = record["ce_clean"]["overall"]["mean"]
    svg = _drawn(
        record, "positions clean", f"Clean cross-entropy by position. Overall {told_value(mean)}", [line]
    )
    pairs = enumerate(zip(values["mean"], values["error"], strict=True))
    rows: list[list[object]] = [[position, *band(*pair)] for position, pair in pairs]
    columns = ["position", "mean", "standard error", "low", "high"]
    note = (
        "Cross-entropy in nats with nothing replaced: what it does beyond the trained context, no dictionary "
        f"is to blame for. {_marked(record)}"
    )
    table = _some_positions(record, ["CE clean, nats"], [values["mean"]])
    return Shown("positions-clean", "The model alone by position", note, columns, rows, svg, table)


def _density(record: dict[str, Any], one: dict[str, Any]) -> Shown:
    found = one["density"]
    edges, counts, never = found["log10_edges"], found["counts"], found["never_active"]
    name, total = one["name"], sum(counts) + never
    alt = f"Histogram of how often the features of {name} are active: {never} of {total} never"
    color = figures.tone(record["dictionaries"].index(one))
    svg = Markup(figures.density(f"judged density {name}", alt, color, edges, counts, never))
    rows: list[list[object]] = [["never", "never", never]]
    rows += [[low, high, count] for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)]
    note = (
        f"Up: features; right: the share of rows that they are active on. {never:,} of {total:,} are active "
        f"on none and stand apart. {place(one)}, L0 {one['l0']:.1f}"
    )
    columns = ["log10 share of rows, from", "to", "features"]
    return Shown(f"density-{name}", f"Feature density: {name}", note, columns, rows, svg)


def _counted(one: dict[str, Any]) -> bool:
    return bool(sum(one["density"]["counts"]) + one["density"]["never_active"])


def _drawn(record: dict[str, Any], salt: str, alt: str, lines: list[Line], metric: str = "") -> Markup:
    view = VIEWS.get(metric, (-math.inf, math.inf))
    return by_position(salt, alt, lines, record["trained_context"], record["context"], view)


def _cut(metric: str) -> str:
    if metric not in VIEWS:
        return ""
    low, high = VIEWS[metric]
    view = f"{low:g} to {high:g}".replace("-", "\N{MINUS SIGN}")
    return f". The view is {view}; positions with a wider band are left out"


def _marked(record: dict[str, Any]) -> str:
    trained, context = record["trained_context"], record["context"]
    if trained >= context:
        return "All positions are within the trained context. Bands are 95 %"
    return f"Dashed: where training ended, at {trained} positions; bands are 95 %"
