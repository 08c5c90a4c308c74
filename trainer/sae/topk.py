"""TopK autoencoder with an auxiliary loss for dead features (Gao et al. 2024, "Scaling and evaluating
sparse autoencoders").

    f = ReLU(TopK((x − b_dec) W_enc + b_enc)),   x̂ = f W_dec + b_dec
    loss = mean_rows Σ_d (x − x̂)² + aux_coefficient · mean_rows Σ_d (e − ê)²

where e = x − x̂ (no gradient) and ê is its reconstruction by the `aux_k` strongest dead features.
"""

from typing import Self

import torch
from torch import Tensor

from penstock.trainer.kinds import TopKSettings
from penstock.trainer.sae.base import SAE, Schedule, StepResult
from penstock.trainer.sae.foreign import Foreign, by_input, by_output, plain

SAME_NORM = 1e-5
"""Relative difference in decoder rows' norms that is taken for rounding."""


class TopKSAE(SAE):
    """See the module."""

    architecture = "topk"
    settled = ("k",)
    settings: TopKSettings

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

    def to_saelens(self) -> Foreign:
        return Foreign("topk", {"k": self.k, "rescale_acts_by_decoder_norm": False}, by_input(self))

    def to_dictionary_learning(self) -> Foreign:
        tensors = by_output(self) | {
            "decoder.weight": plain(self.directions().T),
            "k": torch.tensor(self.k, dtype=torch.int32),
            "threshold": torch.tensor(-1.0),  # none: its encoder keeps the k largest
        }
        return Foreign("AutoEncoderTopK", {"k": self.k}, tensors)

    def to_sparsify(self) -> Foreign:
        return Foreign("topk", {"k": self.k}, by_output(self) | {"W_dec": plain(self.directions())})

    @classmethod
    def settings_from_saelens(cls, fields: dict[str, object]) -> dict[str, object]:
        return {"k": fields.get("k")}

    def adopt_saelens(self, source: Foreign) -> None:
        super().adopt_saelens(source)
        if source.fields.get("rescale_acts_by_decoder_norm"):
            # it ranks, and gives, activations times the norms of their decoder rows
            self.normalise_decoder(ranked=True)

    @torch.no_grad()
    def normalise_decoder(self, ranked: bool = False) -> Self:
        """As for every kind; the features that are kept must stay the same.

        Args:
            ranked: features are ranked by activation times norm of their decoder row as it is.
        """
        norms = torch.linalg.vector_norm(self.W_dec.double(), dim=1)
        if not ranked and norms.max() > norms.min() * (1 + SAME_NORM):
            raise ValueError(
                f"its decoder rows have norms of {norms.min():.4g} to {norms.max():.4g}, and it keeps "
                "features by their activations alone (rescale_acts_by_decoder_norm is false); with rows of "
                "unit norm, which training works on, others would be kept"
            )
        return super().normalise_decoder()


def _keep_top(pre_acts: Tensor, k: int) -> Tensor:
    """[B, S] with all but each row's k largest values set to zero, and negative ones too."""
    top = pre_acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_acts).scatter_(-1, top.indices, torch.relu(top.values))
