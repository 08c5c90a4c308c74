"""Features judged by how the model fares on the prompts that they are active on.

A feature is active on a prompt if it is on one of the prompt's last T tokens (`last_tokens`), in the clean
stream. With its dictionary in place of the activations, over the prompts that a feature is active on:

    prompts           how many there are
    score             Σ of the sign of Δln p: +1 where the answer became likelier, −1 where less likely
    outcome           Σ of +1 where a wrong answer became right, −1 where a right one became wrong
    mean_delta_ln_p   mean Δln p
    attribution       Σ a·Δln p, a the mean activation over the prompt's last T tokens

A feature that is active on no prompt has no score, which is not a score of 0: all of these are missing.
Scores say what goes with a feature, not what it causes: all features of a prompt share its Δln p.
`ablation.py` takes features out one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from penstock.trainer import figures
from penstock.trainer.judging.shown import AT_ONCE, Shown, Table, keyed, with_l0
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.splice import Splice, forward
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.tasks import task_figures
from penstock.trainer.judging.tasks.cloze import Cloze
from penstock.trainer.judging.tasks.cloze_score import Progress, layer
from penstock.trainer.judging.tasks.prompts import Prompts, batches, per_prompt
from penstock.trainer.judging.tasks.task_settings import FeatureScoreSettings
from penstock.trainer.row_figures import density

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


@torch.no_grad()
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


def show(record: dict[str, Any]) -> list[Shown]:
    """Figures and tables of a record."""
    found = record["dictionaries"]
    if not found:
        return []
    rows: list[list[object]] = []
    groups = []
    for place, one in enumerate(found):
        columns = ("prompts", "score", "outcome", "mean_delta_ln_p", "attribution")
        known = [f for f, prompts in enumerate(one["prompts"]) if prompts]
        rows += [[one["name"], one["l0"], f, *(one[name][f] for name in columns)] for f in known]
        points = [(one["prompts"][f], one["score"][f]) for f in known]
        groups.append((one["name"], figures.tone(place), points))
    missing = ", ".join(f"{one['never_active']:,} of {one['features']:,} in {one['name']}" for one in found)
    note = (
        f"Features active on one of a prompt's last {record['last_tokens']} tokens: +1 for each prompt whose "
        "answer became likelier with the dictionary in place, −1 for each whose became less likely."
    )
    few = max(1, AT_ONCE // len(found) // 2)
    header = ["prompts", "score", "outcome", "mean Δln p", "attribution"]
    return [
        Shown(
            "feature_scores",
            "Scores of features",
            f"{note} At most {task_figures.MAX_DOTS} of each dictionary are drawn. "
            f"Active on no prompt, and without a score: {missing}.",
            ["dictionary", "L0", "feature", *header],
            rows,
            Markup(
                task_figures.scatter(
                    *("feature-scores", "Score of each feature against the prompts it is active on"),
                    *(groups, ("prompts that the feature is active on", "score")),
                    log_x=True,
                )
            ),
            legend=keyed([with_l0(one["name"], one["l0"]) for one in found]),
        ),
        Shown(
            "feature_scores_listed",
            "The lowest and highest scores",
            "Of each dictionary, its lowest and its highest ones. They say what goes with a feature, not "
            "what it causes: all features of a prompt share Δln p.",
            ["dictionary", "L0", "feature", *header],
            [
                row
                for one in found
                for row in _ends([r for r in rows if r[0] == one["name"]], record["listed"])
            ],
            table=Table(
                ["dictionary", "L0", "feature", *header],
                [row for one in found for row in _ends([r for r in rows if r[0] == one["name"]], few)],
            ),
        ),
        *(_density(one, place) for place, one in enumerate(found)),
    ]


def _ends(rows: list[list[object]], listed: int) -> list[list[object]]:
    """Rows with the lowest scores, then those with the highest, none twice."""
    ordered = sorted(rows, key=lambda row: (row[4], row[6]))
    return ordered if len(ordered) <= 2 * listed else [*ordered[:listed], *ordered[-listed:]]


def _density(one: dict[str, Any], place: int) -> Shown:
    found = one["density"]
    edges, counts = found["log10_edges"], found["counts"]
    rows: list[list[object]] = [[None, None, found["never_active"]]]
    rows += [[low, high, n] for low, high, n in zip(edges, edges[1:], counts, strict=False)]
    return Shown(
        f"prompt_density_{one['name']}",
        f"Feature density on prompts: {one['name']}",
        f"Up: features; right: the share of the prompts' tokens that they are active on. "
        f"{found['never_active']:,} are active on none and stand apart. L0 {one['l0']:.1f}",
        ["log10 from", "log10 to", "features"],
        rows,
        Markup(
            figures.density(
                *(f"prompt-density-{one['name']}", f"Feature density of {one['name']}", figures.tone(place)),
                *(edges, counts, found["never_active"]),
                of="the prompts' tokens",
            )
        ),
    )
