"""How far two passes over the same tokens are apart.

Every prediction belongs to the position of the token that it is made from: position p of a sequence predicts
token p + 1, so the last position predicts nothing that could be compared.

Shapes: B sequences, C positions, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

BLOCK_VALUES = 1 << 22
"""Logits of one pass that are looked at in float64 at once."""


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """−ln p(next token) [B, C − 1] in nats, float64."""
    wanted = tokens[:, 1:].to(logits.device)
    found = [
        torch.logsumexp(scores.double(), -1) - scores.gather(-1, right[..., None])[..., 0].double()
        for scores, right in zip(_blocks(logits[:, :-1], logits), _blocks(wanted, logits), strict=True)
    ]
    return torch.cat(found, 1)


def divergence(clean: Tensor, spliced: Tensor) -> Tensor:
    """KL(clean ‖ spliced) of next-token distributions [B, C] in nats, float64; never negative."""
    found = []
    for ours, theirs in zip(_blocks(clean, clean), _blocks(spliced, clean), strict=True):
        p, q = log_softmax(ours.double(), -1), log_softmax(theirs.double(), -1)
        # rounding alone could take it below zero
        found.append((p.exp() * (p - q)).sum(-1).clamp(min=0.0))
    return torch.cat(found, 1)


def _blocks(values: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """Values [B, positions, …] by positions, so few that float64 copies of logits [B, C, V] stay small."""
    sequences, _, vocabulary = logits.shape
    return torch.split(values, max(1, BLOCK_VALUES // (sequences * vocabulary)), 1)
