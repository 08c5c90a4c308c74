"""Held-out text, and dictionaries whose effect is known, for judging inside the model."""

import torch

from penstock.trainer.judging.splicing.dictionaries import Constant, Dictionary, Identity
from penstock.trainer.judging.splicing.text import Text
from penstock.trainer.kinds import TopKSettings, TranscoderSettings
from penstock.trainer.sae import build

RESIDS = [f"blocks.{layer}.hook_resid_post" for layer in range(6)]


def random_text() -> Text:
    """Six sequences of 48 tokens, each beginning with BOS; one has an end of text in its middle."""
    tokens = torch.randint(1, 4096, (6, 48), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = 0
    tokens[2, 20] = 0
    return Text(tokens.int().numpy(), [0])


def identity(hook_name: str) -> Dictionary:
    return Dictionary("identity", hook_name, hook_name, Identity())


def constant(hook_name: str, value: torch.Tensor) -> Dictionary:
    return Dictionary("constant", hook_name, hook_name, Constant(value))


def untrained_sae(hook_name: str, d_in: int = 192, seed: int = 0) -> Dictionary:
    """A TopK SAE as it starts."""
    settings = TopKSettings(architecture="topk", name="sae", hook_name=hook_name, d_sae=256, k=16)
    built = build(d_in, settings)
    built.initialise(seed, None)
    return Dictionary.of_sae("sae", built.eval().requires_grad_(False), torch.device("cpu"))


def untrained_transcoder(hook_name: str, hook_out: str, width: int = 192) -> Dictionary:
    """A transcoder as it starts."""
    settings = TranscoderSettings(
        architecture="transcoder",
        name="transcoder",
        hook_name=hook_name,
        hook_out=hook_out,
        d_sae=128,
        l1_coefficient=0.1,
    )
    built = build(width, settings, width)
    built.initialise(3, None)
    return Dictionary.of_sae("transcoder", built.eval().requires_grad_(False), torch.device("cpu"))
