"""TopK autoencoder with an auxiliary loss for dead features (Gao et al. 2024, "Scaling and evaluating
sparse autoencoders").

    f = ReLU(TopK((x − b_dec) W_enc + b_enc)),   x̂ = f W_dec + b_dec
    loss = mean_rows Σ_d (x − x̂)² + aux_coefficient · mean_rows Σ_d (e − ê)²

where e = x − x̂ (no gradient) and ê is its reconstruction by the `aux_k` strongest dead features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from penstock.trainer.kinds.base import (
    Kind,
    SAESettings,
    Schedule,
    StepResult,
    keep_top,
    squared_error,
    torch,
)
from penstock.trainer.kinds.foreign import Foreign, by_input, by_output, plain

if TYPE_CHECKING:
    from torch import Tensor

SAME_NORM = 1e-5
"""Relative difference in decoder rows' norms that is taken for rounding."""


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


class TopK(Kind):
    """See the module."""

    Settings = TopKSettings
    from_saelens = ("topk",)
    settled = ("k",)
    settings: TopKSettings

    @property
    def k(self) -> int:
        """Features kept per row."""
        return min(self.settings.k, self.d_sae)

    def encode(self, x: Tensor) -> Tensor:
        return keep_top(self.pre_acts(x), self.k)

    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        pre_acts = self.pre_acts(x)
        acts = keep_top(pre_acts, self.k)
        directions = self.directions()
        reconstruction = acts @ directions + self.b_dec
        error = target - reconstruction
        mse = squared_error(error)
        components = {"mse": mse}
        loss = mse
        if dead is not None:
            # the settings bound aux_k; fewer dead features than that fill up with zeros
            aux_k = min(self.settings.aux_k or self.d_in // 2, self.d_sae)
            dead_acts = keep_top(pre_acts.masked_fill(~dead, float("-inf")), aux_k)
            aux_error = error.detach() - dead_acts @ directions
            aux = squared_error(aux_error)
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

    def normalise_decoder(self, ranked: bool = False) -> Self:
        """As for every kind; the features that are kept must stay the same.

        Args:
            ranked: features are ranked by activation times norm of their decoder row as it is.
        """
        norms = torch.linalg.vector_norm(self.W_dec.detach().double(), dim=1)
        if not ranked and norms.max() > norms.min() * (1 + SAME_NORM):
            raise ValueError(
                f"its decoder rows have norms of {norms.min():.4g} to {norms.max():.4g}, and it keeps "
                "features by their activations alone (rescale_acts_by_decoder_norm is false); with rows of "
                "unit norm, which training works on, others would be kept"
            )
        return super().normalise_decoder()
