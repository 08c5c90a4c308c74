"""What each dictionary costs the model when it stands in for the activations of its hook point, in one number
each: what `positions` measures, over all positions together.
"""

from typing import Any

from markupsafe import Markup

from penstock.trainer import figures
from penstock.trainer.figures import Series
from penstock.trainer.judging.shown import Shown


def of_positions(record: dict[str, Any]) -> dict[str, Any]:
    """Figures of every dictionary, and what controls came to, from the record of `positions`.

    Returns:
        {"dictionaries": {name: figures}, "controls": {hook point: …}, …}; None where nothing defines a
        figure: `l0` without features.
    """
    zeros = {place: _over_all(arms["zero"]["ce"]) for place, arms in record["sites"].items()}
    clean = _over_all(record["ce_clean"])
    return {
        "squared_error": record["squared_error"],
        "sequences": record["sequences"],
        "predictions": sum(record["rows"][:-1]),
        "ce_clean": clean,
        "dictionaries": {
            one["name"]: {
                "hook_name": one["hook_name"],
                "hook_out": one["hook_out"],
                "d_sae": one["d_sae"],
                "rows": sum(record["rows"]),
                "l0": one["l0"] if one["d_sae"] else None,
                "squared_error": _over_all(one["metrics"]["squared_error"]),
                "explained_variance": _over_all(one["metrics"]["explained_variance"]),
                "ce_clean": clean,
                "ce_spliced": _over_all(one["metrics"]["ce"]),
                "ce_zero": zeros[one["hook_out"]],
                "ce_recovered": _over_all(one["metrics"]["ce_recovered_zero"]),
                "delta_ce": _over_all(one["metrics"]["delta_ce"]),
                "kl": _over_all(one["metrics"]["kl"]),
            }
            for one in record["dictionaries"]
        },
        "controls": {
            place: {
                "sequences": found["sequences"],
                **{
                    arm: {name: _largest(values) for name, values in found[arm].items()}
                    for arm in ("identity", "zero_against_ablation")
                },
            }
            for place, found in record["controls"].items()
        },
    }


def _over_all(metric: dict[str, Any]) -> float | None:
    found: float | None = metric["overall"]["mean"]
    return found


def _largest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


_COLUMNS = {
    "l0": "L0",
    "squared_error": "Σ(x − x̂)²",
    "explained_variance": "Explained variance",
    "ce_clean": "CE clean",
    "ce_spliced": "CE spliced",
    "ce_zero": "CE zero",
    "ce_recovered": "CE recovered",
    "delta_ce": "ΔCE",
    "kl": "KL",
}


def show(record: dict[str, Any]) -> list[Shown]:
    """The dictionaries as a table and over their L0, and the controls."""
    judged = record["dictionaries"]
    return [
        Shown(
            "overview",
            "Every dictionary",
            f"What each costs the model, over {record['predictions']:,} predicted tokens. CE, ΔCE and KL in "
            "nats per token; Σ(x − x̂)² per row, in raw units of the activations",
            ["Dictionary", "Hook point", *_COLUMNS.values()],
            [[name, _place(one), *(one[key] for key in _COLUMNS)] for name, one in judged.items()],
        ),
        *(
            _over_l0(judged, field, title, note)
            for field, title, note in (
                (
                    "ce_recovered",
                    "CE recovered",
                    "Higher is better, further left is sparser; dashed: the model itself. It compares "
                    "dictionaries of one hook point",
                ),
                (
                    "explained_variance",
                    "Explained variance",
                    "Higher is better, further left is sparser; dashed: a perfect reconstruction",
                ),
            )
        ),
        Shown(
            "overview-controls",
            "Controls",
            "Both go through the same splice as the dictionaries, on the first batch: largest differences at "
            "any position. An identity must change nothing, zeros must do what ablation by hand does",
            ["Hook point", "Sequences", *_CONTROLS.values()],
            [
                [place, found["sequences"], *(found[arm][name] for arm, name in _CONTROLS)]
                for place, found in record["controls"].items()
            ],
        ),
    ]


_CONTROLS = {
    ("identity", "squared_error"): "Identity: Σ(x − x̂)²",
    ("identity", "delta_ce"): "Identity: ΔCE",
    ("identity", "kl"): "Identity: KL",
    ("zero_against_ablation", "ce"): "Zeros less ablation: CE",
    ("zero_against_ablation", "kl"): "Zeros less ablation: KL",
}


def _over_l0(judged: dict[str, dict[str, Any]], field: str, title: str, note: str) -> Shown:
    known = [(name, one) for name, one in judged.items() if one[field] is not None and one["l0"]]
    points = [
        (Series(name, i % figures.COLORS, 0, [(one["l0"], one[field])]), name)
        for i, (name, one) in enumerate(known)
    ]
    told = "; ".join(f"{name}: {one[field]:.3g} at L0 {one['l0']:.3g}" for name, one in known)
    svg = figures.frontier(f"overview {field}", f"{title} against L0. {told}", points)
    rows: list[list[object]] = [[name, one["l0"], one[field]] for name, one in known]
    return Shown(
        f"overview-{field}", f"{title} against L0", note, ["Dictionary", "L0", title], rows, Markup(svg)
    )


def _place(one: dict[str, Any]) -> str:
    return " → ".join(dict.fromkeys([one["hook_name"], one["hook_out"]]))
