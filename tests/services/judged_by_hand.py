"""Every metric worked out row by row with plain hooks: what the experiments must give."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.text import Text

Hook = Callable[[Tensor], Tensor]
Values = dict[str, dict[tuple[int, int], float]]
"""Metric -> (sequence, position) -> value."""


def run(model: LanguageModel, tokens: Tensor, hooks: dict[str, Hook]) -> Tensor:
    """Logits [C, V] of one sequence [C], with hooks of the bridge itself."""

    def hook(function: Hook) -> Callable[..., Any]:
        return lambda acts, hook: function(acts)

    pairs = [(name, hook(function)) for name, function in hooks.items()]
    with torch.inference_mode():
        logits: Tensor = model._bridge.run_with_hooks(tokens[None], fwd_hooks=pairs, return_type="logits")
    return logits[0].double()


def seen(model: LanguageModel, tokens: Tensor, name: str, hooks: dict[str, Hook]) -> Tensor:
    """What passes a hook point [C, D] behind other hooks."""
    found: list[Tensor] = []

    def keep(acts: Tensor) -> Tensor:
        found.append(acts[0].clone())
        return acts

    run(model, tokens, {**hooks, name: keep})
    return found[0].flatten(1)


def replaced(one: Dictionary, special: Tensor, read: Tensor | None = None) -> Hook:
    """Every row but those of special tokens by its reconstruction, one after the other.

    Args:
        read: [C, D] what a transcoder reads elsewhere.
    """

    def function(acts: Tensor) -> Tensor:
        result = acts.clone()
        for position in range(acts.shape[1]):
            if not special[position]:
                x = acts[0, position][None] if read is None else read[position][None]
                result[0, position] = one.module.reconstruct(x, one.module.encode(x))[0]
        return result

    return function


def metrics(model: LanguageModel, text: Text, one: Dictionary, mean: Tensor) -> Values:
    """Every metric of a dictionary at every row that counts. mean: [D] of the mean ablation."""
    found: Values = defaultdict(dict)
    for number in range(len(text)):
        tokens = torch.from_numpy(text.tokens[number]).long()
        special = torch.isin(tokens, torch.tensor(text.special_ids))
        clean = run(model, tokens, {})
        x, target = (seen(model, tokens, hook, {}) for hook in (one.hook_name, one.hook_out))
        read = None if one.hook_name == one.hook_out else x
        spliced = run(model, tokens, {one.hook_out: replaced(one, special, read)})

        zero = run(model, tokens, {one.hook_out: _constant(torch.zeros_like(mean), special)})
        other = run(model, tokens, {one.hook_out: _constant(mean, special)})
        for p in range(len(tokens)):
            if special[p]:
                continue
            acts = one.module.encode(x[p][None])
            error = target[p] - one.module.reconstruct(x[p][None], acts)[0]
            at = number, p
            found["l0"][at] = float((acts > 0).sum())
            found["l1"][at] = float(acts.abs().sum())
            found["squared_error"][at] = float((error.double() ** 2).sum())
            found["norm"][at] = float(target[p].double().norm())
            found["variance"][at] = float(((target[p].double() - mean) ** 2).sum())
            p_clean, p_spliced = clean[p].softmax(0), spliced[p].softmax(0)
            found["kl"][at] = float((p_clean * (p_clean.log() - p_spliced.log())).sum())
            if p + 1 < len(tokens):
                named = (("clean", clean), ("ce", spliced), ("zero", zero), ("mean", other))
                for name, logits in named:
                    found[name][at] = float(-logits[p].log_softmax(0)[tokens[p + 1]])
                found["delta_ce"][at] = found["ce"][at] - found["clean"][at]
    return found


def _constant(value: Tensor, special: Tensor) -> Hook:
    return lambda acts: torch.where(special[:, None], acts, value.to(acts))


def by_position(values: dict[tuple[int, int], float], context: int) -> list[float | None]:
    """Mean per position over sequences."""
    there = [[value for (_, p), value in values.items() if p == position] for position in range(context)]
    return [float(np.mean(some)) if some else None for some in there]


def mean_activation(model: LanguageModel, text: Text, hook_name: str) -> Tensor:
    """[D] over all rows that count."""
    rows = []
    for number in range(len(text)):
        tokens = torch.from_numpy(text.tokens[number]).long()
        x = seen(model, tokens, hook_name, {})
        rows.append(x[~torch.isin(tokens, torch.tensor(text.special_ids))])
    return torch.cat(rows).double().mean(0)
