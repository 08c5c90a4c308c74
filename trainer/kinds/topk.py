"""TopK autoencoder with an auxiliary loss for dead features (Gao et al. 2024, "Scaling and evaluating
sparse autoencoders").

    f = ReLU(TopK((x − b_dec) W_enc + b_enc)),   x̂ = f W_dec + b_dec
    loss = mean_rows Σ_d (x − x̂)² + aux_coefficient · aux

where aux is what `trainer/kinds/auxk.py` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from penstock.trainer.kinds.auxk import AuxKSettings, reconstructed
from penstock.trainer.kinds.base import (
    FEW_LENGTH,
    Kind,
    Schedule,
    StepResult,
    keep_top,
    refuse_many_norms,
    torch,
)
from penstock.trainer.kinds.foreign import Foreign, by_input, by_output, plain

if TYPE_CHECKING:
    from torch import Tensor


class TopKSettings(AuxKSettings):
    """TopK with AuxK."""

    architecture: Literal["topk"]
    """Kind of autoencoder."""
    k: int = Field(ge=1)
    """Features kept per row (L0)."""

    @property
    def held_l0(self) -> float | None:
        return float(self.k)


class TopK(Kind):
    """See the module."""

    Settings = TopKSettings
    from_saelens = ("topk",)
    settled = ("k",)
    encoder_length = FEW_LENGTH
    settings: TopKSettings

    @property
    def k(self) -> int:
        """Features kept per row."""
        return min(self.settings.k, self.d_sae)

    def encode(self, x: Tensor) -> Tensor:
        return keep_top(self.pre_acts(x), self.k)

    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        from penstock.trainer.sparse import PreActs

        centred, bias = self.centred(x)
        pre_acts = PreActs.of(centred, self.W_enc, bias)
        k = self.settings.kept(self.k, min(self.d_in, self.d_sae), schedule)
        acts = pre_acts.top_of_rows(k)
        return reconstructed(self, pre_acts, acts, target, dead)

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
        if not ranked:
            refuse_many_norms(self)
        return super().normalise_decoder()
