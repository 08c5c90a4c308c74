"""TopK autoencoder with an auxiliary loss for dead features (Gao et al. 2024, "Scaling and evaluating
sparse autoencoders").

    f = ReLU(TopK((x − b_dec) W_enc + b_enc)),   x̂ = f W_dec + b_dec
    loss = mean_rows Σ_d (x − x̂)² + aux_coefficient · mean_rows Σ_d (e − ê)²

where e = x − x̂ (no gradient) and ê is its reconstruction by the `aux_k` strongest dead features.
"""

import torch
from torch import Tensor

from penstock.trainer.kinds import TopKSettings
from penstock.trainer.sae.base import SAE, Schedule, StepResult


class TopKSAE(SAE):
    """See the module."""

    architecture = "topk"

    def __init__(self, d_in: int, settings: TopKSettings) -> None:
        super().__init__(d_in, settings.d_sae)
        self.settings = settings
        self.k = min(settings.k, settings.d_sae)

    def encode(self, x: Tensor) -> Tensor:
        return _keep_top(self.pre_acts(x), self.k)

    def training_pass(self, x: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        pre_acts = self.pre_acts(x)
        acts = _keep_top(pre_acts, self.k)
        directions = self.directions()
        reconstruction = acts @ directions + self.b_dec
        error = x - reconstruction
        mse = error.float().square().sum(dim=1).mean()
        components = {"mse": mse}
        loss = mse
        if dead is not None:
            # the settings bound aux_k; fewer dead features than that fill up with zeros
            aux_k = min(self.settings.aux_k or self.d_in // 2, self.d_sae)
            dead_acts = _keep_top(pre_acts.masked_fill(~dead, float("-inf")), aux_k)
            aux_error = error.detach() - dead_acts @ directions
            aux = aux_error.float().square().sum(dim=1).mean()
            # early on the auxiliary loss can overflow; a step without it is better than none
            aux = torch.nan_to_num(aux, nan=0.0, posinf=0.0)
            components["aux"] = aux
            loss = loss + self.settings.aux_coefficient * aux
        active = (acts > 0).sum(dim=0, dtype=torch.int32)
        return StepResult(loss, components, reconstruction, active)


def _keep_top(pre_acts: Tensor, k: int) -> Tensor:
    """[B, S] with all but each row's k largest values set to zero, and negative ones too."""
    top = pre_acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_acts).scatter_(-1, top.indices, torch.relu(top.values))
