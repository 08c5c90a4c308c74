"""Gated autoencoder (Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse
autoencoders").

    p = (x − b_dec) W_enc
    gate = p + b_gate,   magnitude = exp(r_mag) · p + b_mag
    f = [gate > 0] · ReLU(magnitude),   x̂ = f W_dec + b_dec
    loss = mean_rows Σ_d (x − x̂)² + λ(step) · mean_rows Σ_s ReLU(gate) + mean_rows Σ_d (x − x̂_gate)²

where x̂_gate = ReLU(gate) W_dec + b_dec, with the decoder's W_dec and b_dec frozen: the gate is to say how
strong a feature is, but the decoder is not to be made for that. Rows of W_dec have unit norm in the forward
pass, so the penalty needs no weights. The penalty shrinks the gate, but not the magnitude.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from penstock.trainer.kinds.base import Kind, SAESettings, Schedule, StepResult, squared_error, torch, widened
from penstock.trainer.kinds.foreign import Foreign, plain

if TYPE_CHECKING:
    from torch import Tensor, nn


class GatedSettings(SAESettings):
    """Gated."""

    architecture: Literal["gated"]
    """Kind of autoencoder."""
    l1_coefficient: float = Field(ge=0)
    """λ, on scaled inputs (mean ‖x‖² = d_in), summed over the gates that are open."""
    l1_warmup_steps: int = Field(200, ge=0)
    """Steps over which λ rises from 0."""


class Gated(Kind):
    """See the module."""

    Settings = GatedSettings
    from_saelens = ("gated",)
    encoder_vectors = ("b_gate", "b_mag", "r_mag")
    in_units_of_rows = ("b_gate", "b_mag", "b_dec")
    feature_axes = {"W_enc": 1, "b_gate": 0, "b_mag": 0, "r_mag": 0, "W_dec": 0}
    settings: GatedSettings
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def encode(self, x: Tensor) -> Tensor:
        return self.paths(x)[1]

    def paths(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] gates before their step, and feature activations."""
        if torch.is_grad_enabled():
            centred, shift = self.centred(x, bias=0.0)
            product = torch.addmm(shift, centred, self.W_enc)
        else:
            product = (x - self.b_dec) @ self.W_enc
        gate = product + self.b_gate
        magnitude = torch.relu(product * self.r_mag.exp() + self.b_mag)
        return gate, magnitude * (gate > 0)

    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        gate, acts = self.paths(x)
        directions = self.directions()
        reconstruction = acts @ directions + self.b_dec
        mse = squared_error(target - reconstruction)
        opened = torch.relu(gate)
        l1 = widened(opened).sum(dim=1).mean()
        aux = squared_error(target - opened @ directions.detach() - self.b_dec.detach())
        coefficient = self.settings.l1_coefficient * schedule.warm_up(self.settings.l1_warmup_steps)
        return StepResult(
            loss=mse + coefficient * l1 + aux,
            components={"mse": mse, "l1": l1, "aux": aux},
            reconstruction=reconstruction,
            active=(acts > 0).sum(dim=0, dtype=torch.int32),
        )

    def to_saelens(self) -> Foreign:
        names = ("W_enc", "b_gate", "b_mag", "r_mag", "b_dec")
        tensors = {name: plain(self.get_parameter(name)) for name in names}
        return Foreign("gated", {}, tensors | {"W_dec": plain(self.directions())})

    def to_dictionary_learning(self) -> Foreign:
        tensors = {
            "encoder.weight": plain(self.W_enc.T),
            "gate_bias": plain(self.b_gate),
            "mag_bias": plain(self.b_mag),
            "r_mag": plain(self.r_mag),
            "decoder.weight": plain(self.directions().T),
            "decoder_bias": plain(self.b_dec),
        }
        return Foreign("GatedAutoEncoder", {}, tensors)

    @classmethod
    def settings_from_saelens(cls, fields: dict[str, object]) -> dict[str, object]:
        return {"l1_coefficient": 0.0}

    @staticmethod
    def centre(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        exact = {name: tensor.double() for name, tensor in tensors.items()}
        shift = exact["b_dec"] @ exact["W_enc"]
        return {
            "b_gate": (exact["b_gate"] + shift).float(),
            "b_mag": (exact["b_mag"] + exact["r_mag"].exp() * shift).float(),
        }
