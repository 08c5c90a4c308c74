"""Settings of every kind of sparse autoencoder.

They are apart from the modules (`trainer/sae`) because torch takes seconds and 200 MB to import, and who only
reads a configuration or a run's config needs none of it.
"""

from typing import Annotated, Literal

from pydantic import Field

from penstock.common.settings import Settings

LOSS_CONVENTION = "sum-over-dims: mean_rows(sum_d (x - x_hat)^2) + coefficient * mean_rows(penalty)"


class SAESettings(Settings):
    """Settings that every kind has."""

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
    decoder_bias: Literal["mean", "zero", "none"] = "mean"
    """b_dec starts at the first window's mean, at zero, or does not exist (stays zero)."""
    dead_after_rows: int = Field(10_000_000, ge=1)
    """A feature not active for this many rows counts as dead (OpenAI use 10 million)."""
    seed: int = 0
    """Seed of the initial weights."""
    init_from: str | None = None
    """Directory of a SAELens dictionary of the same kind and shape to start from; null starts at random."""


class StandardSettings(SAESettings):
    """ReLU-L1."""

    architecture: Literal["standard"]
    """Kind of autoencoder."""
    l1_coefficient: float = Field(ge=0)
    """λ, on scaled inputs (mean ‖x‖² = d_in), summed over features."""
    l1_warmup_steps: int = Field(200, ge=0)
    """Steps over which λ rises from 0."""


class TopKSettings(SAESettings):
    """TopK with AuxK."""

    architecture: Literal["topk"]
    """Kind of autoencoder."""
    k: int = Field(ge=1)
    """Features kept per row (L0)."""
    aux_k: int | None = Field(None, ge=1)
    """Dead features that reconstruct the error; null means d_in / 2."""
    aux_coefficient: float = Field(1 / 32, ge=0)
    """Weight of the auxiliary loss."""


AnySettings = Annotated[StandardSettings | TopKSettings, Field(discriminator="architecture")]
