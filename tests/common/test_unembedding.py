"""What directions do to logits, against the model's own weights and against the model itself."""

import pytest
import torch

from services.lm import shipped_model


def directions(width: int) -> torch.Tensor:
    return torch.randn((3, width), generator=torch.Generator().manual_seed(2))


def test_the_stream_goes_through_normalisation_and_unembedding() -> None:
    model, d = shipped_model(), directions(192)
    found = model.direct_logits(d, "blocks.2.hook_resid_mid")
    theirs = model._bridge.original_model
    gained = (d - d.mean(1, keepdim=True)) * theirs.transformer.ln_f.weight
    wanted = gained @ theirs.lm_head.weight.T
    wanted = wanted - wanted.mean(1, keepdim=True)
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_stream_of_nothing_else_has_these_logits() -> None:
    """Where a direction is all there is, the model's logits are these, over the direction's own spread."""
    model, d = shipped_model(), 1000 * directions(192)[:1]
    last = "blocks.5.hook_resid_post"
    tokens = torch.tensor([[0, 17, 23]])

    def said(value: torch.Tensor) -> torch.Tensor:
        return model.logits(tokens, {last: lambda acts: value.expand_as(acts)})[0, -1].float()

    # the bias of the normalisation is the same in both
    half = (said(d) - said(-d)) / 2
    found = model.direct_logits(d, last)
    assert found is not None
    torch.testing.assert_close(found[0] / d.std(correction=0), half - half.mean(), rtol=1e-3, atol=1e-3)


def test_neurons_go_through_their_layers_output() -> None:
    model, d = shipped_model(), directions(768)
    out = model._bridge.original_model.transformer.h[2].mlp.c_proj.weight
    found = model.direct_logits(d, "blocks.2.mlp.hook_post")
    wanted = model.direct_logits(d @ out, "blocks.2.hook_mlp_out")
    assert found is not None
    assert wanted is not None
    torch.testing.assert_close(found, wanted)
    other = model.direct_logits(d, "blocks.3.mlp.hook_post")
    assert other is not None
    assert not torch.allclose(found, other)


@pytest.mark.parametrize(
    ("hook", "width"),
    [
        ("blocks.2.mlp.hook_pre", 768),
        ("blocks.2.attn.hook_z", 192),
        ("blocks.2.ln2.hook_normalized", 192),
        ("blocks.2.hook_resid_post", 191),
    ],
)
def test_elsewhere_directions_have_no_direct_path(hook: str, width: int) -> None:
    assert shipped_model().direct_logits(directions(width), hook) is None
