"""Features judged by how the model fares on the prompts that they are active on.

A feature is active on a prompt if it is on one of the prompt's last T tokens (`last_tokens`), in the clean
stream. With its dictionary in place of the activations, over the prompts that a feature is active on:

    prompts           how many there are
    score             Σ of the sign of Δln p: +1 where the answer became likelier, −1 where less likely
    outcome           Σ of +1 where a wrong answer became right, −1 where a right one became wrong
    mean_delta_ln_p   mean Δln p
    attribution       Σ a·Δln p, a the mean activation over the prompt's last T tokens

A feature that is active on no prompt has no score, which is not a score of 0: all of these are missing. Scores
say what goes with a feature, not what it causes: all features of a prompt share its Δln p. `ablation.py` takes
features out one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from penstock.trainer.evaluate import density
from penstock.trainer.judging.cloze import Cloze
from penstock.trainer.judging.cloze_score import Progress, layer
from penstock.trainer.judging.dictionaries import Dictionary
from penstock.trainer.judging.prompts import Prompts, batches, per_prompt
from penstock.trainer.judging.splice import Splice, forward
from penstock.trainer.judging.subject import Subject
from penstock.trainer.judging.task_settings import FeatureScoreSettings

__all__ = ["FeatureSums", "add_scores", "measure"]

_SUMS = ("prompts", "score", "outcome", "delta_ln_p")


class FeatureSums:
    """Sums [S] over prompts, whatever their number."""

    def __init__(self, dictionary: Dictionary, device: torch.device) -> None:
        self.dictionary = dictionary
        features = dictionary.module.d_sae
        self.sums = torch.zeros((len(_SUMS), features), dtype=torch.float64, device=device)
        self.attribution = torch.zeros(features, dtype=torch.float64, device=device)
        self.fired = torch.zeros(features, dtype=torch.int64, device=device)
        self.rows = 0

    def add(self, batch: Prompts, x: Tensor, last_tokens: int, delta: Tensor, outcome: Tensor) -> None:
        """Add a batch.

        Args:
            x: [N, D] kept rows that the dictionary reads.
            delta: [B] Δln p.
            outcome: [B] +1, 0 or −1.
        """
        acts = self.dictionary.module.encode(x)
        self.fired += (acts > 0).sum(0)
        self.rows += len(acts)
        recent = batch.recent(last_tokens)
        acts = acts[recent[batch.keep].to(acts.device)]
        active = (per_prompt((acts > 0).float(), recent) > 0).double()
        every = torch.stack([torch.ones_like(delta), delta.sign(), outcome.double(), delta])
        self.sums += every.to(active.device) @ active
        tokens = recent.sum(1).clamp(min=1).to(active.device)
        strength = per_prompt(acts, recent).double() / tokens[:, None]
        self.attribution += delta.to(active.device) @ strength

    def record(self) -> dict[str, Any]:
        sums = dict(zip(_SUMS, self.sums.cpu(), strict=True))
        prompts = sums["prompts"].long()
        known = (prompts > 0).tolist()

        def missing(values: list[Any]) -> list[Any]:
            return [value if there else None for value, there in zip(values, known, strict=True)]

        return {
            "name": self.dictionary.name,
            "hook_name": self.dictionary.hook_name,
            "hook_out": self.dictionary.hook_out,
            "layer": layer(self.dictionary.hook_out),
            "l0": int(self.fired.sum()) / self.rows if self.rows else None,
            "features": len(known),
            "never_active": known.count(False),
            "prompts": prompts.tolist(),
            "score": missing(sums["score"].long().tolist()),
            "outcome": missing(sums["outcome"].long().tolist()),
            "mean_delta_ln_p": missing((sums["delta_ln_p"] / prompts).tolist()),
            "attribution": missing(self.attribution.cpu().tolist()),
            "density": density(self.fired.cpu(), max(self.rows, 1)),
        }


def measure(
    subject: Subject,
    cloze: Cloze,
    settings: FeatureScoreSettings,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Score every feature of every dictionary.

    Args:
        progress: called with passes over prompts, done and in all.

    Returns:
        A record; what is per feature has S entries, null where a feature is active on no prompt.
    """
    sums = [FeatureSums(one, subject.model.device) for one in subject.dictionaries]
    add_scores(subject, cloze, sums, settings.last_tokens, progress)
    return {
        "prompts": len(cloze.items),
        "last_tokens": settings.last_tokens,
        "listed": settings.listed,
        "dictionaries": [one.record() for one in sums],
    }


def add_scores(
    subject: Subject,
    cloze: Cloze,
    sums: list[FeatureSums],
    last_tokens: int,
    progress: Callable[[int, int], None],
) -> None:
    """Add all prompts to the sums of dictionaries."""
    model = subject.model
    done, total = 0, len(cloze.items) * (1 + len(sums))
    hooks = list(dict.fromkeys(one.dictionary.hook_name for one in sums))
    for batch in batches(subject, cloze.items):
        clean = forward(model, batch.tokens, batch.keep, watch=hooks)
        before, was_right = batch.outcome(clean)
        done += len(batch.index)
        for one in sums:
            spliced = forward(model, batch.tokens, batch.keep, [Splice(one.dictionary)])
            after, is_right = batch.outcome(spliced)
            x = clean.seen[one.dictionary.hook_name][batch.keep.to(model.device)]
            one.add(batch, x, last_tokens, after - before, is_right.long() - was_right.long())
            done += len(batch.index)
            progress(done, total)
