"""What each dictionary costs the model when it stands in for the activations of its hook point.

    squared error = mean Σ_d (x − x̂)² per row, in the raw units of the activations
    explained variance = 1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖²
    ΔCE = CE_spliced − CE_clean, nats per predicted token
    CE recovered = (CE_zero − CE_spliced) / (CE_zero − CE_clean)
    KL = mean KL(clean ‖ spliced) of next-token distributions, nats

x are activations of the clean pass. All arms see the same tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup

from penstock.trainer import figures
from penstock.trainer.evaluate import HookTally, add_hook, recovered
from penstock.trainer.figures import Series
from penstock.trainer.judging.dictionaries import Constant, Dictionary, Identity
from penstock.trainer.judging.measures import cross_entropy, divergence
from penstock.trainer.judging.shown import Shown
from penstock.trainer.judging.splice import Splice, forward
from penstock.trainer.judging.subject import Subject

SCALE = "mean over rows of Σ_d (x − x̂)², in the raw units of the activations"


@dataclass
class _Sums:
    """Sums over rows and predictions of one dictionary, or of a control in its place."""

    dictionary: Dictionary
    residual: float = 0.0
    active: float = 0.0
    cross_entropy: float = 0.0
    kl: float = 0.0


def measure(subject: Subject, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Figures of every dictionary, and of controls at every hook point that is replaced.

    Returns:
        {"dictionaries": {name: figures}, "controls": {hook point: {"identity": …, "zero": …}}, …}; see the
        module for what they mean. None where nothing defines a figure: `l0` without features.
    """
    model, text = subject.model, subject.text
    places = {dictionary.hook_out: HookTally() for dictionary in subject.dictionaries}
    widths = model.widths(list(places))
    judged = [_Sums(dictionary) for dictionary in subject.dictionaries]
    controls = {
        place: {
            "identity": _Sums(Dictionary("identity", place, place, Identity())),
            "zero": _Sums(Dictionary("zero", place, place, Constant(torch.zeros(widths[place])))),
        }
        for place in places
    }
    arms = [*judged, *(sums for pair in controls.values() for sums in pair.values())]
    clean_loss, predictions = 0.0, 0
    for batch in text.batches(model):
        clean = forward(model, batch.tokens, batch.keep, watch=subject.hook_names())
        kept, counts = batch.keep.to(model.device), batch.predicts.to(model.device)
        clean_loss += float(cross_entropy(clean.logits, batch.tokens)[counts].sum())
        predictions += int(counts.sum())
        for place, tally in places.items():
            add_hook(tally, clean.seen[place][kept])
        for sums in arms:
            one = sums.dictionary
            x, target = clean.seen[one.hook_name][kept], clean.seen[one.hook_out][kept]
            acts = one.module.encode(x)
            sums.active += float((acts > 0).sum())
            sums.residual += float((target - one.module.reconstruct(x, acts)).double().square().sum())
            spliced = forward(model, batch.tokens, batch.keep, [Splice(one)]).logits
            sums.cross_entropy += float(cross_entropy(spliced, batch.tokens)[counts].sum())
            sums.kl += float(divergence(clean.logits[:, :-1], spliced[:, :-1])[counts].sum())
        progress(batch.first + len(batch.tokens), len(text))

    def figures_of(sums: _Sums) -> dict[str, Any]:
        place = sums.dictionary.hook_out
        zero = controls[place]["zero"].cross_entropy
        return _figures(sums, places[place], clean_loss / predictions, zero / predictions, predictions)

    return {
        "squared_error_scale": SCALE,
        "sequences": len(text),
        "predictions": predictions,
        "ce_clean": clean_loss / predictions,
        "dictionaries": {sums.dictionary.name: figures_of(sums) for sums in judged},
        "controls": {
            place: {name: figures_of(sums) for name, sums in pair.items()} for place, pair in controls.items()
        },
    }


def _figures(sums: _Sums, hook: HookTally, clean: float, zero: float, predictions: int) -> dict[str, Any]:
    one = sums.dictionary
    spliced = sums.cross_entropy / predictions
    share = recovered(clean, spliced, zero)
    variance = hook.variance()
    return {
        "hook_name": one.hook_name,
        "hook_out": one.hook_out,
        "d_sae": one.module.d_sae,
        "rows": hook.rows,
        "l0": sums.active / hook.rows if one.module.d_sae else None,
        "squared_error": sums.residual / hook.rows,
        "explained_variance": 1 - sums.residual / variance if variance > 0 else None,
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_recovered": share if math.isfinite(share) else None,
        "delta_ce": spliced - clean,
        "kl": sums.kl / predictions,
    }


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
            "Both go through the same splice as the dictionaries. The identity must cost nothing (ΔCE, KL "
            "and Σ(x − x̂)² 0, CE recovered 1), zeros must recover 0",
            ["Hook point", "Control", *(_COLUMNS[key] for key in _CONTROL)],
            [
                [place, name, *(one[key] for key in _CONTROL)]
                for place, pair in record["controls"].items()
                for name, one in pair.items()
            ],
        ),
    ]


_CONTROL = ("squared_error", "ce_spliced", "ce_recovered", "delta_ce", "kl")


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
