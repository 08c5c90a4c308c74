"""Capture at the model's modules gives what the bridge gives, bit for bit, and what transformers gives."""

import logging
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.common.errors import ModelError
from penstock.common.model.files import ModelSettings
from penstock.common.model.language_model import LanguageModel
from services.lm import shipped_model

EVERYWHERE = ["blocks.*.hook_resid_post", "blocks.*.mlp.hook_post", "blocks.*.hook_attn_out"]
BRIDGE_ONLY = "blocks.1.ln1.hook_normalized"
"""Lies inside a module, not at its edge."""


@cache
def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, shipped_model().vocabulary, (4, 96), generator=generator)


@cache
def bridged() -> dict[str, Tensor]:
    """Every hook point that the modules know and the bridge offers, from TransformerLens's bridge."""
    model, found = shipped_model(), {}
    offered = [name for name in model._tapped.taps if "hook_mlp_in" not in name]

    def keep(name: str) -> Any:
        return lambda acts, hook: found.update({name: acts.detach().clone()})

    with torch.inference_mode():
        hooks = [(name, keep(name)) for name in offered]
        model._bridge.run_with_hooks(tokens(), fwd_hooks=hooks, return_type=None)
    return {name: acts for name, acts in found.items() if acts.dim() >= 3}


def captured(model: LanguageModel, hooks: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    model.capture(tokens(), hooks, lambda name, acts: found.update({name: acts.clone()}))
    return found


def test_eighteen_hook_points_from_one_pass_are_the_bridges_bit_for_bit() -> None:
    model = shipped_model()
    hooks = model.resolve(EVERYWHERE)
    assert len(hooks) == 18
    assert model.way(hooks) == "modules"
    for name, acts in captured(model, hooks).items():
        assert torch.equal(acts, bridged()[name]), name


def test_every_hook_point_at_a_module_is_the_bridges_bit_for_bit() -> None:
    """But for few, and for those `way` does not vouch."""
    model, seen = shipped_model(), dict[str, Tensor]()
    with torch.inference_mode():
        # one that is never reached, so that the pass goes on to its end
        names = [*bridged(), "unembed.hook_out"]
        model._tapped.run(tokens(), names, lambda name, acts: seen.update({name: acts.clone()}))
    same = [n for n in bridged() if n in seen and torch.equal(seen[n].flatten(2), bridged()[n].flatten(2))]
    assert len(same) > 140
    for name in bridged().keys() - set(same):
        assert model.way([name]) == "bridge"


def test_the_bits_are_those_of_transformers_alone() -> None:
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        shipped_model().files.directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        states = plain(tokens(), output_hidden_states=True).hidden_states
    hooks = [f"blocks.{layer}.hook_resid_pre" for layer in range(6)]
    for layer, (name, acts) in enumerate(captured(shipped_model(), hooks).items()):
        assert torch.equal(acts, states[layer]), name


def test_what_lies_inside_a_module_is_captured_through_the_bridge() -> None:
    model, both = shipped_model(), ["blocks.3.hook_resid_post", BRIDGE_ONLY]
    assert model.way(both) == "bridge"
    found = captured(model, both)
    assert torch.equal(found["blocks.3.hook_resid_post"], bridged()["blocks.3.hook_resid_post"])
    assert found[BRIDGE_ONLY].shape == (4, 96, 192)


def test_a_module_that_gives_other_bits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shipped_model()
    tap = model._tapped.taps["blocks.2.hook_mlp_out"]
    monkeypatch.setitem(model._tapped.taps, "blocks.2.hook_attn_out", tap)
    monkeypatch.setattr(model, "_ways", {})
    monkeypatch.setattr(model._tapped, "_placed", ())
    assert model.way(["blocks.2.hook_attn_out"]) == "bridge"


def test_the_pass_ends_after_the_last_hook_point() -> None:
    model, ran = shipped_model(), []
    hooks = ["blocks.0.hook_resid_post", "blocks.2.mlp.hook_post"]
    model.way(hooks)
    layers: Any = model._tapped._body.h
    handles = [
        layer.register_forward_hook(lambda *args, number=number: ran.append(number))
        for number, layer in enumerate(layers)
    ]
    captured(model, hooks)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


def test_the_bridge_goes_on_working_beside_the_modules() -> None:
    model = shipped_model()
    captured(model, ["blocks.3.hook_resid_post"])
    zeroed = model.logits(tokens(), {"blocks.3.hook_resid_post": torch.zeros_like})
    assert not torch.equal(zeroed, model.logits(tokens()))


@pytest.fixture(scope="module")
def with_sdpa() -> LanguageModel:
    return LanguageModel(shipped_model().files, ModelSettings(attention="sdpa"))


def test_sdpa_computes_the_same_but_for_rounding(with_sdpa: LanguageModel) -> None:
    hooks = with_sdpa.resolve(EVERYWHERE)
    found = captured(with_sdpa, hooks)
    assert not torch.equal(found["blocks.5.hook_resid_post"], bridged()["blocks.5.hook_resid_post"])
    for name, acts in found.items():
        torch.testing.assert_close(acts, bridged()[name], rtol=1e-3, atol=1e-3)


def test_sdpa_serves_modules_only(with_sdpa: LanguageModel) -> None:
    with pytest.raises(ModelError, match=rf"model\.attention: {BRIDGE_ONLY} cannot be captured with sdpa"):
        with_sdpa.way([BRIDGE_ONLY])


def test_a_hook_point_that_the_bridge_does_not_offer_as_it_is_gives_one_line() -> None:
    with pytest.raises(ModelError, match=r"dataset\.hooks: .*use_hook_mlp_in"):
        shipped_model().widths(["blocks.0.hook_mlp_in"])
