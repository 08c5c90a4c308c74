"""What our judging says of exported SAEs, for `metrics.py` to compare with what SAELens says of them."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from penstock.common.model.files import ModelSettings, find_model
from penstock.common.model.language_model import LanguageModel
from penstock.store.corpus import HELD_OUT, open_corpus
from penstock.trainer.judging.sequences import positions
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from penstock.trainer.load import load_sae

SEQUENCES = 6


def write_judged(run_url: str, workdir: Path, names: dict[str, str]) -> None:
    """Figures of every SAE that SAELens splices, and the tokens that they come from.

    It has no splicing from one hook point to another: transcoders are left out.
    """
    settings = ModelSettings()
    files = find_model(settings)
    model = LanguageModel(files, settings)
    corpus = open_corpus(str(workdir / "corpus"))
    count = min(SEQUENCES, corpus.manifest.n_held_out)
    tokens, special = corpus.tokens(0, count, HELD_OUT), list(corpus.manifest.special_ids)
    chosen = [name for name in names if (workdir / "exports" / "saelens" / name).exists()]
    saes = [Dictionary.of_sae(name, load_sae(run_url, name), torch.device("cpu")) for name in chosen]
    spliced = [one for one in saes if one.hook_name == one.hook_out]
    record = positions.measure(Subject(model, Text(tokens, special), spliced, tokens.shape[1]))

    judged = workdir / "judged"
    judged.mkdir()
    told = {
        "model": str(files.directory),
        "special_ids": special,
        "saes": {one["name"]: _figures(record, one) for one in record["dictionaries"]},
    }
    (judged / "judged.json").write_text(json.dumps(told))
    safetensors.torch.save_file({"tokens": torch.from_numpy(tokens).long()}, judged / "tokens.safetensors")


def _figures(record: dict[str, Any], one: dict[str, Any]) -> dict[str, float]:
    """By the names that SAELens has for them."""
    zero = record["sites"][one["hook_out"]]["zero"]

    def overall(metrics: dict[str, Any], name: str) -> float:
        return float(metrics[name]["overall"]["mean"])

    own = one["metrics"]
    return {
        "ce_loss_score": overall(own, "ce_recovered_zero"),
        "kl_div_with_sae": overall(own, "kl"),
        "explained_variance": overall(own, "explained_variance"),
        "l0": overall(own, "l0"),
        "ce_loss_without_sae": float(record["ce_clean"]["overall"]["mean"]),
        "ce_loss_with_sae": overall(own, "ce"),
        "ce_loss_with_ablation": overall(zero, "ce"),
        "kl_div_with_ablation": overall(zero, "kl"),
        "mse": overall(own, "squared_error"),
        "l1": overall(own, "l1"),
        "l2_norm_in": overall(own, "norm"),
    }
