"""What a file of `trainer/kinds` is made of: settings, and the methods of a module.

Whoever only reads a configuration, or what a run is doing, needs the settings of every kind, and torch takes
seconds and 200 MB to import. So these files import none: `torch` is a stand-in that imports it when something
of it is first used, and a kind is a plain class until `build` in `trainer/sae.py` joins it with the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from penstock.common.settings import Settings

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor

    from penstock.trainer.sae import SAE

    Kind = SAE
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()

    class Kind:
        """The methods that make a kind; `self` is an `SAE`."""

        from_saelens = ()


FEW_LENGTH = 0.25
"""Norm of a feature's encoder at the start, for kinds that keep a number of features: fewer of them die than
with longer ones, and more variance is explained (`benchmarks/README.md`)."""
SAME_NORM = 1e-5
"""Relative difference in decoder rows' norms that is taken for rounding."""


class SAESettings(Settings):
    """Settings that every kind has."""

    architecture: str
    """Kind of autoencoder."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of this SAE within its run: letters, digits, '.', '_' and '-'."""
    hook_name: str
    """The hook point it is trained on; the dataset must hold it."""
    d_sae: int = Field(ge=1)
    """Number of features (S)."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of Adam."""
    lr_warmup_steps: int = Field(100, ge=0)
    """Steps over which the learning rate rises from 0."""
    lr_decay_fraction: float = Field(0.2, ge=0, le=1)
    """Last part of training over which the learning rate falls linearly to 0."""
    initialisation: Literal["random", "orthogonal", "kaiming", "data"] = "random"
    """Decoder rows at the start: random directions, orthogonal ones, PyTorch's Kaiming-uniform, or rows of
    the first window; the encoder is their transpose, at half or a quarter of its length."""
    decoder_bias: Literal["mean", "geometric-median", "zero", "none"] = "mean"
    """b_dec starts at the mean or the geometric median of the first window, at zero, or does not exist."""
    dead_after_rows: int = Field(10_000_000, ge=1)
    """A feature not active for this many rows counts as dead (OpenAI use 10 million)."""
    resample_every_rows: int | None = Field(None, ge=1)
    """Rows between new directions for dead features, of rows that are reconstructed badly; null: never."""
    seed: int = 0
    """Seed of the initial weights."""
    init_from: str | None = None
    """Directory of a SAELens dictionary of the same kind and shape to start from; null starts at random."""

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hook points whose rows it needs: its input's, and its target's if that is another one."""
        return (self.hook_name,)

    @property
    def held_l0(self) -> float | None:
        """Active features per row that training holds; None where the penalty alone decides."""
        return None


@dataclass(frozen=True)
class Schedule:
    """Where training stands: the step about to be made and how many there will be."""

    step: int
    total_steps: int

    def warm_up(self, steps: int) -> float:
        """Rises linearly from 1/steps to 1, which it reaches in step number `steps`."""
        return min(1.0, (self.step + 1) / max(1, steps))

    def fall(self, begin: int, end: int, steps: int) -> int:
        """Goes linearly from `begin` in the first step to `end`, which it has after `steps` of them."""
        return end if self.step >= steps else begin + round((end - begin) * self.step / steps)


@dataclass(frozen=True)
class StepResult:
    """What one forward pass in training gives; all tensors stay on the device.

    Attributes:
        loss: scalar to differentiate.
        components: scalar parts of the loss, by name; `mse` is always there.
        reconstruction: [B, D].
        active: [S] how many rows each feature was active on.
    """

    loss: Tensor
    components: dict[str, Tensor]
    reconstruction: Tensor
    active: Tensor


def squared_error(difference: Tensor) -> Tensor:
    """mean_rows Σ_d of a difference [B, D], in float32 at least."""
    return widened(difference).square().sum(dim=1).mean()


def widened(values: Tensor) -> Tensor:
    """In float32 at least: sums over many values want it."""
    return values.float() if values.dtype.itemsize < 4 else values


def keep_top(values: Tensor, k: int) -> Tensor:
    """[B, S] with all but each row's k largest values set to zero, and negative ones too."""
    top = values.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(values).scatter_(-1, top.indices, torch.relu(top.values))


def refuse_many_norms(sae: SAE) -> None:
    """For kinds that compare features' activations with each other.

    Raises:
        ValueError: rows of W_dec have several norms.
    """
    norms = torch.linalg.vector_norm(sae.W_dec.detach().double(), dim=1)
    if norms.max() > norms.min() * (1 + SAME_NORM):
        raise ValueError(
            f"its decoder rows have norms of {norms.min():.4g} to {norms.max():.4g}, and it keeps "
            "features by their activations alone (rescale_acts_by_decoder_norm is false); with rows of "
            "unit norm, which training works on, others would be kept"
        )
