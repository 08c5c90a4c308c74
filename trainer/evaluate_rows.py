"""What a run's SAEs are worth on held-out rows where there is no language model to put them into.

The figures are those of `trainer/evaluate.py` that need rows alone; those of the cross-entropy are None.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.trainer.evaluate import HookTally, SAETally, add_hook, density
from penstock.trainer.sae import SAE


@torch.no_grad()
def evaluate_rows(
    saes: Mapping[str, tuple[tuple[str, ...], SAE]],
    sequences: Iterable[Mapping[str, Tensor]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Evaluate SAEs on rows.

    Args:
        saes: name -> (hook points of its input and of its target, SAE that takes raw activations).
        sequences: {hook point: [n, d_in] float32}, held out from training.
        progress: called with the sequences done.

    Returns:
        {"sequences": n, "saes": {name: figures}, "controls": {}}
    """
    targets = {hooks[-1]: HookTally() for hooks, _ in saes.values()}
    tallies = {name: SAETally(sae, hooks[0], hooks[-1]) for name, (hooks, sae) in saes.items()}
    done = 0
    for rows in sequences:
        for hook, tally in targets.items():
            add_hook(tally, rows[hook])
        for name, (hooks, sae) in saes.items():
            acts = sae.encode(rows[hooks[0]])
            active, difference = acts > 0, rows[hooks[-1]] - sae.decode(acts)
            tallies[name].residual += float(difference.double().square().sum())
            tallies[name].active += float(active.sum())
            tallies[name].fired += active.sum(0)
        done += 1
        progress(done)
    figures = {name: _figures(tallies[name], targets[hooks[-1]]) for name, (hooks, _) in saes.items()}
    return {"sequences": done, "saes": figures, "controls": {}}


def _figures(tally: SAETally, target: HookTally) -> dict[str, Any]:
    return {
        "rows": target.rows,
        "l0": tally.active / target.rows,
        "loss": tally.residual / target.rows * (tally.sae.folded_scale or 1.0) ** 2,
        "explained_variance": 1 - tally.residual / target.variance(),
        "ce_clean": None,
        "ce_spliced": None,
        "ce_zero": None,
        "ce_recovered": None,
        "delta_ce": None,
        "kl": None,
        "dead_features": int((tally.fired == 0).sum()),
        "density": density(tally.fired, target.rows),
    }
