"""Other architectures than the shipped model's: what stands in for activations works wherever these are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.common.model.files import ModelSettings, find_model
from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.sequences import overview, positions, propagation
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from services.judged import random_text, untrained_sae

CONTEXT = 24
HOOKS = [
    "blocks.0.hook_resid_post",
    "blocks.0.mlp.hook_post",
    "blocks.0.mlp.hook_out",
    "blocks.0.attn.hook_z",
    "blocks.0.hook_attn_out",
    "blocks.1.hook_resid_post",
]
SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX", "Gemma2"])
def test_controls_are_exact(tmp_path: Path, kind: str, dtype: Any) -> None:
    """Grouped heads and gated neurons; attention beside the MLP; norms behind both."""
    import transformers

    grouped = {} if kind == "GPTNeoX" else {"num_key_value_heads": 2, "head_dim": 16}
    config = getattr(transformers, f"{kind}Config")(**SMALL, **grouped)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    shipped = find_model(ModelSettings()).directory
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shipped / name).read_bytes())
    settings = ModelSettings(name=str(tmp_path), dtype=dtype)
    model = LanguageModel(find_model(settings), settings)
    widths = model.widths(HOOKS)
    dictionaries = [Dictionary(h, h, h, untrained_sae(h, widths[h]).module) for h in HOOKS]
    text = Text(random_text().tokens[:2, :CONTEXT], [0])
    subject = Subject(model, text, dictionaries, CONTEXT)

    record = positions.measure(subject)
    found = overview.of_positions(record)
    for control in found["controls"].values():
        assert set(control["identity"].values()) == set(control["zero_against_ablation"].values()) == {0}
    for arms in record["sites"].values():
        assert arms["zero"]["ce_recovered_zero"]["overall"]["mean"] == 0
        assert arms["zero"]["kl"]["overall"]["mean"] > 1e-6, "what is replaced reaches the logits"
    assert all(one["kl"] > 0 for one in found["dictionaries"].values())
    assert set(propagation.measure(subject)["controls"].values()) == {0.0}

    # neurons speak through the matrix that they feed into, behind their gate
    tokens = torch.from_numpy(text.tokens.astype("int64"))
    acts = model.activations(tokens, ["blocks.0.mlp.hook_post", "blocks.0.mlp.hook_out"])
    neurons, out = (a.flatten(0, 1).float() for a in acts.values())
    ours = model.direct_logits(neurons, "blocks.0.mlp.hook_post")
    if kind == "Gemma2":
        assert ours is None, "it normalises once more before adding"
        return
    assert ours is not None
    wanted = model.direct_logits(out, "blocks.0.mlp.hook_out")
    assert wanted is not None
    bias = wanted - ours
    # what is left is the layer's bias, which is the same everywhere
    assert (bias - bias.mean(0)).norm() < 0.02 * wanted.norm()
