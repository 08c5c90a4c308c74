"""What each dictionary is worth on a text, in sums over all of it: by itself, and in place of activations.

    squared error = mean Σ_d (x − x̂)² per row, in the raw units of the activations
    explained variance = 1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖²
    ΔCE = CE_spliced − CE_clean, nats per predicted token
    CE recovered = (CE_zero − CE_spliced) / (CE_zero − CE_clean)
    KL = mean KL(clean ‖ spliced) per row, of next-token distributions, nats

x are activations of the clean pass; CE_zero replaces them by zeros. All arms see the same tokens. This is the
quick look, at the end of a run and while it trains; `positions` tells what it costs where in a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.splicing.dictionaries import Constant, Dictionary, Identity
from penstock.trainer.judging.splicing.measures import cross_entropy, divergence
from penstock.trainer.judging.splicing.splice import Pass, Splice, forward
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Batch
from penstock.trainer.row_figures import RowSums, Spread

Progress = Callable[[int, int], None]


def recovered(clean: float, spliced: float, zero: float) -> float | None:
    """(CE_zero − CE_spliced) / (CE_zero − CE_clean); None where zeros change nothing."""
    return (zero - spliced) / (zero - clean) if zero != clean else None


@dataclass
class _Sums:
    """Of one dictionary."""

    rows: RowSums
    cross_entropy: float = 0.0
    divergence: float = 0.0


@dataclass
class _Totals:
    clean: float = 0.0
    predictions: int = 0
    zero: dict[str, float] = field(default_factory=dict)


@torch.inference_mode()
def measure(subject: Subject, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Measure all dictionaries on all of the text.

    Args:
        progress: called after each pass, with passes over sequences done and in all.

    Returns:
        {"sequences", "saes": {name: figures}, "controls": {"identity_ce_recovered", "zero_ce_recovered"}}.
        Controls are of the first batch at one hook point: 1 and 0, or what is measured is not what it should
        be. None where nothing defines a figure.
    """
    model, text = subject.model, subject.text
    places = {one.hook_out: Spread() for one in subject.dictionaries}
    sums = {one.name: _Sums(RowSums(one.module.d_sae)) for one in subject.dictionaries}
    totals = _Totals(zero=dict.fromkeys(places, 0.0))
    controls: dict[str, float | None] = {}
    done, all_passes = 0, passes(subject) * len(text)

    def passed(batch: Batch) -> None:
        nonlocal done
        done += len(batch.tokens)
        progress(done, all_passes)

    for batch in text.batches(model):
        clean = forward(model, batch.tokens, batch.keep, watch=subject.hook_names())
        totals.clean += _loss(clean.logits, batch)
        totals.predictions += int(batch.predicts.sum())
        kept = batch.keep.to(model.device)
        passed(batch)
        for place, spread in places.items():
            spread.add(clean.seen[place][kept])
            totals.zero[place] += _loss_with(model, batch, _nothing(place))
            passed(batch)
        for one in subject.dictionaries:
            _add(sums[one.name], one, model, batch, clean)
            passed(batch)
        controls = controls or _controls(model, batch, next(iter(places)), _loss(clean.logits, batch))
    return {
        "sequences": len(text),
        "saes": {
            one.name: _figures(sums[one.name], places[one.hook_out], totals, one.hook_out)
            for one in subject.dictionaries
        },
        "controls": controls,
    }


def passes(subject: Subject) -> int:
    """How often each sequence goes through the model, but for the controls."""
    return 1 + len({one.hook_out for one in subject.dictionaries}) + len(subject.dictionaries)


def _add(sums: _Sums, one: Dictionary, model: LanguageModel, batch: Batch, clean: Pass) -> None:
    kept = batch.keep.to(model.device)
    x, target = clean.seen[one.hook_name][kept], clean.seen[one.hook_out][kept]
    acts = one.module.encode(x)
    sums.rows.add(target, one.module.reconstruct(x, acts), acts)
    logits = forward(model, batch.tokens, batch.keep, [Splice(one)]).logits
    sums.cross_entropy += _loss(logits, batch)
    sums.divergence += float(divergence(clean.logits, logits)[kept].sum())


def _nothing(place: str) -> Dictionary:
    return Dictionary("zero", place, place, Constant(torch.zeros(1)))


def _controls(model: LanguageModel, batch: Batch, place: str, clean: float) -> dict[str, float | None]:
    """The measurement measured: dictionaries whose score is known, against ablation by a hook of its own."""
    mask = batch.keep.to(model.device)[..., None]
    ablated = model.logits(batch.tokens, {place: lambda acts: acts.masked_fill(mask, 0.0)}).float()
    zero = _loss(ablated, batch)
    identity = Dictionary("identity", place, place, Identity())
    return {
        "identity_ce_recovered": recovered(clean, _loss_with(model, batch, identity), zero),
        "zero_ce_recovered": recovered(clean, _loss_with(model, batch, _nothing(place)), zero),
    }


def _loss_with(model: LanguageModel, batch: Batch, one: Dictionary) -> float:
    return _loss(forward(model, batch.tokens, batch.keep, [Splice(one)]).logits, batch)


def _loss(logits: Tensor, batch: Batch) -> float:
    losses = cross_entropy(logits, batch.tokens)
    return float(losses[batch.predicts.to(losses.device)].sum())


def _figures(sums: _Sums, spread: Spread, totals: _Totals, place: str) -> dict[str, Any]:
    n = totals.predictions
    clean, spliced, zero = totals.clean / n, sums.cross_entropy / n, totals.zero[place] / n
    return sums.rows.figures(spread) | {
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_recovered": recovered(clean, spliced, zero),
        "delta_ce": spliced - clean,
        "kl": sums.divergence / spread.rows,
    }
