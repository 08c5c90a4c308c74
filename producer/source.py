"""Sources: what turns a chunk's sequences into rows."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from penstock.common.model.language_model import LanguageModel
from penstock.store.arrays import BFLOAT16
from penstock.store.chunks import Chunk
from penstock.store.corpus import Corpus
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
        """Per hook [kept rows, d_in] bfloat16, filled forward pass by forward pass."""
        rows, cuda = int(keep.sum()), self._model.device.type == "cuda"
        # integers of the same size: NumPy has no bfloat16
        out = {
            hook.name: torch.empty((rows, hook.d_in), dtype=torch.int16, pin_memory=cuda)
            for hook in self._manifest.hooks
        }
        step = self._manifest.numerics.sequences_per_forward
        filled = 0
        for start in range(0, len(tokens), step):
            kept = np.flatnonzero(keep[start : start + step])
            self._forward(tokens[start : start + step], kept, out, slice(filled, filled + len(kept)))
            filled += len(kept)
            self._progress()
        if cuda:
            torch.cuda.current_stream(self._model.device).synchronize()
        return {name: acts.numpy().view(BFLOAT16) for name, acts in out.items()}

    def _forward(
        self,
        tokens: npt.NDArray[np.int32],
        kept: npt.NDArray[np.int64],
        out: dict[str, torch.Tensor],
        place: slice,
    ) -> None:
        """One forward pass; the rows `kept` of its activations go to a place in `out`."""
        cuda = self._model.device.type == "cuda"
        on_device = torch.from_numpy(kept).to(self._model.device, non_blocking=True) if cuda else None
        # mostly whole sequences but for their first token: rounded straight into their place
        runs = np.split(kept, np.flatnonzero(np.diff(kept) != 1) + 1) if not cuda else []

        def see(name: str, acts: torch.Tensor) -> None:
            rows, target = acts.flatten(2).flatten(0, 1), out[name][place].view(torch.bfloat16)
            if on_device is not None:
                target.copy_(rows.to(torch.bfloat16).index_select(0, on_device), non_blocking=True)
            at = 0
            for run in runs:
                if len(run):
                    target[at : at + len(run)] = rows[run[0] : run[-1] + 1]
                    at += len(run)

        self._model.capture(torch.from_numpy(tokens).long(), self._hooks, see)
