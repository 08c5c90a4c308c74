"""What tables show of metrics by position (`positions.py`): overall, and beyond the trained context."""

from collections.abc import Iterator
from typing import Any

from penstock.trainer.judging.drawing import BAND
from penstock.trainer.judging.headings import heading
from penstock.trainer.judging.shown import Shown, Table
from penstock.trainer.page import MISSING

COMPARED = ("l0", "l1", "squared_error", "norm", "unexplained", "delta_ce", "kl")
EXPLODES = 2.0
"""Beyond the trained context, times what it is within, from which on a metric is said to explode."""


SAYS = {"explodes": "⇈", "grows": "↑", "falls": "↓", "no difference": "≈", "not said": "?"}


def overall(record: dict[str, Any]) -> Shown:
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
                *(one["name"], place(one), *(mean_of(one["metrics"], name) for name in names), clean),
                *(mean_of(one["metrics"], name) for name in losses),
                *(mean_of(sites[arm], metric) for metric in ("ce", "kl") for arm in ("zero", "mean")),
            ]
        )
    note = (
        f"{record['sequences']} sequences of {record['context']} tokens, {sum(record['rows']):,} rows that "
        f"are not special tokens. The model alone has a cross-entropy of {told_value(clean)} nats. L0, L1, "
        "Σ(x − x̂)² and ‖x‖ are of the clean stream and in raw units; the mean that activations are replaced "
        "by is taken over all rows of the same text"
    )
    shown = ["dictionary", *names, *losses]
    table = Table(shown, [[row[columns.index(name)] for name in shown] for row in rows])
    return Shown("positions-overall", "Over all positions", note, columns, rows, table=table)


def errors(record: dict[str, Any]) -> Shown:
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
    mean, _, low, high = band(ratio["mean"], ratio["error"])
    if low is None or high is None or min(value or 0.0 for value in means) < 0:
        says = "not said"  # of a ratio of what changes its sign, nothing can be said
    elif low > EXPLODES:
        says = "explodes"
    else:
        says = "grows" if low > 1 else "falls" if high < 1 else "no difference"
    return [*means, mean, low, high, says]


def place(one: dict[str, Any]) -> str:
    """Where a dictionary stands, by its record."""
    return (
        str(one["hook_out"])
        if one["hook_name"] == one["hook_out"]
        else f"{one['hook_name']} → {one['hook_out']}"
    )


def band(mean: float | None, error: float | None) -> list[float | None]:
    """Mean, standard error and 95 % band."""
    if mean is None or error is None:
        return [mean, error, None, None]
    return [mean, error, mean - BAND * error, mean + BAND * error]


def mean_of(metrics: dict[str, Any], name: str) -> float | None:
    found: float | None = metrics[name]["overall"]["mean"]
    return found


def told_value(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
