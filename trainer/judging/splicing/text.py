"""The sequences that dictionaries are judged on, in batches that fit into memory.

Shapes: B sequences, C positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.common.model.language_model import LanguageModel

LOGIT_BYTES = 1 << 26
"""Bytes of one pass's float32 logits, at most, but for a single sequence; several passes are compared."""
ROWS = 1 << 13
"""Rows of one pass, at most: with a small vocabulary, activations are what takes memory."""


@dataclass(frozen=True)
class Batch:
    """Tokens [B, C] int64, and which rows count [B, C]: all but those of special tokens."""

    first: int
    tokens: Tensor
    keep: Tensor

    @property
    def predicts(self) -> Tensor:
        """[B, C − 1] positions whose prediction counts."""
        return self.keep[:, :-1]


@dataclass(frozen=True)
class Text:
    """Token sequences [n, C] that the dictionaries were not trained on."""

    tokens: npt.NDArray[np.int32]
    special_ids: list[int]

    @property
    def context(self) -> int:
        """C."""
        return int(self.tokens.shape[1])

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, model: LanguageModel) -> Iterator[Batch]:
        """All of it, in order; the batches' size depends on the model alone."""
        rows = min(ROWS, LOGIT_BYTES // (4 * model.vocabulary))
        at_once = max(1, rows // self.context)
        special = torch.tensor(self.special_ids, dtype=torch.int64)
        for first in range(0, len(self), at_once):
            tokens = torch.from_numpy(self.tokens[first : first + at_once].astype(np.int64))
            yield Batch(first, tokens, ~torch.isin(tokens, special))
