"""What is shown of metrics by position (`positions.py`)."""

import math
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from penstock.trainer import figures
from penstock.trainer.judging.drawing import BAND, Line, by_position, in_common, shared_out
from penstock.trainer.judging.headings import heading
from penstock.trainer.judging.shown import Shown, Table, with_l0
from penstock.trainer.page import MISSING

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
COMPARED = ("l0", "l1", "squared_error", "norm", "unexplained", "delta_ce", "kl")
EXPLODES = 2.0
"""Beyond the trained context, times what it is within, from which on a metric is said to explode."""


SAYS = {"explodes": "⇈", "grows": "↑", "falls": "↓", "no difference": "≈", "not said": "?"}


def show(record: dict[str, Any]) -> list[Shown]:
    """Figures overall, by position, within the trained context and beyond it; densities and controls."""
    return [
        _overall(record),
        _errors(record),
        *beyond(record),
        *(shown for metric in METRICS for shown in _by_position(record, *metric)),
        _model_alone(record),
        *(_density(record, one) for one in record["dictionaries"] if _counted(one)),
        _controls(record),
    ]


def _overall(record: dict[str, Any]) -> Shown:
    """Every dictionary with the ablations of its place."""
    names = ("l0", "l1", "squared_error", "norm", "explained_variance")
    losses = ("ce", "delta_ce", "kl", "ce_recovered_zero", "ce_recovered_mean")
    ablations = ("ce_zero", "ce_mean", "kl_zero", "kl_mean")
    columns = ["dictionary", "hook point", *names, "ce_clean", *losses, *ablations]
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
        f"{record['sequences']} sequences of {record['context']} tokens, {sum(record['rows']):,} rows that "
        f"are not special tokens. The model alone has a cross-entropy of {_told(clean)} nats. L0, L1, "
        "Σ(x − x̂)² and ‖x‖ are of the clean stream and in raw units; the mean that activations are replaced "
        "by is taken over all rows of the same text"
    )
    shown = ["dictionary", *names, *losses]
    table = Table(shown, [[row[columns.index(name)] for name in shown] for row in rows])
    return Shown("positions-overall", "Over all positions", note, columns, rows, table=table)


def _errors(record: dict[str, Any]) -> Shown:
    columns = ["dictionary", "hook point", "l0", "metric", "mean", "standard error"]
    rows: list[list[object]] = [
        [one["name"], place(one), one["l0"], name, *found["overall"].values()]
        for one in record["dictionaries"]
        for name, found in one["metrics"].items()
    ]
    names = list(dict.fromkeys(str(row[3]) for row in rows))
    errors = {(row[0], row[3]): row[5] for row in rows}
    lines: list[list[object]] = [
        [one["name"], one["l0"], *(errors.get((one["name"], name)) for name in names)]
        for one in record["dictionaries"]
    ]
    note = (
        "One standard error of each overall figure, over sequences: the positions of one are not independent "
        "of each other"
    )
    table = Table(["dictionary", "L0", *(f"± {heading(name)}" for name in names)], lines)
    return Shown("positions-errors", "How sure the overall figures are", note, columns, rows, table=table)


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
    svg = _drawn(record, "positions clean", f"Clean cross-entropy by position. Overall {_told(mean)}", [line])
    pairs = enumerate(zip(values["mean"], values["error"], strict=True))
    rows: list[list[object]] = [[position, *_band(*pair)] for position, pair in pairs]
    columns = ["position", "mean", "standard error", "low", "high"]
    note = (
        "Cross-entropy in nats with nothing replaced: what it does beyond the trained context, no dictionary "
        f"is to blame for. {_marked(record)}"
    )
    table = _some_positions(record, ["CE clean, nats"], [values["mean"]])
    return Shown("positions-clean", "The model alone by position", note, columns, rows, svg, table)


def beyond(record: dict[str, Any]) -> Iterator[Shown]:
    """Each metric beyond the trained context against that within; nothing where the text ends with it."""
    if record["trained_context"] >= record["context"]:
        return
    rows: list[list[object]] = [["the model alone", "", None, "ce", *_compared(record["ce_clean"], "mean")]]
    exploded: dict[str, list[str]] = {}
    for one in record["dictionaries"]:
        for name in COMPARED:
            found = one["metrics"]["explained_variance" if name == "unexplained" else name]
            values = _compared(found, name)
            rows.append([one["name"], place(one), one["l0"], name, *values])
            if values[-1] == "explodes":
                exploded.setdefault(one["name"], []).append(heading(name).removesuffix(", nats"))
    said = "; ".join(f"{', '.join(names)} of {one}" for one, names in exploded.items())
    note = (
        f"Means of positions {record['trained_context']} to {record['context'] - 1} over those of the "
        f"positions below, with 95 % bands. {SAYS['explodes']} explodes: all of the band is above "
        f"{EXPLODES:g}; {SAYS['grows']} and {SAYS['falls']}: the band is on one side of 1; "
        f"{SAYS['no difference']}: 1 is in it; {SAYS['not said']}: of what changes its sign nothing is said. "
        f"{f'What explodes: {said}.' if said else 'Nothing explodes.'} The model's own cross-entropy: "
        f"{_ratio(rows[0])}"
    )
    columns = [
        *("dictionary", "hook point", "l0", "metric", "within", "beyond"),
        *("beyond / within", "low", "high", "reads as"),
    ]
    table = _beside_each_other(rows[1:])
    yield Shown("positions-beyond", "Beyond the trained context", note, columns, rows, table=table)


def _beside_each_other(rows: list[list[object]]) -> Table:
    """A row per dictionary, its ratios side by side."""
    lines: dict[str, dict[str, str]] = {}
    levels: dict[str, object] = {}
    for row in rows:
        name, metric = str(row[0]), str(row[3])
        lines.setdefault(name, {})[metric] = _ratio(row)
        levels[name] = row[2]
    names = list(dict.fromkeys(str(row[3]) for row in rows))
    return Table(
        ["dictionary", "L0", *(heading(name).removesuffix(", nats") for name in names)],
        [[name, levels[name], *(found.get(metric) for metric in names)] for name, found in lines.items()],
    )


def _ratio(row: list[object]) -> str:
    """A ratio, half of its band's width and what it says, from a row of the data."""
    ratio, high, says = row[6], row[8], str(row[9])
    told = f"{ratio:.3g}" if isinstance(ratio, float) else MISSING
    half = f" ± {high - ratio:.2g}" if isinstance(high, float) and isinstance(ratio, float) else ""
    return f"{told}{half} {SAYS[says]}".replace("-", "\N{MINUS SIGN}")


def _compared(found: dict[str, Any], metric: str) -> list[object]:
    """Within, beyond, their ratio with its band, and what that says."""
    flip = metric == "unexplained"
    means = [found[part]["mean"] for part in ("within", "beyond")]
    ratio = found["unexplained_beyond_over_within" if flip else "beyond_over_within"]
    if flip:
        means = [None if value is None else 1 - value for value in means]
    mean, _, low, high = _band(ratio["mean"], ratio["error"])
    if low is None or high is None or min(value or 0.0 for value in means) < 0:
        says = "not said"  # of a ratio of what changes its sign, nothing can be said
    elif low > EXPLODES:
        says = "explodes"
    else:
        says = "grows" if low > 1 else "falls" if high < 1 else "no difference"
    return [*means, mean, low, high, says]


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
    names = list(dict.fromkeys(str(row[2]) for row in rows))
    sizes = {(row[0], row[1], row[2]): row[3] for row in rows}
    lines: list[list[object]] = [
        [hook, heading(control), *(sizes.get((hook, control, name)) for name in names)]
        for hook, control in dict.fromkeys((str(row[0]), str(row[1])) for row in rows)
    ]
    table = Table(["hook point", "control", *names], lines)
    return Shown("positions-controls", "Controls by position", note, columns, rows, table=table)


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
    return f". The view is {view}; positions with a wider band are left out"


def _marked(record: dict[str, Any]) -> str:
    trained, context = record["trained_context"], record["context"]
    if trained >= context:
        return "All positions are within the trained context. Bands are 95 %"
    return f"Dashed: where training ended, at {trained} positions; bands are 95 %"


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
