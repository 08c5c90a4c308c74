"""ReLU autoencoder with an L1 penalty ("Taking features out of superposition with sparse
autoencoders", interim report, 2022).

    f = ReLU((x − b_dec) W_enc + b_enc),   x̂ = f W_dec + b_dec
    loss = mean_rows Σ_d (x − x̂)² + λ(step) · mean_rows Σ_s f

with rows of W_dec of unit norm in the forward pass. The report divides the reconstruction error by D
and the penalty by S; its α is λ·S/D here.
"""

import torch
from torch import Tensor

from penstock.trainer.kinds import StandardSettings
from penstock.trainer.sae.base import SAE, Schedule, StepResult
from penstock.trainer.sae.foreign import Foreign, by_input, by_output, centred_bias, plain


class StandardSAE(SAE):
    """See the module."""

    architecture = "standard"
    settings: StandardSettings

    def __init__(self, d_in: int, settings: StandardSettings) -> None:
        super().__init__(d_in, settings.d_sae)
        self.settings = settings

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.pre_acts(x))

    def training_pass(self, x: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        acts = self.encode(x)
        reconstruction = self.decode(acts)
        mse = (x - reconstruction).float().square().sum(dim=1).mean()
        l1 = acts.float().sum(dim=1).mean()
        warmup = self.settings.l1_warmup_steps
        coefficient = self.settings.l1_coefficient * min(1.0, (schedule.step + 1) / max(1, warmup))
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
