"""Several evaluations side by side: a trained model and its controls, every figure of every SAE.

Read are summary.json of `penstock report` and evaluation.json of `penstock evaluate`. SAEs of the same name
stand in one row, whatever model they belong to; a figure that one evaluation lacks is missing there.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from penstock.common.errors import UserError
from penstock.trainer.figures import LEFT, MUTED, RIGHT, SURFACE, WIDTH, compact, draw, series_color
from penstock.trainer.judging.shown import Shown
from penstock.trainer.page import finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {
    "l0": "L0",
    "explained_variance": "Explained variance",
    "loss": "Loss, held out",
    "squared_error": "Σ(x − x̂)²",
    "ce_clean": "CE clean",
    "ce_spliced": "CE spliced",
    "ce_zero": "CE zero",
    "ce_mean": "CE mean",
    "ce_recovered": "CE recovered",
    "ce_recovered_mean": "CE recovered, mean",
    "delta_ce": "ΔCE",
    "kl": "KL",
    "cloze_accuracy_clean": "Accuracy on tasks, clean",
    "cloze_accuracy": "Accuracy on tasks, spliced",
    "cloze_delta_ln_p": "Δln p on tasks",
    "cloze_never_active": "Features active on no prompt",
    "l1": "L1",
    "norm": "‖x‖",
    "dead_features": "Dead features, held out",
    "rows": "Rows, held out",
    "training_l0": "L0, in training",
    "training_loss": "Loss, in training",
    "training_dead_features": "Dead features, in training",
    "d_sae": "Features",
}
"""Field -> what it is called; others follow by their own names."""
DRAWN = {
    "explained_variance": "1 is perfect; compare at the same L0",
    "ce_recovered": "1 is the model itself, 0 zeros for the activations; no meaning where zeros cost nothing",
    "delta_ce": "Nats per token that the SAE costs its model: lower is better",
    "kl": "KL(clean ‖ with the SAE), nats per token: lower is better",
    "l0": "Active features per row: sparser is lower",
    "dead_features": "Features active on no held-out row",
}
"""Field -> how to read its bars."""
SHARES = ("explained_variance", "ce_recovered")
"""Their best value is 1. Bars end at 0 and 1; where a share is beyond, its number says so."""


@dataclass(frozen=True)
class Judged:
    """One evaluation: of which model, on which text, and what it came to per SAE."""

    label: str
    text: str
    figures: Mapping[str, Mapping[str, float | None]]
    places: Mapping[str, str]


def read_judged(record: Mapping[str, Any], source: str) -> Judged:
    """What a summary.json or evaluation.json says.

    Args:
        source: where it came from, for the message.

    Raises:
        UserError: it is neither, or an evaluation without its overview.
    """
    try:
        if "experiments" in record:
            if "overview" not in record["experiments"]:
                raise UserError(
                    f"{source} holds no overview, which is compared; evaluate with `--only overview`"
                )
            return _of_evaluation(record)
        return _of_summary(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source} is neither a summary.json of `penstock report` nor an evaluation.json of `penstock "
            f"evaluate`: {type(error).__name__} {error}"
        ) from error


def _of_summary(summary: Mapping[str, Any]) -> Judged:
    figures, places = {}, {}
    for sae in summary["saes"]:
        trained = {f"training_{key}": sae.get(key) for key in ("l0", "loss", "dead_features")}
        found = {**sae["held_out"], **trained, "d_sae": sae["d_sae"]}
        figures[sae["name"]] = _numbers(found)
        places[sae["name"]] = _place(sae)
    dataset = summary["dataset"]
    text = _text(dataset["corpus"], dataset.get("context"), figures)
    return Judged(summary["model"]["name"], text, figures, places)


def _of_evaluation(evaluation: Mapping[str, Any]) -> Judged:
    judged = evaluation["experiments"]["overview"]["dictionaries"]
    subject = evaluation["subject"]
    besides = _besides(evaluation["experiments"])
    figures = {name: _numbers({**found, **besides.get(name, {})}) for name, found in judged.items()}
    places = {name: _place(found) for name, found in judged.items()}
    text = _text(subject["text"]["description"], subject["text"].get("context"), figures)
    return Judged(subject["model"]["name"], text, figures, places)


def _besides(experiments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Overall figures of each SAE from experiments other than the overview, as far as they were made."""
    found: dict[str, dict[str, Any]] = {}
    positions = experiments.get("positions", {"dictionaries": []})
    for one in positions["dictionaries"]:
        overall = {name: metric["overall"]["mean"] for name, metric in one["metrics"].items()}
        told = {name: overall[name] for name in ("l1", "norm", "ce_recovered_mean")}
        told["ce_mean"] = positions["sites"][one["hook_out"]]["mean"]["ce"]["overall"]["mean"]
        found.setdefault(one["name"], {}).update(told)
    cloze = experiments.get("cloze", {"dictionaries": []})
    for one in cloze["dictionaries"]:
        told = {"cloze_accuracy_clean": cloze["clean"]["accuracy"], "cloze_accuracy": one["accuracy"]}
        told["cloze_delta_ln_p"] = one["mean_delta_ln_p"]
        found.setdefault(one["name"], {}).update(told)
    for one in experiments.get("feature_scores", {"dictionaries": []})["dictionaries"]:
        found.setdefault(one["name"], {})["cloze_never_active"] = one["never_active"]
    return found


def _text(description: str, context: int | None, figures: Mapping[str, Mapping[str, float | None]]) -> str:
    """Which text, cut into which sequences, and how many rows of it: what both kinds of records know."""
    rows = {str(found["rows"]) for found in figures.values() if found.get("rows") is not None}
    return f"{description}; {context} tokens; {', '.join(sorted(rows))} rows"


def _numbers(found: Mapping[str, Any]) -> dict[str, float | None]:
    """What is a number or missing; counts stay whole."""
    flat = {key: value for key, value in found.items() if not isinstance(value, Mapping | list | str)}
    return {key: value if type(value) is int else finite(value) for key, value in flat.items()}


def _place(sae: Mapping[str, Any]) -> str:
    hooks = dict.fromkeys(str(sae[key]) for key in ("hook_name", "hook_out") if sae.get(key))
    return " → ".join(hooks)


def side_by_side(judged: Sequence[Judged]) -> list[Shown]:
    """One table of everything, and bars of what matters most.

    Raises:
        UserError: two evaluations have the same label.
    """
    labels = [one.label for one in judged]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"two evaluations are of {min(twice)!r}; name each of them: LABEL=PATH")
    saes = list(dict.fromkeys(name for one in judged for name in one.figures))
    fields = _ordered(field for one in judged for found in one.figures.values() for field in found)
    rows: list[list[object]] = []
    for name in saes:
        place = next(one.places[name] for one in judged if name in one.places)
        for field in fields:
            values = [one.figures.get(name, {}).get(field) for one in judged]
            if any(value is not None for value in values):
                rows.append([name, place, METRICS.get(field, field), *values])
    texts = dict.fromkeys(one.text for one in judged)
    note = (
        "CE, ΔCE and KL in nats per token; CE recovered means nothing where CE zero is not above CE clean. "
    )
    note += "All on the same text" if len(texts) == 1 else "Not on the same text: compare with care"
    table = Shown("beside", "Side by side", note, ["SAE", "Hook point", "Figure", *labels], rows)
    return [table, *(_bars(judged, saes, field) for field in DRAWN if field in fields)]


def _ordered(fields: Iterable[str]) -> list[str]:
    found = dict.fromkeys(fields)
    return [*(f for f in METRICS if f in found), *(f for f in found if f not in METRICS)]


def _bars(judged: Sequence[Judged], saes: Sequence[str], field: str) -> Shown:
    title = METRICS[field]
    values = [[one.figures.get(name, {}).get(field) for one in judged] for name in saes]
    labels = [one.label for one in judged]
    told = f"{title} of {', '.join(saes)}, a bar for each of {', '.join(labels)}"
    rows: list[list[object]] = [[name, *line] for name, line in zip(saes, values, strict=True)]
    names = [_with_l0s(name, judged) for name in saes]
    svg = _draw_bars(f"beside {field}", told, names, values, share=field in SHARES)
    return Shown(f"beside-{field}", title, DRAWN[field], ["SAE", *labels], rows, svg)


def _with_l0s(name: str, judged: Sequence[Judged]) -> str:
    """A name, and below it the L0 of each of its bars."""
    found = [one.figures.get(name, {}).get("l0") for one in judged]
    return f"{name}\nL0 " + " · ".join("—" if value is None else f"{value:.0f}" for value in found)


def _number(value: float) -> str:
    """Two digits, one of what is small: it has to fit above a bar."""
    return compact(float(f"{value:.1g}" if abs(value) < 0.01 else f"{value:.2g}"))


def _draw_bars(
    salt: str, alt: str, saes: Sequence[str], values: Sequence[Sequence[float | None]], *, share: bool
) -> Markup:
    known = [value for line in values for value in line if value is not None and math.isfinite(value)]
    if not known:
        return Markup("")
    top = 1.0 if share else max(0.0, *known) or 1.0
    bottom = 0.0 if share else min(0.0, *known)

    def paint(ax: "Axes") -> None:
        width = 0.8 / max(map(len, values))
        for x, line in enumerate(values):
            for i, value in enumerate(line):
                if value is None or not math.isfinite(value):
                    continue
                left = x - 0.4 + i * width
                height = min(max(value, bottom), top)
                ax.bar(
                    [left], [height], width, align="edge", color=series_color(i), edgecolor=SURFACE, lw=0.5
                )
                size = max(5.0, min(8.0, 110 * width / len(saes)))
                at = max(height, 0.0) + 0.02 * (top - bottom)
                ax.text(left + width / 2, at, _number(value), ha="center", fontsize=size)
        ax.axhline(0.0, color=MUTED, linewidth=0.8)
        ax.set_xlim(-0.5, len(saes) - 0.5)
        ax.set_ylim(bottom, bottom + 1.12 * (top - bottom))
        ax.set_xticks(range(len(saes)), saes, fontsize=_size(saes))

    return Markup(draw(salt, alt, paint))


def _size(names: Sequence[str]) -> float:
    """The size in which names of two lines stand beside each other."""
    longest = max(len(line) for name in names for line in name.split("\n"))
    return min(9.0, (WIDTH - LEFT - RIGHT) / len(names) / longest / 0.62)
