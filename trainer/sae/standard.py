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


class StandardSAE(SAE):
    """See the module."""

    architecture = "standard"

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
