"""SAELens's own evaluation of our exports beside ours. Runs in the environment of the other libraries.

It runs the model itself, by its TransformerLens, with the functions behind its `run_evals`. Where
definitions differ it is asked what we ask:

- its zero ablation takes the rows of special tokens too, while its splicing leaves them alone; here both
  leave them alone. Without BOS, a model is broken in another way;
- its cross-entropy leaves special rows out where a token is predicted from, as ours does; both count a
  special token where it is predicted. Both take the KL divergence at the last position too;
- `explained_variance` is of all rows together, as ours is. `explained_variance_legacy` averages 1 − error
  over distance row by row, with the mean of a batch: another figure, which is not compared;
- `l0` counts what is not 0, ours what is above: the same in kinds without negative activations;
- `mse` is the sum over dimensions, as our squared error.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

TOLERANCE = 1e-3
"""Largest difference, relative for what is larger than 1."""
SHOWN = {
    "ce_loss_score": "CE recovered",
    "kl_div_with_sae": "KL",
    "explained_variance": "explained variance",
    "l0": "L0",
}
"""What is printed of what is compared."""

Hook = Callable[..., Tensor]


class Sequences:
    """In place of SAELens's store of activations, which tokenises text of its own choice."""

    def __init__(self, tokens: Tensor, batches: int) -> None:
        self._batches = iter(tokens.chunk(batches))

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        return next(self._batches)


class Model:
    """The language model, with rows of special tokens left alone by every hook."""

    def __init__(self, directory: str, special_ids: list[int]) -> None:
        self._bridge = TransformerBridge.boot_transformers(directory, dtype=torch.float32)
        self._special = torch.tensor(special_ids)

    def __call__(self, tokens: Tensor, **settings: Any) -> Any:
        return self._bridge(tokens, **settings)

    def run_with_cache(self, tokens: Tensor, **settings: Any) -> Any:
        return self._bridge.run_with_cache(tokens, **settings)

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: list[tuple[str, Hook]], **settings: Any) -> Any:
        special = torch.isin(tokens, self._special)[..., None]

        def spare(function: Hook) -> Hook:
            return lambda acts, hook: torch.where(special, acts, function(acts, hook))

        hooks = [(name, spare(function)) for name, function in fwd_hooks]
        return self._bridge.run_with_hooks(tokens, fwd_hooks=hooks, **settings)


def check_metrics(workdir: Path, batches: int = 3) -> bool:
    """Whether SAELens finds what we find, for every SAE that was judged."""
    told = json.loads((workdir / "judged" / "judged.json").read_text())
    tokens = load_file(workdir / "judged" / "tokens.safetensors")["tokens"]
    model = Model(told["model"], told["special_ids"])
    print(f"\nmetrics on {len(tokens)} sequences of {tokens.shape[1]} tokens: ours and SAELens's")
    same = True
    for name, ours in told["saes"].items():
        sae = SAE.load_from_disk(workdir / "exports" / "saelens" / name)
        theirs = measured(sae, model, tokens, batches, told["special_ids"])
        apart = {metric: abs(value - theirs[metric]) / max(1.0, abs(value)) for metric, value in ours.items()}
        # a comparison with NaN is never small enough
        wrong = [metric for metric, difference in apart.items() if not difference <= TOLERANCE]
        pairs = (f"{title} {ours[key]:.5f} {theirs[key]:.5f}" for key, title in SHOWN.items())
        worst = max(apart, key=lambda metric: apart[metric])
        told_wrong = f"  DIFFERENT: {', '.join(wrong)}" if wrong else ""
        print(f"{name:16s} {', '.join(pairs)}; at most {apart[worst]:.1e} ({worst}){told_wrong}", flush=True)
        same = same and not wrong
    return same


def measured(
    sae: Any, model: Model, tokens: Tensor, batches: int, special_ids: list[int]
) -> dict[str, float]:
    """Every figure of SAELens that we have too."""
    scaler = ActivationScaler()  # does nothing: exports have their scale folded in
    told: dict[str, float] = get_downstream_reconstruction_metrics(
        *(sae, model, Sequences(tokens, batches), scaler),
        compute_kl=True,
        compute_ce_loss=True,
        n_batches=batches,
        eval_batch_size_prompts=len(tokens) // batches,
        ignore_tokens=special_ids,
    )
    rows, _ = get_sparsity_and_variance_metrics(
        *(sae, model, Sequences(tokens, batches), scaler),
        n_batches=batches,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=False,
        eval_batch_size_prompts=len(tokens) // batches,
        model_kwargs={},
        ignore_tokens=special_ids,
    )
    told.update(rows)
    return told
