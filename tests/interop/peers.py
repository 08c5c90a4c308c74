"""Runs in the environment of the other libraries, without this package.

    python peers.py WORKDIR NAME…

Loads each export with its library's public loader and compares feature activations and reconstructions on
real activations with the references. Saves dictionaries that SAELens made, for the way back. Exit code 1 if
anything differs by more than the tolerance.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from dictionary_learning.utils import load_dictionary
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder
from torch import Tensor

TOLERANCE = 1e-5
"""Largest difference, relative to the largest value of what is compared."""

Loaded = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""encode and decode."""


def saelens(directory: Path) -> Loaded:
    sae = SAE.load_from_disk(directory)
    assert sae.cfg.metadata.sae_lens_version >= "6.0.0"
    return sae.encode, sae.decode


def dictionary_learning(directory: Path) -> Loaded:
    dictionary, _ = load_dictionary(str(directory), "cpu")
    return dictionary.encode, dictionary.decode


def sparsify(directory: Path) -> Loaded:
    coder = SparseCoder.load_from_disk(directory)

    def encode(rows: Tensor) -> Tensor:
        told = coder.encode(rows)
        return torch.zeros_like(told.pre_acts).scatter(1, told.top_indices, told.top_acts)

    def decode(acts: Tensor) -> Tensor:
        active = acts.topk(coder.cfg.k, dim=1)
        return coder.decode(active.values, active.indices)

    return encode, decode


LOADERS = {"saelens": saelens, "dictionary-learning": dictionary_learning, "sparsify": sparsify}


def compare(workdir: Path, format: str, name: str) -> bool:
    """One export against its reference; whether it is the same."""
    told = load_file(workdir / "references" / f"{name}.safetensors")
    kind = json.loads((workdir / "references" / f"{name}.json").read_text())["architecture"]
    encode, decode = LOADERS[format](workdir / "exports" / format / name)
    acts = encode(told["rows"])
    reconstruction = decode(acts)
    tied = ties(told["feature_acts"], acts)
    fine = True
    for what, theirs, ours in [
        ("feature activations", acts, told["feature_acts"]),
        ("reconstructions", reconstruction, told["reconstruction"]),
    ]:
        assert theirs.shape == ours.shape
        assert ours.abs().max() > 0
        absolute = float((theirs - ours)[~tied].abs().max())
        relative = absolute / float(ours.abs().max())
        verdict = "" if relative <= TOLERANCE else "  DIFFERENT"
        fine = fine and not verdict
        print(
            f"{kind:12s} {name:16s} {format:20s} {what:20s} {absolute:9.1e} {relative:9.1e} "
            f"{int(tied.sum()):5d} of {len(ours)}{verdict}"
        )
    return fine


def ties(ours: Tensor, theirs: Tensor) -> Tensor:
    """[R] rows where a feature was kept by one and not by the other because of rounding.

    These are the rows whose sorted activations are the same to the tolerance while others were kept: what
    decides between two equally active features is the last bit of a matrix product.
    """
    others = ((ours > 0) != (theirs > 0)).any(dim=1)
    distance = (ours.sort(dim=1).values - theirs.sort(dim=1).values).abs().amax(dim=1)
    return others & (distance <= TOLERANCE * ours.abs().max())


def make_dictionaries(workdir: Path, reference: str) -> None:
    """Dictionaries as SAELens itself saves them, with what it gives for real rows."""
    rows = load_file(workdir / "references" / f"{reference}.safetensors")["rows"]
    d_in, d_sae = rows.shape[1], 384
    shape = {"d_in": d_in, "d_sae": d_sae}
    made: dict[str, SAE] = {
        "standard": StandardSAE(StandardSAEConfig(**shape)),
        "standard-uncentred": StandardSAE(StandardSAEConfig(**shape, apply_b_dec_to_input=False)),
        "topk": TopKSAE(TopKSAEConfig(**shape, k=16)),
        "topk-rescaled": TopKSAE(TopKSAEConfig(**shape, k=16, rescale_acts_by_decoder_norm=True)),
    }
    generator = torch.Generator().manual_seed(0)
    for name, sae in made.items():
        with torch.no_grad():
            sae.b_dec.copy_(rows.mean(dim=0))
            sae.b_enc.copy_(torch.randn(d_sae, generator=generator))
            sae.W_dec.mul_(0.5 + torch.rand(d_sae, 1, generator=generator))
        directory = workdir / "saelens-made" / name
        sae.save_model(directory)
        with torch.no_grad():
            acts = sae.encode(rows)
            told = {"rows": rows, "feature_acts": acts, "reconstruction": sae.decode(acts)}
        save_file(told, directory / "outputs.safetensors")


@torch.no_grad()
def main(workdir: Path, names: list[str]) -> int:
    """Returns the exit code."""
    print("kind         SAE              format               what                  max abs       rel  ties")
    fine = [compare(workdir, format, name) for name in names for format in LOADERS]
    for name in names:
        SAE.load_from_disk(workdir / "exports" / "saelens" / name).save_model(
            workdir / "saelens-saved" / name
        )
    make_dictionaries(workdir, names[0])
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
