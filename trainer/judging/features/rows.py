"""Rows of a hook point with the tokens that they belong to, piece by piece: stored ones, or made from text.

A piece holds all rows of its sequences, so the text around a row is in the row's own piece.

Shapes: N rows of a piece, D width of the hook point.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.common.errors import UserError
from penstock.store.joined import JoinedDataset
from penstock.trainer.judging.splicing.splice import forward
from penstock.trainer.judging.splicing.subject import Subject

ABSENT = -1
"""Stands for a token that has no row: a special one."""


@dataclass(frozen=True)
class Piece:
    """Rows [N, D] float32 on the model's device; token id, sequence and position of each, all [N]."""

    acts: Tensor
    tokens: npt.NDArray[np.int64]
    sequence: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]

    def around(self, row: int, before: int, after: int) -> tuple[npt.NDArray[np.int64], int]:
        """Rows of the tokens around a row, `ABSENT` where one has none; and where among them it is."""
        mates = np.flatnonzero(self.sequence == self.sequence[row])
        places = self.position[mates]
        middle = int(self.position[row])
        first, last = max(0, middle - before), min(int(places.max()), middle + after)
        found = np.full(last - first + 1, ABSENT, np.int64)
        inside = (places >= first) & (places <= last)
        found[places[inside] - first] = mates[inside]
        return found, middle - first


class Rows(Protocol):
    """Where pieces come from."""

    def about(self) -> dict[str, Any]:
        """What they are, as JSON."""

    def numbers(self) -> Sequence[int]:
        """The pieces there are."""

    def read(self, number: int, hook_name: str) -> Piece:
        """One of them."""


class StoredRows:
    """Some chunks of what the dictionaries were trained on."""

    def __init__(self, data: JoinedDataset, chunks: Sequence[int], device: torch.device) -> None:
        self._data = data
        self._chunks = chunks
        self._device = device

    def about(self) -> dict[str, Any]:
        return {"what": "stored rows", "chunks": len(self._chunks), "of_chunks": self._data.n_chunks}

    def numbers(self) -> Sequence[int]:
        return self._chunks

    def read(self, number: int, hook_name: str) -> Piece:
        """A chunk, without rows of special tokens.

        Raises:
            ObjectMissing, DamagedObject: it is not there, or not whole.
        """
        chunk = self._data.read_chunk(number, [hook_name])
        special = self._data.parts[0].manifest.corpus.special_ids
        kept = np.flatnonzero(~np.isin(chunk.tokens, special))
        bits = torch.from_numpy(chunk.acts[hook_name].view(np.int16)[kept])
        return Piece(
            acts=bits.view(torch.bfloat16).to(self._device).float(),
            tokens=chunk.tokens[kept].astype(np.int64),
            sequence=chunk.sequence[kept].astype(np.int64),
            position=chunk.position[kept].astype(np.int64),
        )


class TextRows:
    """The text that dictionaries are judged on, run through the model, batch by batch."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._batches = list(subject.text.batches(subject.model))

    def about(self) -> dict[str, Any]:
        return {"what": "held-out text", "sequences": len(self._subject.text)}

    def numbers(self) -> Sequence[int]:
        return range(len(self._batches))

    def read(self, number: int, hook_name: str) -> Piece:
        """The rows of a batch, but for those of special tokens."""
        batch = self._batches[number]
        seen = forward(self._subject.model, batch.tokens, batch.keep, watch=[hook_name]).seen[hook_name]
        sequence, position = (index.numpy() for index in batch.keep.nonzero(as_tuple=True))
        return Piece(
            acts=seen[batch.keep.to(seen.device)],
            tokens=batch.tokens[batch.keep].numpy(),
            sequence=sequence + batch.first,
            position=position,
        )


def readable_chunks(data: JoinedDataset, most: int) -> list[int]:
    """Numbers of chunks to read, evenly spaced; none if chunks are deleted once they are read.

    Raises:
        UserError: none is committed.
    """
    if data.keeps_window:
        return []
    there = sorted(data.committed() - data.quarantined())
    if not there:
        raise UserError(f"{data.url}: no chunk is committed yet")
    count = min(most, len(there))
    return [there[i * len(there) // count] for i in range(count)]
