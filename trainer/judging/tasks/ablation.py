"""Single features taken out, one at a time: what each one does to the answers of prompts.

    effect = ln p(answer) without the feature − ln p(answer) with it

The dictionary stands in with its error kept, so that nothing but the feature changes: its activation becomes
0 on every kept token of the prompt. A feature is *helpful* where that lowers ln p, *harmful* where it raises
it. Features are ranked by their mean effect over all prompts that were tried, 0 on those that they are not
active on: what they mean for the tasks as a whole. Beside it stands the mean over the prompts that they are
active on.

Every feature would be too many. Those taken out are the candidates with the largest |attribution| of
`feature_scores.py`, which needs no gradients and is a guess; what is reported of them is exact.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from markupsafe import Markup
from torch import Tensor

from penstock.trainer.judging.features.heat import visible
from penstock.trainer.judging.shown import AT_ONCE, Shown, Table, keyed, with_l0
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.splice import Change, Splice, forward
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.tasks import task_figures
from penstock.trainer.judging.tasks.cloze import Cloze, Item
from penstock.trainer.judging.tasks.cloze_score import Progress, layer
from penstock.trainer.judging.tasks.feature_scores import FeatureSums, add_scores
from penstock.trainer.judging.tasks.prompts import batches, owner
from penstock.trainer.judging.tasks.task_settings import AblationSettings

Decode = Callable[[Sequence[int]], str]
"""Token ids -> their text."""
DRAWN = 3
"""Features drawn at each end of a dictionary's ranking."""

Matrix = npt.NDArray[np.float64]


@torch.no_grad()
def measure(
    subject: Subject,
    cloze: Cloze,
    settings: AblationSettings,
    decode: Decode,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Take the candidates of every dictionary out.

    Args:
        progress: called with dictionaries × 1000 done and in all: how many passes there will be is not known.

    Returns:
        A record of finite numbers: per dictionary `effects`, from the most harmful feature to the most
        helpful one, and the `harmful` and `helpful` ones with their strongest contexts.
    """
    items = spread(cloze.items, settings.prompts)
    total = 1000 * len(subject.dictionaries)
    records = []
    for place, one in enumerate(subject.dictionaries):

        def share(done: int, of: int, place: int = place) -> None:
            progress(1000 * place + 1000 * done // max(of, 1), total)

        alone = Subject(subject.model, subject.text, [one], subject.trained_context)
        records.append(_Ablation(alone, items, settings, decode).record(share))
    return {"prompts": len(items), "last_tokens": settings.last_tokens, "dictionaries": records}


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """At most so many items, the first ones of each task in turn."""
    tasks: dict[str, list[Item]] = {}
    for item in items:
        tasks.setdefault(item.task, []).append(item)
    longest = max(map(len, tasks.values()), default=0)
    turns = [members[turn] for turn in range(longest) for members in tasks.values() if turn < len(members)]
    return turns[:limit]


def without(features: Tensor) -> Change:
    """Sets one feature [N] of each row to 0."""

    def change(acts: Tensor) -> Tensor:
        changed = acts.clone()
        changed[torch.arange(len(acts), device=acts.device), features.to(acts.device)] = 0.0
        return changed

    return change


class _Ablation:
    """One dictionary. Shapes: P prompts, M candidates."""

    def __init__(
        self, subject: Subject, items: list[Item], settings: AblationSettings, decode: Decode
    ) -> None:
        self.subject, self.items, self.settings, self.decode = subject, items, settings, decode
        self.one: Dictionary = subject.dictionaries[0]

    def record(self, progress: Progress) -> dict[str, Any]:
        sums = FeatureSums(self.one, self.subject.model.device)
        add_scores(self.subject, Cloze(self.items), [sums], self.settings.last_tokens, lambda done, of: None)
        scored = sums.record()
        features = candidates(scored["attribution"], self.settings.candidates)
        peaks, places = self._peaks(features)
        kept, rounding = self._kept()
        effects = self._effects(features, peaks > 0, kept, progress)
        mean = effects.mean(0)
        order = sorted(range(len(features)), key=lambda m: (-mean[m], features[m]))

        def listed(columns: Sequence[int]) -> list[dict[str, Any]]:
            return [
                {"feature": features[m], "contexts": self._contexts(peaks[:, m], places[:, m], effects[:, m])}
                for m in columns[: self.settings.listed]
            ]

        return {
            "name": self.one.name,
            "hook_name": self.one.hook_name,
            "hook_out": self.one.hook_out,
            "layer": layer(self.one.hook_out),
            "l0": scored["l0"],
            "active_features": scored["features"] - scored["never_active"],
            "rounding": rounding,
            "effects": [
                {
                    "feature": features[m],
                    "prompts": int((peaks[:, m] > 0).sum()),
                    "mean_effect": float(mean[m]),
                    "mean_effect_active": float(effects[peaks[:, m] > 0, m].mean()),
                    "raised": int((effects[:, m] > 0).sum()),
                    "lowered": int((effects[:, m] < 0).sum()),
                    "attribution": scored["attribution"][features[m]],
                    "score": scored["score"][features[m]],
                }
                for m in order
            ],
            "harmful": listed([m for m in order if mean[m] > 0]),
            "helpful": listed([m for m in reversed(order) if mean[m] < 0]),
        }

    def _peaks(self, features: list[int]) -> tuple[Matrix, npt.NDArray[np.int64]]:
        """The candidates' largest activations [P, M], and where in the prompts they are."""
        model = self.subject.model
        peaks = np.zeros((len(self.items), len(features)))
        places = np.zeros(peaks.shape, np.int64)
        for batch in batches(self.subject, self.items):
            clean = forward(model, batch.tokens, batch.keep, watch=[self.one.hook_name])
            mask = batch.keep.to(model.device)
            acts = self.one.module.encode(clean.seen[self.one.hook_name][mask])[:, features]
            grid = acts.new_zeros((*batch.keep.shape, len(features)))
            grid[mask] = acts
            found, where = grid.max(1)
            peaks[batch.index], places[batch.index] = found.double().cpu().numpy(), where.cpu().numpy()
        return peaks, places

    def _kept(self) -> tuple[Matrix, float]:
        """ln p [P] with the error kept and no feature changed, and how far from the clean one it is."""
        model = self.subject.model
        kept, gap = np.zeros(len(self.items)), 0.0
        for batch in batches(self.subject, self.items):
            clean, _ = batch.outcome(forward(model, batch.tokens, batch.keep))
            splice = Splice(self.one, keep_error=True)
            found, _ = batch.outcome(forward(model, batch.tokens, batch.keep, [splice]))
            kept[batch.index] = found.numpy()
            gap = max(gap, float((found - clean).abs().max()))
        return kept, gap

    def _effects(
        self, features: list[int], active: npt.NDArray[np.bool_], kept: Matrix, progress: Progress
    ) -> Matrix:
        """[P, M] effects; 0 where a feature is not active on any token of a prompt."""
        effects = np.zeros(active.shape)
        prompts, columns = active.nonzero()
        chosen = torch.tensor(features, dtype=torch.int64)[torch.from_numpy(columns)]
        pairs = [self.items[prompt] for prompt in prompts]
        done = 0
        for batch in batches(self.subject, pairs):
            change = without(chosen[batch.index][owner(batch.keep)])
            splice = Splice(self.one, keep_error=True, change=change)
            found, _ = batch.outcome(forward(self.subject.model, batch.tokens, batch.keep, [splice]))
            at = prompts[batch.index]
            effects[at, columns[batch.index]] = found.numpy() - kept[at]
            done += len(batch.index)
            progress(done, len(pairs))
        return effects

    def _contexts(
        self, peaks: Matrix, places: npt.NDArray[np.int64], effects: Matrix
    ) -> list[dict[str, Any]]:
        """The prompts [P] on which a feature is strongest, around the token where it is."""
        found = []
        for prompt in np.argsort(-peaks, kind="stable")[: self.settings.contexts]:
            if peaks[prompt] <= 0:
                break
            item, at = self.items[prompt], int(places[prompt])
            found.append(
                {
                    "task": item.task,
                    "before": self.decode(item.tokens[max(0, at - self.settings.before) : at]),
                    "token": self.decode(item.tokens[at : at + 1]),
                    "after": self.decode(item.tokens[at + 1 : at + 1 + self.settings.after]),
                    "answer": item.answer,
                    "activation": float(peaks[prompt]),
                    "effect": float(effects[prompt]),
                }
            )
        return found


def candidates(attribution: Sequence[float | None], limit: int | None) -> list[int]:
    """Features with the largest |attribution|; those that are active on no prompt have none."""
    known = [(abs(value), feature) for feature, value in enumerate(attribution) if value is not None]
    return [feature for _, feature in sorted(known, key=lambda pair: (-pair[0], pair[1]))[:limit]]


def show(record: dict[str, Any]) -> list[Shown]:
    """Figures and tables of a record."""
    found = record["dictionaries"]
    if not found:
        return []
    figures = ("prompts", "mean_effect", "mean_effect_active", "raised", "lowered", "attribution", "score")
    rows: list[list[object]] = [
        [one["name"], one["l0"], entry["feature"], *(entry[name] for name in figures)]
        for one in found
        for entry in one["effects"]
    ]
    columns = [(one["name"], [(e["feature"], e["mean_effect"]) for e in one["effects"]]) for one in found]
    ends: list[list[object]] = [
        [
            one["name"],
            one["l0"],
            *(e[key] for e in (first, last) for key in ("feature", "mean_effect")),
        ]
        for one in found
        if one["effects"]
        for first, last in [(one["effects"][0], one["effects"][-1])]
    ]
    rounding = max(one["rounding"] for one in found)
    lines = [
        Shown(
            "ablation",
            "Features taken out, one at a time",
            "A dot per feature, the ends with their numbers: the mean change of the answer's ln p in nats, "
            f"over {record['prompts']:,} prompts, the rest of the activations untouched. Above 0 the feature "
            f"was harmful, below 0 helpful. Rounding alone gives up to {rounding:.1e}.",
            [
                *("dictionary", "L0", "feature", "prompts active", "mean effect", "mean where active"),
                *("raised", "lowered", "attribution", "score"),
            ],
            rows,
            Markup(task_figures.effects("ablation", "Effect of taking features out", columns)),
            Table(
                ["dictionary", "L0", "most harmful", "mean effect", "most helpful", "mean effect"],
                ends,
            ),
            keyed([with_l0(one["name"], one["l0"]) for one in found]),
        )
    ]
    for kind in ("harmful", "helpful"):
        lines.append(_contexts_shown(found, kind))
    return lines


def _contexts_shown(found: list[dict[str, Any]], kind: str) -> Shown:
    rows: list[list[object]] = []
    first: list[list[object]] = []
    for one in found:
        effects = {entry["feature"]: entry["mean_effect"] for entry in one["effects"]}
        for rank, entry in enumerate(one[kind]):
            for strongest, context in enumerate(entry["contexts"]):
                text = f"{context['before']}«{context['token']}»{context['after']}"
                values = (context["activation"], context["task"], context["answer"], context["effect"])
                rows.append(
                    [one["name"], one["l0"], entry["feature"], effects[entry["feature"]], text, *values]
                )
                if rank < max(1, AT_ONCE // len(found)) and strongest == 0:
                    seen = (_in_a_line(value) if isinstance(value, str) else value for value in rows[-1][4:])
                    first.append([*rows[-1][:4], *seen])
    columns = ["dictionary", "L0", "feature", "mean effect", "context", "activation", "task", "answer"]
    columns += ["effect here"]
    return Shown(
        f"ablation_{kind}",
        f"The most {kind} features, in context",
        "The first of each dictionary where they are strongest, the token in «», a line's end as ↵, eight "
        "spaces as ×8. Without "
        f"one the answer's ln p {'rises' if kind == 'harmful' else 'falls'} on average. The data have more "
        "of them, in more contexts.",
        columns,
        rows,
        table=Table(columns, first),
    )


def _in_a_line(text: str) -> str:
    """White space as it is shown, but for spaces: a table breaks lines there."""
    return visible(text).replace("·", " ")
