"""ReLU autoencoder with an L1 penalty ("Taking features out of superposition with sparse
autoencoders", interim report, 2022).

    f = ReLU((x − b_dec) W_enc + b_enc),   x̂ = f W_dec + b_dec
    loss = mean_rows Σ_d (x − x̂)² + λ(step) · mean_rows Σ_s f

with rows of W_dec of unit norm in the forward pass. The report divides the reconstruction error by D
and the penalty by S, so its α is λ = α·D/S here.

Variants:
- `penalty_power` p < 1 has Σ_s (f + ε)^p for Σ_s f, which costs one active feature less than two that share
  its work; ε keeps the gradient at 0 finite.
- `decoder_norm: free` leaves rows of W_dec as they are, and weights activations in the penalty by their norms
  ("Circuits updates, April 2024").
- `noise` σ > 0 has the encoder see x + σ·(standard normal), but the target stays x.
- `tied` has the transposed rows of W_dec for W_enc, in training. Once the scale is folded there is a W_enc:
  the scale goes into both, but not alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from penstock.trainer.kinds.base import Kind, SAESettings, Schedule, StepResult, squared_error, torch, widened
from penstock.trainer.kinds.foreign import Foreign, by_input, by_output, centred_bias, plain

if TYPE_CHECKING:
    from torch import Tensor


class StandardSettings(SAESettings):
    """ReLU-L1."""

    architecture: Literal["standard"]
    """Kind of autoencoder."""
    l1_coefficient: float = Field(ge=0)
    """λ, on scaled inputs (mean ‖x‖² = d_in), summed over features."""
    l1_warmup_steps: int = Field(200, ge=0)
    """Steps over which λ rises from 0."""
    penalty_power: float = Field(1.0, gt=0, le=1)
    """p of the penalty Σ(f + ε)^p; 1 is L1."""
    penalty_epsilon: float = Field(1e-3, gt=0)
    """ε of the penalty, if p is not 1."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """Decoder rows have norm 1, or any, by which the penalty then weights their features."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation, on scaled inputs, of the noise that training adds to what the encoder sees."""
    tied: bool = False
    """Whether the encoder is the decoder's transpose, in training."""


class Standard(Kind):
    """See the module."""

    Settings = StandardSettings
    from_saelens = ("standard",)
    settled = ("tied",)
    settings: StandardSettings

    def __init__(self, d_in: int, settings: Any, d_out: int | None = None) -> None:
        super().__init__(d_in, settings, d_out)
        if self.settings.tied:
            del self.W_enc

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.pre_acts(x))

    def encoder(self) -> Tensor:
        return self.directions().T if self._is_tied else self.W_enc

    def directions(self) -> Tensor:
        return self.W_dec if self.settings.decoder_norm == "free" else super().directions()

    def after_step(self) -> None:
        if self.settings.decoder_norm == "unit":
            super().after_step()

    @property
    def _is_tied(self) -> bool:
        return "W_enc" not in self._parameters

    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        settings = self.settings
        acts = self.encode(x + settings.noise * self.noise(x, schedule) if settings.noise else x)
        reconstruction = self.decode(acts)
        mse = squared_error(target - reconstruction)
        weighted = widened(acts)
        if settings.decoder_norm == "free":
            weighted = weighted * torch.linalg.vector_norm(self.W_dec, dim=1)
        l1 = weighted.sum(dim=1).mean()
        components = {"mse": mse, "l1": l1}
        penalty = l1
        if settings.penalty_power != 1:
            penalty = (weighted + settings.penalty_epsilon).pow(settings.penalty_power).sum(dim=1).mean()
            components["penalty"] = penalty
        coefficient = settings.l1_coefficient * schedule.warm_up(settings.l1_warmup_steps)
        return StepResult(
            loss=mse + coefficient * penalty,
            components=components,
            reconstruction=reconstruction,
            active=(acts > 0).sum(dim=0, dtype=torch.int32),
        )

    def fold_scale(self, scale: float, scale_out: float | None = None) -> None:
        if self._is_tied:
            self.W_enc = torch.nn.Parameter(self.directions().detach().T.contiguous())
        super().fold_scale(scale, scale_out)

    def to_saelens(self) -> Foreign:
        return Foreign("standard", {}, by_input(self))

    def to_dictionary_learning(self) -> Foreign:
        # its AutoEncoder subtracts b_dec, too, but is always loaded with decoder rows stretched to unit
        # norm, which changes feature activations; this one is left alone
        tensors = {
            "encoder.weight": plain(self.W_enc.T),
            "encoder.bias": centred_bias(self),
            "decoder.weight": plain(self.directions().T),
            "decoder.bias": plain(self.b_dec),
        }
        return Foreign("AutoEncoderNew", {}, tensors)

    def to_sparsify(self) -> Foreign:
        # the k = S largest are all, and its encoder has a ReLU
        return Foreign("topk", {"k": self.d_sae}, by_output(self) | {"W_dec": plain(self.directions())})

    @classmethod
    def settings_from_saelens(cls, fields: dict[str, object]) -> dict[str, object]:
        return {"l1_coefficient": 0.0}

    def _start_encoder(self, directions: Tensor) -> None:
        if not self._is_tied:
            super()._start_encoder(directions)

    def _reset_encoder(self, features: Tensor, directions: Tensor) -> None:
        if not self._is_tied:
            super()._reset_encoder(features, directions)
