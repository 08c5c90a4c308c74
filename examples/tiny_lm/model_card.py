"""The card that lies beside the weights."""

import json
from pathlib import Path
from typing import Any

_CARD = """---
license: apache-2.0
library_name: transformers
tags: [gpt2, interpretability]
---
# pystd-6l

A small GPT-2 trained on the sources of the Python {python} standard library, so that a pipeline for
sparse autoencoders has a real language model to work on wherever Python is installed.

| | |
|---|---|
| architecture | GPT-2: 6 layers, 4 heads, d_model {d_model}, d_mlp {d_mlp}, GELU, learned positions, context 256, tied embeddings |
| tokenizer | byte-level BPE, 4,096 tokens, trained on the training files |
| special token | `<|endoftext|>` (id 0) starts every sequence and ends every document |
| weights | bfloat16 safetensors |
| data | {training_files} files, {training_tokens:,} tokens |
| held out | {held_out_files} files, {held_out_tokens:,} tokens: sha256 of `held-out:` + relative path, first 8 bytes, divisible by 20 |
| training | {steps} steps of {batch_tokens:,} tokens, seed {seed}; Muon for the blocks' matrices, AdamW for the rest, warm-up and cosine |

Cross-entropy on the held-out files, nats per token, measured on the shipped bf16 weights:

| model | nats per token |
|---|---|
| unigram | {unigram:.3f} |
| bigram, interpolated | {interpolated_bigram:.3f} |
| **pystd-6l** | **{held_out_cross_entropy:.3f}** |

Made by `examples/tiny_lm/train.py`. It knows nothing but Python source text: use it to test tools and to
study small models, not to write code. The standard library is under the PSF licence.
"""


def write_model_card(directory: Path, figures: dict[str, Any], d_model: int) -> None:
    """Write README.md and training.json into the model's directory."""
    card = _CARD.format(**figures, d_model=d_model, d_mlp=4 * d_model)
    (directory / "README.md").write_text(card)
    (directory / "training.json").write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
