"""What can stand in for activations: SAEs and transcoders at their hook points, and controls.

Shapes: N rows, D width of the hook point that is read, E of the one that is replaced, S features.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from penstock.trainer.sae import SAE


class Reconstructs(Protocol):
    """What an SAE offers here; it takes raw activations."""

    @property
    def d_sae(self) -> int:
        """S."""

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [N, S] of rows [N, D]."""

    def reconstruct(self, x: Tensor, feature_acts: Tensor) -> Tensor:
        """What stands in [N, E], from rows [N, D] and their feature activations [N, S]."""


@dataclass(frozen=True)
class Dictionary:
    """A dictionary at its place.

    Attributes:
        hook_name: the hook point that it reads.
        hook_out: the one that it replaces; another one for transcoders.
    """

    name: str
    hook_name: str
    hook_out: str
    module: Reconstructs

    def in_place_of(self, module: Reconstructs, name: str) -> "Dictionary":
        """Something else at the same place."""
        return replace(self, module=module, name=name)

    @classmethod
    def of_sae(cls, name: str, sae: SAE, device: torch.device) -> Self:
        """A run's SAE, moved to the model's device."""
        hooks = sae.settings.hooks
        return cls(name, hooks[0], hooks[-1], sae.to(device))


class _Featureless:
    d_sae = 0

    def encode(self, x: Tensor) -> Tensor:
        return x.new_zeros((len(x), 0))


class Identity(_Featureless):
    """A perfect dictionary: nothing may change. For hook points that are read and replaced alike."""

    def reconstruct(self, x: Tensor, feature_acts: Tensor) -> Tensor:
        return x


class Constant(_Featureless):
    """The same vector [E] everywhere: zero ablation with zeros, mean ablation with the mean activation."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def reconstruct(self, x: Tensor, feature_acts: Tensor) -> Tensor:
        return self.value.to(x).expand(len(x), -1)
