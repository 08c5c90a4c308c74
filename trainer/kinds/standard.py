"""ReLU autoencoder with an L1 penalty ("Taking features out of superposition with sparse
autoencoders", interim report, 2022).

    f = ReLU((x − b_dec) W_enc + b_enc),   x̂ = f W_dec + b_dec
    loss = mean_rows Σ_d (x − x̂)² + λ(step) · mean_rows Σ_s f

with rows of W_dec of unit norm in the forward pass. The report divides the reconstruction error by D
and the penalty by S; its α is λ·S/D here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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


class Standard(Kind):
    """See the module."""

    Settings = StandardSettings
    from_saelens = ("standard",)
    settings: StandardSettings

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.pre_acts(x))

    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        acts = self.encode(x)
        reconstruction = self.decode(acts)
        mse = squared_error(target - reconstruction)
        l1 = widened(acts).sum(dim=1).mean()
        coefficient = self.settings.l1_coefficient * schedule.warm_up(self.settings.l1_warmup_steps)
        return StepResult(
            loss=mse + coefficient * l1,
            components={"mse": mse, "l1": l1},
            reconstruction=reconstruction,
            active=(acts > 0).sum(dim=0, dtype=torch.int32),
        )

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
