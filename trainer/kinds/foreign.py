"""Dictionaries in the terms of other libraries: what a kind of SAE gives its exports and takes from imports.

A kind says in its own module what it is called elsewhere and which tensors it has there; the functions
here are what most kinds need for that. All tensors are float32 on the CPU, of modules that take raw rows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.trainer.sae import SAE


@dataclass(frozen=True)
class Foreign:
    """A dictionary as another library has it.

    Attributes:
        kind: what the library calls this kind of dictionary.
        fields: settings besides the shapes, by the library's names.
        tensors: weights by the library's names.
    """

    kind: str
    fields: dict[str, Any]
    tensors: "dict[str, Tensor]"


class NoSuchKind(UserError):
    """A format has no dictionaries of this kind."""

    def __init__(self, architecture: str, library: str) -> None:
        super().__init__(f"{library} has no dictionary that computes what a {architecture} one does")


def by_input(sae: "SAE") -> "dict[str, Tensor]":
    """W_enc [D, S], b_enc [S], W_dec [S, D], b_dec [D], as SAELens has them."""
    return {
        "W_enc": plain(sae.W_enc),
        "b_enc": plain(sae.b_enc),
        "W_dec": plain(sae.directions()),
        "b_dec": plain(sae.b_dec),
    }


def by_output(sae: "SAE") -> "dict[str, Tensor]":
    """encoder.weight [S, D] and encoder.bias [S], as `torch.nn.Linear` has them, and b_dec [D]."""
    return {
        "encoder.weight": plain(sae.W_enc.T),
        "encoder.bias": plain(sae.b_enc),
        "b_dec": plain(sae.b_dec),
    }


def centred_bias(sae: "SAE") -> "Tensor":
    """[S] encoder bias of the same dictionary where b_dec is not subtracted: b_enc − b_dec W_enc."""
    return plain(sae.b_enc.double() - sae.b_dec.double() @ sae.W_enc.double())


def plain(tensor: "Tensor") -> "Tensor":
    """The tensor by itself: float32, on the CPU, contiguous, sharing memory with nothing."""
    import torch

    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
