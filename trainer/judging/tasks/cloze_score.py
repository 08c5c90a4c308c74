"""How well the model closes prompts with each dictionary in place, beside the clean model.

An answer is right where its first token is the likeliest of all. With each dictionary in a pass of its own:

    Δln p = ln p(answer), spliced − ln p(answer), clean

and each prompt falls into one of four classes, clean outcome first: right_right, right_wrong, wrong_right,
wrong_wrong. Beside these, from the clean stream: Σ_d (x − x̂)² in the units of the activations, L0, and ‖x‖ of
what is replaced, at the prompt's last token (`last`) and as the mean over its kept rows (`mean`).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.splice import Splice, forward
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.tasks.cloze import Cloze, Item
from penstock.trainer.judging.tasks.prompts import Prompts, batches, owner, per_prompt

CLASSES = ("right_right", "right_wrong", "wrong_right", "wrong_wrong")
QUANTITIES = ("mse", "l0", "norm")
PLACES = ("last", "mean")
SHOWN_CHARACTERS = 120
"""Of a prompt's end, in the record."""

Progress = Callable[[int, int], None]


@torch.no_grad()
def measure(
    subject: Subject,
    cloze: Cloze,
    progress: Progress = lambda done, total: None,
    at_once: int | None = None,
) -> dict[str, Any]:
    """Score all items with the clean model and with each dictionary.

    Args:
        progress: called with passes over prompts, done and in all.
        at_once: see `prompts.batches`.

    Returns:
        A record of finite numbers and nulls. What is per item is in the order of `items`.
    """
    items = cloze.items
    clean = _Outcomes(len(items))
    arms = [_Arm(one, len(items)) for one in subject.dictionaries]
    done, total = 0, len(items) * (1 + len(arms))
    for batch in batches(subject, items, at_once=at_once):
        found = forward(subject.model, batch.tokens, batch.keep, watch=subject.hook_names())
        clean.add(batch, *batch.outcome(found))
        done += len(batch.index)
        for arm in arms:
            arm.add(subject, batch, found.seen)
            done += len(batch.index)
            progress(done, total)
        progress(done, total)
    lengths = [len(item.tokens) for item in items]
    return {
        "prompts": len(items),
        "tasks": cloze.tasks(),
        "left_out": cloze.left_out,
        "squared_error": "sum over dimensions, raw units",
        "trained_context": subject.trained_context,
        "beyond_trained_context": sum(length > subject.trained_context for length in lengths),
        "items": [_shown(item) for item in items],
        "clean": clean.record(items),
        "dictionaries": [arm.record(items, clean) for arm in arms],
    }


class _Outcomes:
    """ln p and whether it is right, per item."""

    def __init__(self, items: int) -> None:
        self.ln_p = np.full(items, np.nan)
        self.right = np.zeros(items, bool)

    def add(self, batch: Prompts, ln_p: Tensor, right: Tensor) -> None:
        self.ln_p[batch.index], self.right[batch.index] = ln_p.numpy(), right.numpy()

    def record(self, items: Sequence[Item]) -> dict[str, Any]:
        return {
            "accuracy": float(self.right.mean()),
            "mean_ln_p": float(self.ln_p.mean()),
            "by_task": {
                task: {
                    "prompts": int(which.sum()),
                    "accuracy": float(self.right[which].mean()),
                    "mean_ln_p": float(self.ln_p[which].mean()),
                }
                for task, which in _by_task(items).items()
            },
            "right": self.right.tolist(),
            "ln_p": self.ln_p.tolist(),
        }


class _Arm:
    """A dictionary with everything known about its prompts."""

    def __init__(self, dictionary: Dictionary, items: int) -> None:
        self.dictionary = dictionary
        self.outcomes = _Outcomes(items)
        self.values = {f"{one}_{place}": np.full(items, np.nan) for one in QUANTITIES for place in PLACES}
        self.active = self.rows = 0

    def add(self, subject: Subject, batch: Prompts, clean: dict[str, Tensor]) -> None:
        """Add a batch, from what the clean pass had at the hook points."""
        one, keep = self.dictionary, batch.keep
        spliced = forward(subject.model, batch.tokens, keep, [Splice(one)])
        self.outcomes.add(batch, *batch.outcome(spliced))
        mask = keep.to(subject.model.device)
        x, target = clean[one.hook_name][mask], clean[one.hook_out][mask]
        acts = one.module.encode(x)
        l0 = (acts > 0).sum(-1)
        self.active += int(l0.sum())
        self.rows += len(l0)
        residual = target.double() - one.module.reconstruct(x, acts).double()
        found = {"mse": residual.square().sum(-1), "l0": l0.double(), "norm": target.double().norm(dim=-1)}
        rows = keep.sum(1).double()
        at_last = torch.arange(keep.shape[1]).expand_as(keep)[keep] == batch.last[owner(keep)]
        has_last = keep[torch.arange(len(keep)), batch.last]
        for name, values in found.items():
            here = values.cpu()
            mean = per_prompt(here, keep) / rows
            last = torch.where(has_last, per_prompt(here * at_last, keep), torch.nan)
            self.values[f"{name}_mean"][batch.index] = mean.numpy()
            self.values[f"{name}_last"][batch.index] = last.numpy()

    def record(self, items: Sequence[Item], clean: _Outcomes) -> dict[str, Any]:
        ours = self.outcomes
        delta = ours.ln_p - clean.ln_p
        by_task = _by_task(items)
        found = ours.record(items)
        for task, which in by_task.items():
            found["by_task"][task] |= {
                "mean_delta_ln_p": float(delta[which].mean()),
                "classes": classes(clean.right[which], ours.right[which]),
            }
        return {
            "name": self.dictionary.name,
            "hook_name": self.dictionary.hook_name,
            "hook_out": self.dictionary.hook_out,
            "layer": layer(self.dictionary.hook_out),
            "l0": self.active / self.rows if self.rows else None,
            **found,
            "mean_delta_ln_p": float(delta.mean()),
            "classes": classes(clean.right, ours.right),
            "delta_ln_p": delta.tolist(),
            "values": {name: [_or_none(one) for one in all_] for name, all_ in self.values.items()},
            "spearman": {name: spearman(all_, delta) for name, all_ in self.values.items()},
        }


def classes(clean: npt.NDArray[np.bool_], spliced: npt.NDArray[np.bool_]) -> dict[str, int]:
    """How many prompts fall into each of the four classes."""
    sizes = {
        "right_right": int((clean & spliced).sum()),
        "right_wrong": int((clean & ~spliced).sum()),
        "wrong_right": int((~clean & spliced).sum()),
        "wrong_wrong": int((~clean & ~spliced).sum()),
    }
    assert sum(sizes.values()) == len(clean)
    return sizes


def spearman(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float | None:
    """Rank correlation over pairs of finite numbers, ties sharing their mean rank; None where undefined."""
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 3:
        return None
    a, b = (_ranks(values[known]) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if size else None


def layer(hook_name: str) -> int | None:
    """The layer that a hook point belongs to."""
    match = re.match(r"blocks\.(\d+)\.", hook_name)
    return int(match[1]) if match else None


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[place])


def _by_task(items: Sequence[Item]) -> dict[str, npt.NDArray[np.bool_]]:
    """Per task which items are of it, in order of appearance."""
    tasks = np.array([item.task for item in items])
    return {task: tasks == task for task in dict.fromkeys(tasks.tolist())}


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _shown(item: Item) -> dict[str, Any]:
    return {
        "task": item.task,
        "prompt": item.prompt[-SHOWN_CHARACTERS:],
        "answer": item.answer,
        "tokens": len(item.tokens),
    }
