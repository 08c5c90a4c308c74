"""Sequences of batches, to be compared bit for bit."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from penstock.store.dataset import Dataset
from services.synthetic import MLP, RESID

SETTINGS: dict[str, Any] = {"batch_rows": 64, "window_chunks": 3, "epochs": 2, "seed": 7}
"""Of readings of the synthetic dataset: 107 batches of two epochs of six windows, the last of them short."""


def fingerprint(batch: dict[str, Tensor]) -> str:
    """Names, shapes and every bit of a batch, as one line."""
    digest = hashlib.sha256()
    for name, values in batch.items():
        digest.update(f"{name} {list(values.shape)} {values.dtype}\n".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def whole_order(dataset: Dataset) -> list[str]:
    """The uninterrupted sequence that `SETTINGS` stand for."""
    return [fingerprint(batch) for batch in dataset.batches([RESID, MLP], **SETTINGS)]
