"""What a dictionary breaks at each position, within the context it was trained on and beyond it.

Every hook point that a dictionary replaces is replaced by itself in a pass of its own over the same tokens.
What dictionaries compute is measured on the clean stream. Positions count from 0; rows of special tokens are
in no figure. Metrics, per row unless it is said otherwise:

    l0                  active features
    l1                  Σ of feature activations
    squared_error       Σ_d (x − x̂)², in the units of the activations
    norm                ‖x‖ of what is replaced
    explained_variance  1 − Σ‖x − x̂‖² / Σ‖x − μ‖², μ the mean over all kept rows of this text
    ce                  −ln p(next token) in nats, with the dictionary in place
    delta_ce            ce − ce of the clean pass
    kl                  KL(clean ‖ spliced) of next-token distributions, in nats
    ce_recovered_zero   (CE_zero − CE) / (CE_zero − CE_clean), zeros in place of the activations
    ce_recovered_mean   the same against μ in place of the activations

Ratios are those of sums over rows. The last position predicts nothing that is known: it has a `kl` alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from penstock.trainer.judging.sequences.grid import on_grid, padded
from penstock.trainer.judging.sequences.positions_figures import show as show
from penstock.trainer.judging.sequences.ratios import Ratio
from penstock.trainer.judging.splicing.dictionaries import Constant, Dictionary, Identity
from penstock.trainer.judging.splicing.measures import cross_entropy, divergence
from penstock.trainer.judging.splicing.splice import Splice, forward
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Batch
from penstock.trainer.row_figures import density

ROW_METRICS = ("l0", "l1", "squared_error", "norm")
CE_METRICS = ("ce", "delta_ce", "kl")
RECOVERED = ("ce_recovered_zero", "ce_recovered_mean")

Progress = Callable[[int, int], None]


@torch.inference_mode()
def measure(subject: Subject, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Measure all dictionaries and their controls on all of the text.

    Args:
        progress: called with passes over sequences, done and in all.

    Returns:
        A record of finite numbers and nulls: `ce_clean`; per replaced hook point in `sites` the ablations by
        `zero` and `mean`; per hook point in `controls` what an identity does, and how far a zero dictionary
        is from ablation by hand; per dictionary in `dictionaries` every metric above and a density histogram.
    """
    places = list(dict.fromkeys(one.hook_out for one in subject.dictionaries))
    passes = 2 + 2 * len(places) + len(subject.dictionaries)
    total, done = passes * len(subject.text), 0
    means: dict[str, Tensor] = {}
    rows = torch.zeros(subject.text.context, dtype=torch.int64)
    for batch in subject.text.batches(subject.model):
        seen = forward(subject.model, batch.tokens, batch.keep, watch=places).seen
        for place in places:
            exact = seen[place].cpu()[batch.keep].double().sum(0)
            means[place] = means[place] + exact if place in means else exact
        rows += batch.keep.sum(0)
        done += len(batch.tokens)
        progress(done, total)
    means = {place: value / int(rows.sum()) for place, value in means.items()}

    tally = _Tally(subject, means)
    for batch in subject.text.batches(subject.model):
        tally.add(batch)
        done += (passes - 1) * len(batch.tokens)
        progress(done, total)
    return tally.record(rows)


class _Arm:
    """A dictionary, or what stands for one, with everything that is summed about it."""

    def __init__(self, dictionary: Dictionary, trained: int) -> None:
        self.dictionary = dictionary
        self.metrics = {name: Ratio(trained) for name in (*ROW_METRICS, *CE_METRICS, *RECOVERED)}
        self.unexplained = Ratio(trained)
        self.fired = torch.zeros(dictionary.module.d_sae, dtype=torch.int64)

    def add_rows(self, x: Tensor, target: Tensor, mean: Tensor, keep: Tensor) -> None:
        """Add rows [N, D] that it reads and [N, E] that it replaces; keep [B, C] says where they belong."""
        module = self.dictionary.module
        acts = module.encode(x)
        active = acts > 0
        residual = (target - module.reconstruct(x, acts)).double().square().sum(-1)
        values = {
            "l0": active.sum(-1),
            "l1": acts.double().sum(-1),
            "squared_error": residual,
            "norm": target.double().norm(dim=-1),
        }
        for name, found in values.items():
            self.metrics[name].add(on_grid(found, keep), None, keep)
        distance = (target.double() - mean.to(target.device)).square().sum(-1)
        self.unexplained.add(on_grid(residual, keep), on_grid(distance, keep), keep)
        self.fired += active.sum(0).cpu()

    def add_losses(
        self, ce: Tensor, kl: Tensor, clean: Tensor, ablated: dict[str, Tensor], batch: Batch
    ) -> None:
        """Add cross-entropies [B, C − 1] of this arm, the clean one and the ablations, and kl [B, C]."""
        predicts = padded(batch.predicts)
        self.metrics["ce"].add(padded(ce), None, predicts)
        self.metrics["delta_ce"].add(padded(ce - clean), None, predicts)
        self.metrics["kl"].add(kl, None, batch.keep)
        for name, other in ablated.items():
            recovered = self.metrics[f"ce_recovered_{name}"]
            recovered.add(padded(other - ce), padded(other - clean), predicts)

    def record(self) -> dict[str, Any]:
        found = {name: metric.record() for name, metric in self.metrics.items()}
        found["explained_variance"] = _explained(self.unexplained.record())
        return found


class _Tally:
    """Everything that is summed over the batches."""

    def __init__(self, subject: Subject, means: dict[str, Tensor]) -> None:
        self.subject, self.means = subject, means
        trained = subject.trained_context
        self.clean = Ratio(trained)
        self.arms = [_Arm(one, trained) for one in subject.dictionaries]
        self.ablations = {
            place: {
                "zero": _Arm(Dictionary("zero", place, place, Constant(torch.zeros_like(mean))), trained),
                "mean": _Arm(Dictionary("mean", place, place, Constant(mean)), trained),
            }
            for place, mean in means.items()
        }
        self.controls: dict[str, Any] = {}

    def add(self, batch: Batch) -> None:
        model, keep = self.subject.model, batch.keep
        hooks = self.subject.hook_names()
        clean = forward(model, batch.tokens, keep, watch=hooks)
        clean_ce = cross_entropy(clean.logits, batch.tokens)
        self.clean.add(padded(clean_ce), None, padded(batch.predicts))
        rows = {hook: acts[keep.to(acts.device)] for hook, acts in clean.seen.items()}

        def losses(one: Dictionary) -> tuple[Tensor, Tensor]:
            spliced = forward(model, batch.tokens, keep, [Splice(one)]).logits
            return cross_entropy(spliced, batch.tokens), divergence(clean.logits, spliced)

        ablated: dict[str, dict[str, Tensor]] = {}
        for place, arms in self.ablations.items():
            found = {name: losses(arm.dictionary) for name, arm in arms.items()}
            ablated[place] = {name: ce for name, (ce, _) in found.items()}
            for name, arm in arms.items():
                arm.add_rows(rows[place], rows[place], self.means[place], keep)
                arm.add_losses(*found[name], clean_ce, ablated[place], batch)
            if place not in self.controls:
                self.controls[place] = self._controls(batch, place, rows[place], clean.logits, found["zero"])
        for arm in self.arms:
            place = arm.dictionary.hook_out
            arm.add_rows(rows[arm.dictionary.hook_name], rows[place], self.means[place], keep)
            arm.add_losses(*losses(arm.dictionary), clean_ce, ablated[place], batch)

    def _controls(
        self, batch: Batch, place: str, rows: Tensor, clean: Tensor, zero: tuple[Tensor, Tensor]
    ) -> dict[str, Any]:
        """Dictionaries whose effect is known, on one batch: largest differences over its sequences."""
        model, keep = self.subject.model, batch.keep
        one = Dictionary("identity", place, place, Identity())
        spliced = forward(model, batch.tokens, keep, [Splice(one)]).logits
        moved = cross_entropy(spliced, batch.tokens) - cross_entropy(clean, batch.tokens)
        residual = (rows - one.module.reconstruct(rows, one.module.encode(rows))).double().square().sum(-1)
        mask = keep.to(model.device)[..., None]
        by_hand = model.logits(batch.tokens, {place: lambda acts: acts.masked_fill(mask, 0.0)}).float()
        zero_ce, zero_kl = cross_entropy(by_hand, batch.tokens), divergence(clean, by_hand)
        predicts = padded(batch.predicts)
        return {
            "sequences": len(batch.tokens),
            "identity": {
                "delta_ce": _largest(padded(moved), predicts),
                "kl": _largest(divergence(clean, spliced), keep),
                "squared_error": _largest(on_grid(residual, keep), keep),
            },
            "zero_against_ablation": {
                "ce": _largest(padded(zero[0] - zero_ce), predicts),
                "kl": _largest(zero[1] - zero_kl, keep),
            },
        }

    def record(self, rows: Tensor) -> dict[str, Any]:
        subject = self.subject
        return {
            "sequences": len(subject.text),
            "context": subject.text.context,
            "trained_context": subject.trained_context,
            "rows": rows.tolist(),
            "squared_error": "sum over dimensions, raw units",
            "mean_activation": "over all kept rows of the same text",
            "ce_clean": self.clean.record(),
            "sites": {
                place: {name: arm.record() for name, arm in arms.items()}
                for place, arms in self.ablations.items()
            },
            "controls": self.controls,
            "dictionaries": [
                {
                    "name": arm.dictionary.name,
                    "hook_name": arm.dictionary.hook_name,
                    "hook_out": arm.dictionary.hook_out,
                    "d_sae": arm.dictionary.module.d_sae,
                    "l0": arm.metrics["l0"].overall()["mean"],
                    "metrics": arm.record(),
                    "density": density(arm.fired, int(rows.sum())),
                }
                for arm in self.arms
            ],
        }


def _largest(values: Tensor, keep: Tensor) -> list[float | None]:
    """Largest size per position over sequences; null where there is none."""
    sizes = values.cpu().abs().masked_fill(~keep, -1.0).amax(0)
    return [float(value) if value >= 0 else None for value in sizes]


def _explained(unexplained: dict[str, Any]) -> dict[str, Any]:
    """1 − what is unexplained; the comparison stays one of the unexplained."""

    def flip(values: list[float | None] | float | None) -> list[float | None] | float | None:
        if isinstance(values, list):
            return [None if value is None else 1 - value for value in values]
        return None if values is None else 1 - values

    parts = ("by_position", "overall", "within", "beyond")
    flipped = {part: unexplained[part] | {"mean": flip(unexplained[part]["mean"])} for part in parts}
    return flipped | {"unexplained_beyond_over_within": unexplained["beyond_over_within"]}
