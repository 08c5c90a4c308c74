"""Dictionaries to export and import: every kind, away from its start, and SAELens files by hand."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter
from torch import Tensor

from penstock.trainer import kinds as all_kinds
from penstock.trainer.kinds import AnySettings, SAESettings
from penstock.trainer.sae import SAE, build

D, S, K, B = 12, 40, 5, 200
SCALE = 0.37
SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 1.0},
    "topk": {"k": K},
    "batchtopk": {"k": K},
    "gated": {"l1_coefficient": 1.0},
    "jumprelu": {"l0_target": K},
    "matryoshka": {"k": K},
    "switch": {"k": K, "experts": 4},
    "transcoder": {"l1_coefficient": 1.0, "hook_out": "blocks.1.mlp.hook_out"},
}
"""Settings that each kind needs; a new kind adds its own."""
KINDS = sorted(SETTINGS)
IMPORTED = [kind for kind in KINDS if all_kinds.KINDS[kind].from_saelens]
"""Kinds that SAELens dictionaries become."""


def settings_of(kind: str, **changes: Any) -> SAESettings:
    common = {"name": f"a-{kind}", "architecture": kind, "hook_name": "blocks.1.hook_out", "d_sae": S}
    adapter: TypeAdapter[SAESettings] = TypeAdapter(AnySettings)
    return adapter.validate_python(common | SETTINGS[kind] | changes)


def trained(kind: str, seed: int = 0) -> SAE:
    """A module as `load_sae` gives it: every parameter away from its start, the scale folded in."""
    sae = build(D, settings_of(kind))
    sae.initialise(seed, torch.linspace(-1, 2, D))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for threshold in sae.buffers():
            threshold.fill_(0.4)
    sae.fold_scale(SCALE)
    return sae.eval().requires_grad_(False)


def rows(seed: int = 5) -> Tensor:
    return 3 * torch.randn(B, D, generator=torch.Generator().manual_seed(seed)) + 1


def write_saelens(
    directory: Path,
    kind: str,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    d_in: int = D,
    d_sae: int = S,
) -> dict[str, Tensor]:
    """A dictionary as SAELens 6 saves it, decoder rows of many lengths; returns its tensors.

    Args:
        fields, tensors: replace what there would be.
    """
    random = torch.Generator().manual_seed(1)
    lengths = torch.linspace(0.3, 3, d_sae)[:, None]
    made = {
        "W_enc": torch.randn(d_in, d_sae, generator=random),
        "b_enc": torch.randn(d_sae, generator=random),
        "W_dec": torch.randn(d_sae, d_in, generator=random) * lengths,
        "b_dec": torch.randn(d_in, generator=random),
    }
    if kind == "jumprelu":
        made["threshold"] = torch.rand(d_sae, generator=random)
    if kind == "gated":
        made["b_gate"] = made.pop("b_enc")
        made["b_mag"] = torch.randn(d_sae, generator=random)
        made["r_mag"] = 0.3 * torch.randn(d_sae, generator=random)
    made |= tensors or {}
    config = {
        "architecture": kind,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": kind != "transcoder",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": "blocks.1.hook_out", "model_name": "m"},
    }
    if kind == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": False}
    if kind == "transcoder":
        config["d_out"] = d_in
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cfg.json").write_text(json.dumps(config | (fields or {})))
    safetensors.torch.save_file(made, directory / "sae_weights.safetensors")
    return made
