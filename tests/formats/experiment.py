"""What a fixture holds, and what is asked of it: the same when it is made and when it is opened."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from penstock.store.corpus import open_corpus
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.torch_dataset import TorchBatches
from penstock.trainer.load import load_sae

BASE = "s3://penstock-formats"
"""Configs of runs hold URLs, so the experiment lies at the same ones wherever it is looked at."""
FIRST, SECOND = f"{BASE}/first", f"{BASE}/second"
HOOKS = ("blocks.0.hook_attn_out", "blocks.1.hook_resid_post")
BATCH_ROWS, TAKEN = 48, 5


def reading(dataset: Dataset) -> TorchBatches:
    """Both hooks with their tokens, two epochs in windows of two chunks."""
    return dataset.as_torch(HOOKS, BATCH_ROWS, window_chunks=2, epochs=2, seed=3, with_tokens=True)


def digest_of_batches(batches: Iterable[dict[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, values in sorted(batch.items()):
            digest.update(name.encode())
            plain = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
            digest.update(plain.numpy().tobytes())
    return digest.hexdigest()


def look_at_dataset(url: str) -> dict[str, Any]:
    """Digests of the rows as stored and in the order of a run."""
    dataset = open_dataset(url)
    return {
        "chunks": len(dataset.committed()),
        "manifest": dataset.manifest.digest,
        "rows": {
            hook: hashlib.sha256(dataset.as_numpy(hook).view(np.int16).tobytes()).hexdigest()
            for hook in HOOKS
        },
        "batches": digest_of_batches(reading(dataset)),
    }


def look_at_corpus(url: str) -> dict[str, Any]:
    corpus = open_corpus(url)
    tokens = corpus.tokens(0, corpus.manifest.n_sequences)
    return {
        "digest": corpus.manifest.digest,
        "tokens": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "held out": corpus.manifest.n_held_out,
    }


def look_at_sae(run_url: str, name: str) -> dict[str, float]:
    """On the first 64 rows of the first dataset: L0, mean squared error, mean activation."""
    sae = load_sae(run_url, name)
    rows = torch.from_numpy(open_dataset(FIRST).as_numpy(sae.settings.hook_name, 0, 64).astype(np.float32))
    with torch.inference_mode():
        features = sae.encode(rows)
        error = (sae.decode(features) - rows).square().sum(dim=1).mean()
    return {
        "l0": float((features > 0).sum(dim=1).double().mean()),
        "error": float(error),
        "activation": float(features.double().mean()),
    }
