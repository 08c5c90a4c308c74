"""What is shown of metrics by position (`positions.py`)."""

import math
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from penstock.trainer import figures
from penstock.trainer.judging.drawing import BAND, PER_FIGURE, Line, by_position
from penstock.trainer.judging.shown import Shown

METRICS = (
    ("l0", "L0", "Active features per row"),
    ("l1", "L1", "Sum of feature activations per row"),
    ("squared_error", "Squared error", "Σ_d (x − x̂)² per row, in the units of the activations"),
    ("norm", "Norm", "‖x‖ of the clean activations that are replaced"),
    (
        "explained_variance",
        "Explained variance",
        "1 is perfect; variance is that around the mean of all rows",
    ),
    ("delta_ce", "ΔCE", "Cross-entropy with the dictionary in place minus that without, nats per token"),
    ("kl", "KL", "KL(clean ‖ spliced) of next-token distributions, nats"),
    ("ce_recovered_zero", "CE recovered, zeros", "1 is the model itself, 0 is zeros for the activations"),
    ("ce_recovered_mean", "CE recovered, mean", "1 is the model itself, 0 is the mean for the activations"),
)
VIEWS = {
    "explained_variance": (-0.5, 1.0),
    "ce_recovered_zero": (-0.5, 1.5),
    "ce_recovered_mean": (-0.5, 1.5),
}
"""Beyond these, metrics are not drawn: a denominator near 0 at some position would flatten all the others."""
COMPARED = ("l0", "l1", "squared_error", "norm", "unexplained", "delta_ce", "kl")
EXPLODES = 2.0
"""Beyond the trained context, times what it is within, from which on a metric is said to explode."""


def show(record: dict[str, Any]) -> list[Shown]:
    """Figures overall, by position, within the trained context and beyond it; densities and controls."""
    return [
        _overall(record),
        _errors(record),
        *(shown for metric in METRICS for shown in _by_position(record, *metric)),
        _model_alone(record),
        *beyond(record),
        *(_density(record, one) for one in record["dictionaries"] if _counted(one)),
        _controls(record),
    ]


def _overall(record: dict[str, Any]) -> Shown:
    """Every dictionary with the ablations of its place."""
    names = ("l0", "l1", "squared_error", "norm", "explained_variance")
    losses = ("ce", "delta_ce", "kl", "ce_recovered_zero", "ce_recovered_mean")
    columns = [
        *("dictionary", "hook point", *names, "ce_clean", *losses),
        *("ce_zero", "ce_mean", "kl_zero", "kl_mean"),
    ]
    clean = record["ce_clean"]["overall"]["mean"]
    rows: list[list[object]] = []
    for one in record["dictionaries"]:
        sites = record["sites"][one["hook_out"]]
        rows.append(
            [
                *(one["name"], place(one), *(_mean(one["metrics"], name) for name in names), clean),
                *(_mean(one["metrics"], name) for name in losses),
                *(_mean(sites[arm], metric) for metric in ("ce", "kl") for arm in ("zero", "mean")),
            ]
        )
    note = (
        f"{record['sequences']} sequences of {record['context']} tokens, {sum(record['rows'])} rows that are "
        "not special tokens. Quantities of dictionaries are of the clean stream; μ of the mean ablation is "
        "taken over all rows of the same text."
    )
    return Shown("positions-overall", "Over all positions", note, columns, rows)


def _errors(record: dict[str, Any]) -> Shown:
    columns = ["dictionary", "hook point", "l0", "metric", "mean", "standard error"]
    rows: list[list[object]] = [
        [one["name"], place(one), one["l0"], name, *found["overall"].values()]
        for one in record["dictionaries"]
        for name, found in one["metrics"].items()
    ]
    note = "Standard errors over sequences, whose positions are not independent of each other"
    return Shown("positions-errors", "How sure the overall figures are", note, columns, rows)


def _by_position(record: dict[str, Any], metric: str, title: str, note: str) -> Iterator[Shown]:
    """One figure, or several where there are more dictionaries than colours."""
    dictionaries = record["dictionaries"]
    for number, first in enumerate(range(0, len(dictionaries), PER_FIGURE)):
        some = dictionaries[first : first + PER_FIGURE]
        found = [(one, one["metrics"][metric]["by_position"]) for one in some]
        end = f"-{number + 1}" if len(dictionaries) > PER_FIGURE else ""
        lines = [Line(one["name"], values["mean"], values["error"]) for one, values in found]
        told = "; ".join(f"{one['name']}: {_told(_mean(one['metrics'], metric))}" for one in some)
        svg = _drawn(
            record, f"positions {metric}{end}", f"{title} by position. Overall {told}", lines, metric
        )
        rows: list[list[object]] = [
            [one["name"], place(one), one["l0"], position, *_band(mean, error)]
            for one, values in found
            for position, (mean, error) in enumerate(zip(values["mean"], values["error"], strict=True))
        ]
        columns = ["dictionary", "hook point", "l0", "position", "mean", "standard error", "low", "high"]
        yield Shown(
            f"positions-{metric}{end}",
            f"{title} by position",
            f"{note}. {_marked(record)}{_cut(metric)}",
            columns,
            rows,
            svg,
        )


def _model_alone(record: dict[str, Any]) -> Shown:
    """What the model itself does, without which a change of a metric cannot be read."""
    values = record["ce_clean"]["by_position"]
    line = Line("clean", values["mean"], values["error"])
    mean = record["ce_clean"]["overall"]["mean"]
    svg = _drawn(record, "positions clean", f"Clean cross-entropy by position. Overall {_told(mean)}", [line])
    pairs = enumerate(zip(values["mean"], values["error"], strict=True))
    rows: list[list[object]] = [[position, *_band(*pair)] for position, pair in pairs]
    columns = ["position", "mean", "standard error", "low", "high"]
    note = f"Cross-entropy of the model with nothing replaced, nats per token. {_marked(record)}"
    return Shown("positions-clean", "The model alone by position", note, columns, rows, svg)


def beyond(record: dict[str, Any]) -> Iterator[Shown]:
    """Each metric beyond the trained context against that within; nothing where the text ends with it."""
    if record["trained_context"] >= record["context"]:
        return
    rows: list[list[object]] = [["the model alone", "", None, "ce", *_compared(record["ce_clean"], "mean")]]
    exploded: list[str] = []
    for one in record["dictionaries"]:
        for name in COMPARED:
            found = one["metrics"]["explained_variance" if name == "unexplained" else name]
            values = _compared(found, name)
            rows.append([one["name"], place(one), one["l0"], name, *values])
            if values[-1] == "explodes":
                exploded.append(f"{name} of {one['name']}")
    said = f"What explodes: {', '.join(exploded)}." if exploded else "Nothing explodes."
    note = (
        f"Positions {record['trained_context']} to {record['context'] - 1} against those below, with 95 % "
        f"bands of the ratio. A metric explodes if all of its band is above {EXPLODES:g}. {said}"
    )
    columns = [
        *("dictionary", "hook point", "l0", "metric", "within", "beyond"),
        *("beyond / within", "low", "high", "reads as"),
    ]
    yield Shown("positions-beyond", "Beyond the trained context", note, columns, rows)


def _compared(found: dict[str, Any], metric: str) -> list[object]:
    """Within, beyond, their ratio with its band, and what that says."""
    flip = metric == "unexplained"
    means = [found[part]["mean"] for part in ("within", "beyond")]
    ratio = found["unexplained_beyond_over_within" if flip else "beyond_over_within"]
    mean, _, low, high = _band(ratio["mean"], ratio["error"])
    if low is None or high is None or min(value or 0.0 for value in means) < 0:
        says = "not said"  # of a ratio of what changes its sign, nothing can be said
    elif low > EXPLODES:
        says = "explodes"
    else:
        says = "grows" if low > 1 else "falls" if high < 1 else "no difference"
    flipped = [None if value is None else 1 - value for value in means] if flip else means
    return [*flipped, mean, low, high, says]


def _density(record: dict[str, Any], one: dict[str, Any]) -> Shown:
    found = one["density"]
    edges, counts, never = found["log10_edges"], found["counts"], found["never_active"]
    name, total = one["name"], sum(counts) + never
    alt = f"Histogram of how often the features of {name} are active: {never} of {total} never"
    color = record["dictionaries"].index(one) % figures.COLORS
    svg = Markup(figures.density(f"judged density {name}", alt, color, edges, counts, never))
    rows: list[list[object]] = [["never", "never", never]]
    rows += [[low, high, count] for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)]
    note = f"{place(one)}: {total} features, {never} never active, L0 {_told(one['l0'])}"
    columns = ["log10 share of rows, from", "to", "features"]
    return Shown(f"density-{name}", f"Densities of {name}", note, columns, rows, svg)


def _controls(record: dict[str, Any]) -> Shown:
    rows: list[list[object]] = [
        [hook, control, metric, max((value for value in values if value is not None), default=None)]
        for hook, controls in record["controls"].items()
        for control in ("identity", "zero_against_ablation")
        for metric, values in controls[control].items()
    ]
    note = (
        "Largest size at any position of the first batch. An identity changes nothing; a dictionary of zeros "
        "does what replacing the activations by zeros does: 0 but for rounding"
    )
    columns = ["hook point", "control", "metric", "largest difference"]
    return Shown("positions-controls", "Controls", note, columns, rows)


def place(one: dict[str, Any]) -> str:
    """Where a dictionary stands, by its record."""
    return (
        str(one["hook_out"])
        if one["hook_name"] == one["hook_out"]
        else f"{one['hook_name']} → {one['hook_out']}"
    )


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
    return f". The view is {view}; positions with a wider band than that are left out of the figure"


def _marked(record: dict[str, Any]) -> str:
    trained, context = record["trained_context"], record["context"]
    if trained >= context:
        return "All positions are within the trained context. Bands are 95 %"
    return f"The dashed line is where training ended, at {trained} positions. Bands are 95 %"


def _band(mean: float | None, error: float | None) -> list[float | None]:
    """Mean, standard error and 95 % band."""
    if mean is None or error is None:
        return [mean, error, None, None]
    return [mean, error, mean - BAND * error, mean + BAND * error]


def _mean(metrics: dict[str, Any], name: str) -> float | None:
    found: float | None = metrics[name]["overall"]["mean"]
    return found


def _told(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
