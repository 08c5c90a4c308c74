"""What a run's SAEs are worth on held-out text, by themselves and inside the model.

Held-out sequences are run through the language model once clean and once per SAE with its hook point
replaced by the reconstruction. A transcoder's output hook point is replaced by what it computes from its
input hook point in the clean pass; its variance is that of the output hook point. Rows of special tokens
(BOS, end of text) are neither replaced nor counted, in any arm.

    loss = mean Σ_d (x − x̂)² · s², in the units of training (s is the input scale)
    explained variance = 1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖²
    cross-entropy recovered = (CE_zero − CE_sae) / (CE_zero − CE_clean)
    ΔCE = CE_sae − CE_clean
    KL = mean KL(clean ‖ with the SAE) of next-token distributions, in nats

where CE is nats per predicted token and CE_zero replaces activations by zeros: an identity in place of
the SAE gives 1, a zero dictionary 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.common.errors import UserError
from penstock.common.model.language_model import LanguageModel
from penstock.store.corpus import HELD_OUT, Corpus
from penstock.trainer.judging.measures import divergence
from penstock.trainer.judging.text import LOGIT_BYTES
from penstock.trainer.sae import SAE

DENSITY_EDGES = np.linspace(-5.0, 0.0, 51)
"""Edges of the feature-density histogram, log10 of the share of rows a feature is active on."""

Replacement = Callable[[Tensor], Tensor]

Hooks = str | Sequence[str]
"""One hook point, or those of a transcoder: its input's and its output's."""


@dataclass
class SAETally:
    """Sums over held-out rows of one SAE."""

    sae: SAE
    hook_name: str
    hook_out: str
    residual: float = 0.0
    active: float = 0.0
    fired: Tensor = field(default_factory=lambda: torch.zeros(0))
    cross_entropy: float = 0.0
    divergence: float = 0.0

    def __post_init__(self) -> None:
        self.fired = torch.zeros(self.sae.d_sae, dtype=torch.int64)


@dataclass
class HookTally:
    """Sums over held-out rows of one hook point."""

    rows: int = 0
    total: Tensor | None = None
    squares: float = 0.0
    zero: float = 0.0

    def variance(self) -> float:
        """Σ‖x − mean(x)‖²."""
        assert self.total is not None
        return self.squares - float((self.total / self.rows).square().sum()) * self.rows


def evaluate(
    model: LanguageModel,
    corpus: Corpus,
    saes: Mapping[str, tuple[Hooks, SAE]],
    max_sequences: int,
    batch_sequences: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate SAEs on held-out sequences.

    Args:
        saes: name -> (hook point, or those of a transcoder, SAE that takes raw activations).
        max_sequences: held-out sequences used, from the start.
        batch_sequences: of one pass, at most; fewer where their logits would be large.
        progress: called with sequences done and in all.

    Returns:
        {"saes": {name: figures}, "controls": {...}}; see the module for what they mean.

    Raises:
        UserError: the corpus holds nothing out.
    """
    at_once = LOGIT_BYTES // (4 * corpus.manifest.context * model.vocabulary)
    batch_sequences = max(1, min(batch_sequences, at_once))
    n = min(max_sequences, corpus.manifest.n_held_out)
    if n == 0:
        raise UserError("evaluation: the corpus has no held-out sequences; add text to it")
    tallies = {name: SAETally(sae, *_pair(hooks)) for name, (hooks, sae) in saes.items()}
    hooks = {tally.hook_out: HookTally() for tally in tallies.values()}
    wanted = list(dict.fromkeys([*(tally.hook_name for tally in tallies.values()), *hooks]))
    special = torch.tensor(corpus.manifest.special_ids)
    clean, predictions = 0.0, 0
    controls: dict[str, float] = {}
    for start in range(0, n, batch_sequences):
        tokens = torch.from_numpy(corpus.tokens(start, min(n, start + batch_sequences), HELD_OUT)).long()
        keep = ~torch.isin(tokens, special)
        captured = {hook: acts.float().cpu() for hook, acts in model.activations(tokens, wanted).items()}
        unchanged = _logits(model, tokens, keep)
        clean += _cross_entropy(unchanged, tokens, keep)
        for hook, tally in hooks.items():
            add_hook(tally, captured[hook][keep])
            tally.zero += _cross_entropy(_logits(model, tokens, keep, hook, torch.zeros_like), tokens, keep)
        for sae_tally in tallies.values():
            x = captured[sae_tally.hook_name]
            _add_sae(sae_tally, x[keep], captured[sae_tally.hook_out][keep])
            arm = _replacement(sae_tally, x.flatten(0, 1))
            logits = _logits(model, tokens, keep, sae_tally.hook_out, arm)
            sae_tally.cross_entropy += _cross_entropy(logits, tokens, keep)
            sae_tally.divergence += _divergence(unchanged, logits, keep)
        controls = controls or _controls(model, tokens, keep, next(iter(hooks)), clean)
        predictions += int(keep[:, :-1].sum())
        progress(min(n, start + batch_sequences), n)
    base = clean / predictions
    return {
        "sequences": n,
        "saes": {
            name: _figures(tally, hooks[tally.hook_out], base, predictions) for name, tally in tallies.items()
        },
        "controls": controls,
    }


def recovered(clean: float, spliced: float, zero: float) -> float:
    """(CE_zero − CE_spliced) / (CE_zero − CE_clean)."""
    return (zero - spliced) / (zero - clean) if zero != clean else float("nan")


def _controls(
    model: LanguageModel, tokens: Tensor, keep: Tensor, hook: str, clean: float
) -> dict[str, float]:
    """The measurement measured: dictionaries whose score is known, on one batch."""
    arms: dict[str, Replacement] = {"identity": lambda x: x, "zero": lambda x: x * 0}

    def loss(arm: Replacement) -> float:
        return _cross_entropy(_logits(model, tokens, keep, hook, arm), tokens, keep)

    zero = loss(torch.zeros_like)
    return {f"{name}_ce_recovered": recovered(clean, loss(arm), zero) for name, arm in arms.items()}


def density(fired: Tensor, rows: int) -> dict[str, Any]:
    """Histogram of log10 firing frequency; features never active are counted apart."""
    counts = fired[fired > 0].double().numpy()
    log_frequency = np.clip(np.log10(counts / rows), DENSITY_EDGES[0], DENSITY_EDGES[-1])
    histogram, _ = np.histogram(log_frequency, DENSITY_EDGES)
    return {
        "log10_edges": DENSITY_EDGES.round(6).tolist(),
        "counts": histogram.tolist(),
        "never_active": int((fired == 0).sum()),
    }


def add_hook(tally: HookTally, rows: Tensor) -> None:
    """Add rows [n, D] to a hook point's sums."""
    exact = rows.double()
    tally.rows += len(rows)
    tally.total = exact.sum(0) if tally.total is None else tally.total + exact.sum(0)
    tally.squares += float(exact.square().sum())


def _pair(hooks: Hooks) -> tuple[str, str]:
    """Input and output hook point."""
    return (hooks, hooks) if isinstance(hooks, str) else (hooks[0], hooks[-1])


def _replacement(tally: SAETally, clean: Tensor) -> Replacement:
    """What stands in for the output hook point. clean: [B, D] of the input hook point."""
    if tally.hook_out == tally.hook_name:
        return tally.sae
    return lambda _: tally.sae(clean)


@torch.no_grad()
def _add_sae(tally: SAETally, rows: Tensor, targets: Tensor) -> None:
    acts = tally.sae.encode(rows)
    tally.residual += float((targets - tally.sae.reconstruct(rows, acts)).double().square().sum())
    tally.active += float((acts > 0).sum())
    tally.fired += (acts > 0).sum(0)


def _logits(
    model: LanguageModel,
    tokens: Tensor,
    keep: Tensor,
    hook_name: str | None = None,
    replacement: Replacement | None = None,
) -> Tensor:
    """Of every prediction [B, C − 1, V] float32, with one hook point replaced at kept positions."""
    splice: dict[str, Replacement] = {}
    if hook_name is not None and replacement is not None:
        mask = keep.to(model.device)[..., None]

        def function(acts: Tensor) -> Tensor:
            flat = acts.float().flatten(0, 1).cpu()
            replaced = replacement(flat).to(acts.device, acts.dtype).view_as(acts)
            return torch.where(mask, replaced, acts)

        splice = {hook_name: function}
    return model.logits(tokens, splice)[:, :-1].float()


def _cross_entropy(logits: Tensor, tokens: Tensor, keep: Tensor) -> float:
    """Sum of −ln p(next token) over kept positions."""
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten().to(logits.device), reduction="none"
    )
    return float(losses[keep[:, :-1].flatten().to(losses.device)].double().sum())


def _divergence(clean: Tensor, spliced: Tensor, keep: Tensor) -> float:
    """Sum of KL(clean ‖ spliced) over kept positions."""
    # a sequence at a time: what is computed in float64 is several times as large as logits
    return sum(
        float(divergence(p[None], q[None])[0, kept].sum())
        for p, q, kept in zip(clean, spliced, keep[:, :-1].to(clean.device), strict=True)
    )


def _figures(tally: SAETally, hook: HookTally, base: float, predictions: int) -> dict[str, Any]:
    spliced, zero = tally.cross_entropy / predictions, hook.zero / predictions
    return {
        "rows": hook.rows,
        "l0": tally.active / hook.rows,
        "loss": tally.residual / hook.rows * (tally.sae.folded_scale or 1.0) ** 2,
        "explained_variance": 1 - tally.residual / hook.variance(),
        "ce_clean": base,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_recovered": recovered(base, spliced, zero),
        "delta_ce": spliced - base,
        "kl": tally.divergence / predictions,
        "dead_features": int((tally.fired == 0).sum()),
        "density": density(tally.fired, hook.rows),
    }
