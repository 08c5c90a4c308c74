"""Forward passes in which dictionaries stand in for activations.

    replaced = x̂, or x̂ + (a − x̂₀) where the SAE's error is kept

a is what arrives at the hook point that is replaced, x̂ the reconstruction and x̂₀ the reconstruction before
features were changed. Rows of special tokens (BOS, end of text) are neither replaced nor counted, in any arm.
What is watched is recorded as it arrives, before anything there is replaced.

Shapes: B sequences, C positions, the first of which is 0, D width of a hook point, S features,
V vocabulary, N kept rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penstock.common.errors import UserError
from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.splicing.dictionaries import Dictionary

Change = Callable[[Tensor], Tensor]
"""Feature activations [N, S] -> what is decoded in their place. Must not write into what it is given."""


@dataclass(frozen=True)
class Splice:
    """A dictionary in place of the activations of its hook point.

    Attributes:
        keep_error: add what the unchanged reconstruction misses, so that only `change` matters.
        reads: what the dictionary reads: what arrives in this pass, or what the clean pass had there.
        change: what is done to feature activations before they are decoded.
    """

    dictionary: Dictionary
    keep_error: bool = False
    reads: Literal["stream", "clean"] = "stream"
    change: Change | None = None


@dataclass(frozen=True)
class Pass:
    """A forward pass: logits [B, C, V] float32, and per watched hook point [B, C, D] float32."""

    logits: Tensor
    seen: dict[str, Tensor]


def forward(
    model: LanguageModel,
    tokens: Tensor,
    keep: Tensor,
    splices: Sequence[Splice] = (),
    watch: Sequence[str] = (),
    clean: Mapping[str, Tensor] | None = None,
) -> Pass:
    """Run the model with some hook points replaced.

    Args:
        tokens: [B, C] token ids.
        keep: [B, C] bool, the rows that are replaced: all but those of special tokens.
        watch: hook points to record.
        clean: `Pass.seen` of a clean pass over the same tokens, for splices that read it.

    Raises:
        UserError: two splices replace the same hook point, or one reads what comes after its place.
    """
    places = [splice.dictionary.hook_out for splice in splices]
    if twice := {place for place in places if places.count(place) > 1}:
        raise UserError(f"{min(twice)} is replaced by two dictionaries at once; give one")
    mask = keep.to(model.device)
    seen: dict[str, Tensor] = {}
    arrived: dict[str, Tensor] = {}
    inputs = {splice.dictionary.hook_name for splice in splices if splice.reads == "stream"}
    by_place = {splice.dictionary.hook_out: splice for splice in splices}

    def at(name: str) -> Callable[[Tensor], Tensor]:
        def function(acts: Tensor) -> Tensor:
            if name in watch:
                seen[name] = acts.to(torch.float32, copy=True)
            if name in inputs:
                arrived[name] = acts.float()[mask]
            if name not in by_place:
                return acts
            splice = by_place[name]
            source = splice.dictionary.hook_name
            if splice.reads == "stream":
                if source not in arrived:
                    raise UserError(
                        f"{splice.dictionary.name}: {source} comes after {name} in a forward pass, too late "
                        "for what stands in there; train it with hook_name and hook_out swapped"
                    )
                x = arrived[source]
            else:
                assert clean is not None
                x = clean[source].to(mask.device)[mask]
            replaced = acts.clone()
            replaced[mask] = _stand_in(splice, x, acts.float()[mask]).to(acts.dtype)
            return replaced

        return function

    names = dict.fromkeys([*watch, *inputs, *by_place])
    logits = model.logits(tokens, {name: at(name) for name in names})
    return Pass(logits.float(), seen)


def _stand_in(splice: Splice, x: Tensor, arrives: Tensor) -> Tensor:
    """What replaces rows [N, E] that arrive, from the rows [N, D] that the dictionary reads."""
    module = splice.dictionary.module
    acts = module.encode(x)
    changed = acts if splice.change is None else splice.change(acts)
    result = module.reconstruct(x, changed)
    if splice.keep_error:
        # the error is that of the unchanged features: without a change nothing changes
        result = result + (arrives - module.reconstruct(x, acts))
    return result
