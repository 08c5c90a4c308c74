"""Sources: what turns a chunk's sequences into rows."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from penstock.common.model.language_model import LanguageModel
from penstock.store.arrays import BFLOAT16
from penstock.store.corpus import Corpus
from penstock.store.dataset import Chunk
from penstock.store.manifest import Manifest


class Source(Protocol):
    """Makes chunk `index` of a dataset: a pure function of (manifest, index)."""

    def chunk(self, index: int) -> Chunk:
        """The chunk's rows in corpus order."""
        ...


class LanguageModelSource:
    """Rows are activations of a language model on the corpus's sequences.

    Args:
        progress: called after each forward pass.
    """

    def __init__(
        self,
        manifest: Manifest,
        corpus: Corpus,
        model: LanguageModel,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._manifest = manifest
        self._progress = progress
        self._corpus = corpus
        self._model = model
        self._hooks = [hook.name for hook in manifest.hooks]
        self._special = np.asarray(manifest.corpus.special_ids, np.int32)

    def chunk(self, index: int) -> Chunk:
        manifest = self._manifest
        first = manifest.corpus.first_sequence + index * manifest.sequences_per_chunk
        last = min(first + manifest.sequences_per_chunk, manifest.corpus.end)
        tokens = self._corpus.tokens(first, last)
        keep = np.ones(tokens.shape, np.bool_)
        if manifest.source.drop_special:
            keep = ~np.isin(tokens, self._special)
        sequence, position = np.nonzero(keep)
        return Chunk(
            index=index,
            acts=self._activations(tokens, keep),
            tokens=tokens[keep],
            sequence=sequence.astype(np.int64) + first,
            position=position.astype(np.int32),
        )

    def _activations(
        self, tokens: npt.NDArray[np.int32], keep: npt.NDArray[np.bool_]
    ) -> dict[str, npt.NDArray[np.generic]]:
        step = self._manifest.numerics.sequences_per_forward
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in self._hooks}
        for start in range(0, len(tokens), step):
            ids = torch.from_numpy(tokens[start : start + step]).long()
            kept = torch.from_numpy(keep[start : start + step]).to(self._model.device)
            for name, acts in self._model.capture(ids, self._hooks).items():
                parts[name].append(acts[kept])
            self._progress()
        # one copy off the device per hook and chunk; viewed as integers because NumPy has no bfloat16
        return {
            name: torch.cat(acts).view(torch.int16).cpu().numpy().view(BFLOAT16)
            for name, acts in parts.items()
        }
