"""What directions at a hook point do to the logits by the direct path, past all later layers.

A direction d of the residual stream adds W_U · (g ⊙ (d − mean(d))) / σ to the logits, where g is the gain of
the final normalisation and σ the spread of the row that it is added to (no mean is taken off under RMS
normalisation). σ differs from row to row and is left out: values compare tokens, not rows. So is what the
bias of the normalisation adds, which is the same for all directions.

Shapes: n directions, D width of the residual stream, V vocabulary.
"""

import re
from typing import Any

import torch
from torch import Tensor

_STREAM = re.compile(r"blocks\.\d+\.(hook_(in|out)|hook_resid_(pre|mid|post))")
"""The residual stream itself."""
_ADDED = re.compile(r"blocks\.(\d+)\.(hook_attn_out|hook_mlp_out|attn\.hook_out|mlp\.hook_out)")
"""What a layer adds to it."""
_NEURONS = re.compile(r"blocks\.(\d+)\.mlp\.hook_post")


def direct_logits(bridge: Any, directions: Tensor, hook_name: str) -> Tensor | None:
    """[n, V] float32, less each direction's mean over the vocabulary, which changes no probability.

    Args:
        bridge: the model, as TransformerLens has it.
        directions: [n, width of the hook point].

    Returns:
        None where directions have no direct path to the logits.
    """
    stream = _in_stream(bridge, directions.float(), hook_name)
    unembedding = getattr(bridge, "W_U", None)
    if stream is None or not isinstance(unembedding, Tensor) or stream.shape[1] != len(unembedding):
        return None
    with torch.inference_mode():
        logits = _normalised(bridge, stream) @ unembedding.float()
        return logits - logits.mean(1, keepdim=True)


def _in_stream(bridge: Any, directions: Tensor, hook_name: str) -> Tensor | None:
    """Directions as the residual stream gets them [n, D]."""
    if _STREAM.fullmatch(hook_name):
        return directions
    found = _ADDED.fullmatch(hook_name) or _NEURONS.fullmatch(hook_name)
    if found is None:
        return None
    block = bridge.blocks[int(found[1])]
    if any(hasattr(block, name) for name in ("ln1_post", "ln2_post")):
        return None  # normalised once more before it is added
    if _ADDED.fullmatch(hook_name):
        return directions
    try:
        out = block.mlp.W_out.detach().float()
    except AttributeError:
        return None
    return directions @ out if directions.shape[1] == len(out) else None


def _normalised(bridge: Any, stream: Tensor) -> Tensor:
    """[n, D] through the linear part of the final normalisation, found by what it does to a vector.

    One vector of mean 0 and spread 1 tells the gain, however the model stores it; shifting it tells whether
    the mean is taken off.
    """
    final = getattr(bridge, "ln_final", None)
    if final is None:
        return stream
    norm = getattr(final, "original_component", final)
    dtype = next((p.dtype for p in norm.parameters()), stream.dtype)
    probe = torch.ones(stream.shape[1], device=stream.device, dtype=dtype)
    probe[1::2] = -1
    there, back, shifted = (norm(v[None])[0].float() for v in (probe, -probe, probe + 1))
    gain = (there - back) / 2 * probe.float()
    centres = torch.allclose(there, shifted, rtol=1e-2, atol=1e-2)
    if centres:
        stream = stream - stream.mean(1, keepdim=True)
    scaled: Tensor = stream * gain
    return scaled
