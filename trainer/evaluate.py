"""What a run's SAEs are worth once it is done: on held-out text inside the model, or on held-out rows.

    loss = mean Σ_d (x − x̂)² · s², in the units of training (s is the input scale)

The other figures are those of `judging.costs`; where there is no language model to put SAEs into, those of
the cross-entropy are None.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.common.errors import UserError
from penstock.common.model.language_model import LanguageModel
from penstock.store.corpus import HELD_OUT, Corpus
from penstock.trainer.judging.splicing.costs import measure
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from penstock.trainer.row_figures import RowSums, Spread
from penstock.trainer.sae import SAE

SAEs = Mapping[str, SAE]
"""By name; they take raw activations."""

_WITHOUT_MODEL = ("ce_clean", "ce_spliced", "ce_zero", "ce_recovered", "delta_ce", "kl")


def held_out_text(corpus: Corpus, max_sequences: int) -> Text:
    """The corpus's first held-out sequences.

    Raises:
        UserError: the corpus holds nothing out.
    """
    n = min(max_sequences, corpus.manifest.n_held_out)
    if n == 0:
        raise UserError("evaluation: the corpus has no held-out sequences; add text to it")
    return Text(corpus.tokens(0, n, HELD_OUT), corpus.manifest.special_ids)


def evaluate(
    model: LanguageModel,
    text: Text,
    saes: SAEs,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate SAEs on text, inside the model.

    Args:
        progress: called with passes over sequences done and in all.

    Returns:
        {"sequences": n, "saes": {name: figures}, "controls": {...}}
    """
    dictionaries = [Dictionary.of_sae(name, sae, model.device) for name, sae in saes.items()]
    found = measure(Subject(model, text, dictionaries, text.context), progress)
    return found | {"saes": {name: _with_loss(found["saes"][name], sae) for name, sae in saes.items()}}


@torch.inference_mode()
def evaluate_rows(
    saes: SAEs,
    sequences: Iterable[Mapping[str, Tensor]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Evaluate SAEs on rows.

    Args:
        sequences: {hook point: [N, D] float32}, held out from training.
        progress: called with the sequences done.

    Returns:
        {"sequences": n, "saes": {name: figures}, "controls": {}}
    """
    places = {name: sae.settings.hooks for name, sae in saes.items()}
    spreads = {hooks[-1]: Spread() for hooks in places.values()}
    sums = {name: RowSums(sae.d_sae) for name, sae in saes.items()}
    done = 0
    for rows in sequences:
        for hook, spread in spreads.items():
            spread.add(rows[hook])
        for name, sae in saes.items():
            x, target = rows[places[name][0]], rows[places[name][-1]]
            acts = sae.encode(x)
            sums[name].add(target, sae.reconstruct(x, acts), acts)
        done += 1
        progress(done)
    nothing = dict.fromkeys(_WITHOUT_MODEL)
    figures = {
        name: _with_loss(sums[name].figures(spreads[places[name][-1]]) | nothing, sae)
        for name, sae in saes.items()
    }
    return {"sequences": done, "saes": figures, "controls": {}}


def _with_loss(figures: dict[str, Any], sae: SAE) -> dict[str, Any]:
    return figures | {"loss": figures["squared_error"] * (sae.folded_scale or 1.0) ** 2}
