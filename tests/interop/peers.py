"""Runs in the environment of the other libraries, without this package.

    python -m interop.peers WORKDIR NAME…

Loads each export with its library's public loader and compares feature activations and reconstructions on
real activations with the references. Has SAELens judge the exports inside the model (`metrics.py`). Saves
dictionaries that SAELens made, for the way back. Exit code 1 if anything differs by more than the tolerance.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.utils import load_dictionary
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder
from torch import Tensor

from interop.compare import HEADER, compare
from interop.metrics import check_metrics

Loaded = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""encode, and what reconstructs rows from feature activations and, where there is a skip connection, rows."""


def saelens(directory: Path) -> Loaded:
    sae = SAE.load_from_disk(directory)
    return sae.encode, lambda acts, rows: sae(rows) if hasattr(sae, "W_skip") else sae.decode(acts)


def dictionary_learning(directory: Path) -> Loaded:
    dictionary, _ = load_dictionary(str(directory), "cpu")
    return dictionary.encode, lambda acts, rows: dictionary.decode(acts)


def sparsify(directory: Path) -> Loaded:
    coder = SparseCoder.load_from_disk(directory)

    def encode(rows: Tensor) -> Tensor:
        told = coder.encode(rows)
        return torch.zeros_like(told.pre_acts).scatter(1, told.top_indices, told.top_acts)

    def decode(acts: Tensor, rows: Tensor) -> Tensor:
        if coder.W_skip is not None:
            whole: Tensor = coder(rows).sae_out
            return whole
        active = acts.topk(coder.cfg.k, dim=1)
        decoded: Tensor = coder.decode(active.values, active.indices)
        return decoded

    return encode, decode


LOADERS = {"saelens": saelens, "dictionary-learning": dictionary_learning, "sparsify": sparsify}


def check(workdir: Path, format: str, name: str) -> bool:
    """One export against its reference; whether it is the same."""
    told = load_file(workdir / "references" / f"{name}.safetensors")
    kind = json.loads((workdir / "references" / f"{name}.json").read_text())["architecture"]
    encode, decode = LOADERS[format](workdir / "exports" / format / name)
    acts = encode(told["rows"])
    found = compare((told["feature_acts"], acts), (told["reconstruction"], decode(acts, told["rows"])))
    print(f"{kind:12s} {name:20s} {format:20s} {found}", flush=True)
    return found.same


def make_dictionaries(workdir: Path, reference: str) -> None:
    """Dictionaries as SAELens itself saves them, with what it gives for real rows."""
    rows = load_file(workdir / "references" / f"{reference}.safetensors")["rows"]
    d_in, d_sae = rows.shape[1], 384
    shape: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
    pair: dict[str, Any] = shape | {"d_out": d_in // 2, "apply_b_dec_to_input": False}
    made: dict[str, Any] = {
        "standard": StandardSAE(StandardSAEConfig(**shape)),
        "standard-uncentred": StandardSAE(StandardSAEConfig(**shape, apply_b_dec_to_input=False)),
        "topk": TopKSAE(TopKSAEConfig(**shape, k=16)),
        "topk-rescaled": TopKSAE(TopKSAEConfig(**shape, k=16, rescale_acts_by_decoder_norm=True)),
        "gated": GatedSAE(GatedSAEConfig(**shape)),
        "gated-uncentred": GatedSAE(GatedSAEConfig(**shape, apply_b_dec_to_input=False)),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**shape)),
        "jumprelu-uncentred": JumpReLUSAE(JumpReLUSAEConfig(**shape, apply_b_dec_to_input=False)),
        "transcoder": Transcoder(TranscoderConfig(**pair)),
        "transcoder-skip": SkipTranscoder(SkipTranscoderConfig(**pair)),
    }
    generator = torch.Generator().manual_seed(0)
    for name, sae in made.items():
        d_out = len(sae.b_dec)
        sae.b_dec.copy_(rows.mean(dim=0)[:d_out])
        for bias in ("b_enc", "b_gate", "b_mag"):
            if getattr(sae, bias, None) is not None:
                getattr(sae, bias).copy_(torch.randn(d_sae, generator=generator))
        if hasattr(sae, "r_mag"):
            sae.r_mag.copy_(0.3 * torch.randn(d_sae, generator=generator))
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(torch.rand(d_sae, generator=generator))
        sae.W_dec.copy_(torch.randn(d_sae, d_out, generator=generator))
        sae.W_dec.mul_(0.5 + torch.rand(d_sae, 1, generator=generator))
        if hasattr(sae, "W_skip"):
            sae.W_skip.copy_(torch.randn(d_out, d_in, generator=generator) / d_in**0.5)
        sae.W_enc.copy_(torch.randn(d_in, d_sae, generator=generator) / d_in**0.5)
        directory = workdir / "saelens-made" / name
        sae.save_model(directory)
        acts = sae.encode(rows)
        again = sae(rows) if hasattr(sae, "W_skip") else sae.decode(acts)
        told = {"rows": rows, "feature_acts": acts, "reconstruction": again}
        save_file(told, directory / "outputs.safetensors")


@torch.no_grad()
def main(workdir: Path, names: list[str]) -> int:
    """Returns the exit code."""
    print(f"{'kind':12s} {'SAE':20s} {'read by':20s} {HEADER}")
    exports = workdir / "exports"
    there = [(format, name) for name in names for format in LOADERS if (exports / format / name).exists()]
    same = [check(workdir, format, name) for format, name in there]
    for name in names:
        saved = workdir / "saelens-saved" / name
        if (exports / "saelens" / name).exists():
            SAE.load_from_disk(exports / "saelens" / name).save_model(saved)
    make_dictionaries(workdir, names[0])
    return 0 if check_metrics(workdir) and all(same) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
