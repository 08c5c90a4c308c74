"""BatchTopK autoencoder (Bussmann, Leask and Nanda 2024, "BatchTopK sparse autoencoders").

    f = ReLU((x − b_dec) W_enc + b_enc), of which a batch of B rows keeps its B·k largest
    x̂ = f W_dec + b_dec
    loss = mean_rows Σ_d (x − x̂)² + aux_coefficient · aux

where aux is what `trainer/kinds/auxk.py` says. What a row keeps in training depends on the rows beside it.
`encode` does not: it keeps what is above one threshold, the smoothed smallest activation that training kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from penstock.trainer.kinds.auxk import AuxKSettings, reconstructed
from penstock.trainer.kinds.base import (
    FEW_LENGTH,
    Kind,
    Schedule,
    StepResult,
    refuse_many_norms,
    torch,
)
from penstock.trainer.kinds.foreign import Foreign, by_input, by_output, plain

if TYPE_CHECKING:
    from torch import Tensor


class BatchTopKSettings(AuxKSettings):
    """BatchTopK with AuxK."""

    architecture: Literal["batchtopk"]
    """Kind of autoencoder."""
    k: int = Field(ge=1)
    """Features kept per row on average (L0)."""
    threshold_decay: float = Field(0.99, ge=0, lt=1)
    """Share of the inference threshold that stays in each step; the rest is the smallest activation kept."""

    @property
    def held_l0(self) -> float | None:
        return float(self.k)


class BatchTopK(Kind):
    """See the module.

    Attributes:
        threshold: scalar buffer, of scaled rows; 0 before the first step.
    """

    Settings = BatchTopKSettings
    settled = ("k",)
    encoder_length = FEW_LENGTH
    in_units_of_rows = ("b_enc", "b_dec", "threshold")
    settings: BatchTopKSettings
    threshold: Tensor

    def __init__(self, d_in: int, settings: Any, d_out: int | None = None) -> None:
        super().__init__(d_in, settings, d_out)
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x: Tensor) -> Tensor:
        pre_acts = self.pre_acts(x)
        return torch.relu(pre_acts) * (pre_acts > self.threshold)

    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        from penstock.trainer.sparse import PreActs

        centred, bias = self.centred(x)
        pre_acts = PreActs.of(centred, self.W_enc, bias)
        k = self.settings.kept(self.settings.k, min(self.d_in, self.d_sae), schedule)
        acts = pre_acts.top_of_batch(k)
        self.follow(acts.smallest())
        return reconstructed(self, pre_acts, acts, target, dead)

    def follow(self, smallest: Tensor) -> None:
        """Move the threshold towards the smallest activation that a batch kept.

        Args:
            smallest: scalar; infinity if it kept none.
        """
        with torch.no_grad():
            decay, old = self.settings.threshold_decay, self.threshold
            found = smallest.to(old.dtype)
            # the first one found is where it starts
            new = torch.where(old > 0, decay * old + (1 - decay) * found, found)
            old.copy_(torch.where(found.isfinite(), new, old))

    def to_saelens(self) -> Foreign:
        tensors = by_input(self) | {"threshold": plain(self.threshold.expand(self.d_sae))}
        return Foreign("jumprelu", {}, tensors)

    def to_dictionary_learning(self) -> Foreign:
        tensors = by_output(self) | {
            "decoder.weight": plain(self.directions().T),
            "k": torch.tensor(self.settings.k, dtype=torch.int32),
            "threshold": plain(self.threshold),
        }
        return Foreign("BatchTopKSAE", {"k": self.settings.k}, tensors)

    def normalise_decoder(self) -> Self:
        refuse_many_norms(self)
        return super().normalise_decoder()

    def _scale_features(self, factors: Tensor) -> None:
        super()._scale_features(factors)
        with torch.no_grad():
            self.threshold.mul_(factors.mean())
