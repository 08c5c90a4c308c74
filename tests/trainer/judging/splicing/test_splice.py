"""Splicing, against dictionaries whose effect is known and against hooks placed by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.common.errors import UserError
from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.measures import cross_entropy, divergence
from penstock.trainer.judging.splicing.splice import Splice, forward
from penstock.trainer.judging.splicing.text import Batch, Text
from services.judged import RESIDS, constant, identity, untrained_sae, untrained_transcoder

PLACES = [*RESIDS, "blocks.1.mlp.hook_post", "blocks.2.attn.hook_out", "blocks.3.hook_mlp_out"]


@pytest.fixture(scope="module")
def batch(model: LanguageModel, text: Text) -> Batch:
    return next(text.batches(model))


def by_hand(model: LanguageModel, tokens: Tensor, hooks: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
    def hook(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda acts, hook: function(acts)

    pairs = [(name, hook(function)) for name, function in hooks.items()]
    with torch.inference_mode():
        logits: Tensor = model._bridge.run_with_hooks(tokens, fwd_hooks=pairs, return_type="logits")
    return logits.float()


@pytest.mark.parametrize("place", PLACES)
def test_an_identity_changes_nothing(model: LanguageModel, batch: Batch, place: str) -> None:
    clean = forward(model, batch.tokens, batch.keep)
    spliced = forward(model, batch.tokens, batch.keep, [Splice(identity(place))])
    torch.testing.assert_close(spliced.logits, clean.logits, rtol=0, atol=0)
    assert divergence(clean.logits, spliced.logits).max() == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_zero_dictionary_is_zero_ablation(model: LanguageModel, batch: Batch, place: str) -> None:
    width = model.widths([place])[place]
    spliced = forward(model, batch.tokens, batch.keep, [Splice(constant(place, torch.zeros(width)))])

    def ablate(acts: Tensor) -> Tensor:
        return acts.masked_fill(batch.keep[..., None], 0.0)

    assert torch.equal(spliced.logits, by_hand(model, batch.tokens, {place: ablate}))


def test_two_layers_at_once_are_two_hooks_by_hand(model: LanguageModel, batch: Batch) -> None:
    saes = [untrained_sae(RESIDS[1], seed=1), untrained_sae(RESIDS[4], seed=2)]

    def replace(dictionary: Dictionary) -> Callable[[Tensor], Tensor]:
        def function(acts: Tensor) -> Tensor:
            x = acts[batch.keep]
            result = acts.clone()
            result[batch.keep] = dictionary.module.reconstruct(x, dictionary.module.encode(x))
            return result

        return function

    spliced = forward(model, batch.tokens, batch.keep, [Splice(one) for one in saes])
    wanted = by_hand(model, batch.tokens, {one.hook_out: replace(one) for one in saes})
    assert torch.equal(spliced.logits, wanted)
    # the second one read what the first had left
    only = forward(model, batch.tokens, batch.keep, [Splice(saes[1])])
    assert not torch.allclose(spliced.logits, only.logits)


def test_a_dictionary_can_read_the_clean_stream(model: LanguageModel, batch: Batch) -> None:
    first, second = untrained_sae(RESIDS[1], seed=1), untrained_sae(RESIDS[4], seed=2)
    clean = forward(model, batch.tokens, batch.keep, watch=[RESIDS[4]])
    spliced = forward(
        *(model, batch.tokens, batch.keep),
        [Splice(first), Splice(second, reads="clean")],
        clean=clean.seen,
    )
    # whatever happened before is forgotten behind a layer whose residual stream is replaced
    alone = forward(model, batch.tokens, batch.keep, [Splice(second)])
    # (but not at the end of text in the middle of a sequence, whose row is never replaced)
    whole = batch.keep[:, 1:].all(1)
    assert 0 < whole.sum() < len(whole)
    torch.testing.assert_close(spliced.logits[whole, 1:], alone.logits[whole, 1:])


def test_with_its_error_kept_only_changes_count(model: LanguageModel, batch: Batch) -> None:
    one = untrained_sae(RESIDS[2])
    clean = forward(model, batch.tokens, batch.keep)
    kept = forward(model, batch.tokens, batch.keep, [Splice(one, keep_error=True)])
    torch.testing.assert_close(kept.logits, clean.logits, rtol=1e-4, atol=1e-4)
    ablated = forward(
        *(model, batch.tokens, batch.keep), [Splice(one, keep_error=True, change=torch.zeros_like)]
    )
    assert not torch.allclose(ablated.logits, clean.logits, atol=1e-2)


def test_a_transcoder_reads_one_place_and_replaces_another(model: LanguageModel, batch: Batch) -> None:
    into, out = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"
    one = untrained_transcoder(into, out)
    assert (one.hook_name, one.hook_out) == (into, out)
    clean = forward(model, batch.tokens, batch.keep, watch=[into])
    spliced = forward(model, batch.tokens, batch.keep, [Splice(one)])
    x = clean.seen[into][batch.keep]

    def replace(acts: Tensor) -> Tensor:
        result = acts.clone()
        result[batch.keep] = one.module.reconstruct(x, one.module.encode(x))
        return result

    assert torch.equal(spliced.logits, by_hand(model, batch.tokens, {out: replace}))


def test_what_comes_later_cannot_be_read(model: LanguageModel, batch: Batch) -> None:
    one = untrained_transcoder("blocks.2.hook_mlp_out", "blocks.2.ln2.hook_normalized")
    with pytest.raises(UserError, match=r"transcoder: blocks\.2\.hook_mlp_out comes after blocks\.2\.ln2"):
        forward(model, batch.tokens, batch.keep, [Splice(one)])


def test_what_is_watched_is_what_arrives(model: LanguageModel, batch: Batch) -> None:
    """Recorded before it is replaced: an SAE measured here is not one of its own reconstructions."""
    clean = forward(model, batch.tokens, batch.keep, watch=RESIDS)
    one = untrained_sae(RESIDS[2])
    spliced = forward(model, batch.tokens, batch.keep, [Splice(one)], watch=RESIDS)
    for hook in RESIDS[:3]:
        assert torch.equal(spliced.seen[hook], clean.seen[hook])
    for hook in RESIDS[3:]:
        assert not torch.equal(spliced.seen[hook], clean.seen[hook])


def test_special_rows_are_left_alone(model: LanguageModel, batch: Batch) -> None:
    one = constant(RESIDS[2], torch.zeros(192))
    spliced = forward(model, batch.tokens, batch.keep, [Splice(one)], watch=["blocks.3.hook_resid_pre"])
    there = spliced.seen["blocks.3.hook_resid_pre"]
    assert (there[batch.keep] == 0).all()
    assert (there[~batch.keep] != 0).any(-1).all()
    assert not batch.keep[:, 0].any()
    assert not batch.keep[2, 20]


def test_one_place_takes_one_dictionary(model: LanguageModel, batch: Batch) -> None:
    with pytest.raises(UserError, match=r"blocks\.1\.hook_resid_post is replaced by two"):
        forward(
            model, batch.tokens, batch.keep, [Splice(identity(RESIDS[1])), Splice(untrained_sae(RESIDS[1]))]
        )


def test_cross_entropy_and_divergence_by_hand() -> None:
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [5.0, 5.0]]])
    other = torch.tensor([[[1.0, 1.0], [0.0, 0.0], [5.0, 0.0]]])
    tokens = torch.tensor([[1, 0, 1]])
    expected = torch.stack([torch.tensor([0.0, 1.0]).logsumexp(0), torch.tensor([2.0, 0.0]).logsumexp(0)])[
        None
    ]
    torch.testing.assert_close(cross_entropy(logits, tokens).float(), expected)
    p = logits.softmax(-1)
    wanted = (p * (p.log() - other.softmax(-1).log())).sum(-1)
    torch.testing.assert_close(divergence(logits, other).float(), wanted)
    assert divergence(logits, logits).max() == 0
