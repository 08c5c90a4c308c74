"""Transcoder: computes one hook point's rows y from another's x (Dunefsky et al. 2024, "Transcoders find
interpretable LLM feature circuits"), optionally beside a linear map of them (Paulo et al. 2025, "Transcoders
beat sparse autoencoders for interpretability").

    f = ReLU(TopK(x W_enc + b_enc)),   ŷ = f W_dec + b_dec (+ x W_skip)
    loss = mean_rows Σ_d (y − ŷ)² + aux_coefficient · aux

where aux is that of TopK dictionaries. Without `k` all positive features stay, and the loss is

    mean_rows Σ_d (y − ŷ)² + λ(step) · mean_rows Σ_s f

x and y have scales of their own: each has mean squared norm = its width in training.

Rows that enter an MLP have much in common: most of their squared norm can be that of their mean. A step of
W_enc along it moves a feature's activation on every row at once, and most features die of that. So
training computes with x − μ for x, where μ is the mean of the first window, which changes what is learnt but
not what can be: μ W_enc goes into b_enc, and μ W_skip into b_dec, when the scales are folded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from penstock.trainer.kinds.auxk import AuxKSettings, auxiliary_loss
from penstock.trainer.kinds.base import (
    FEW_LENGTH,
    Kind,
    Schedule,
    StepResult,
    keep_top,
    squared_error,
    torch,
    widened,
)
from penstock.trainer.kinds.foreign import Foreign, NoSuchKind, by_input, by_output, plain

if TYPE_CHECKING:
    from torch import Tensor


class TranscoderSettings(AuxKSettings):
    """Transcoder for a pair of hook points."""

    architecture: Literal["transcoder"]
    """Kind of autoencoder."""
    hook_out: str
    """The hook point whose rows are computed, from those of hook_name; the dataset must hold it."""
    k: int | None = Field(None, ge=1)
    """Features kept per row (L0); null keeps all positive ones, for l1_coefficient."""
    l1_coefficient: float | None = Field(None, ge=0)
    """λ, on scaled inputs, summed over features; in place of k."""
    l1_warmup_steps: int = Field(200, ge=0)
    """Steps over which λ rises from 0."""
    skip: bool = False
    """Whether a linear map of the input, x W_skip, is added to the output."""

    @model_validator(mode="after")
    def _sparse_one_way(self) -> Self:
        if (self.k is None) == (self.l1_coefficient is None):
            raise ValueError("set either k (TopK) or l1_coefficient (ReLU)")
        if self.k is None and self.k_warmup_steps:
            raise ValueError("k_warmup_steps: there is no k; leave it out")
        return self

    @property
    def held_l0(self) -> float | None:
        return None if self.k is None else float(self.k)

    @property
    def hooks(self) -> tuple[str, ...]:
        return (self.hook_name, self.hook_out)


class Transcoder(Kind):
    """See the module."""

    Settings = TranscoderSettings
    from_saelens = ("transcoder", "skip_transcoder")
    subtracts_b_dec = False
    settled = ("k", "skip")
    settings: TranscoderSettings
    x_mean: Tensor

    def __init__(self, d_in: int, settings: Any, d_out: int | None = None) -> None:
        super().__init__(d_in, settings, d_out)
        self.register_buffer("x_mean", torch.zeros(self.d_in))
        if settings.skip:
            self.W_skip = torch.nn.Parameter(torch.zeros(self.d_in, self.d_out))
        if settings.k is not None:
            self.encoder_length = FEW_LENGTH

    def note_mean(self, mean: Tensor) -> None:
        # folding puts μ W_skip into b_dec, which must not be where there is none
        if not self.settings.skip or self.settings.decoder_bias != "none":
            self.x_mean.copy_(mean)

    def seen(self, x: Tensor) -> Tensor:
        return x - self.x_mean

    def encode(self, x: Tensor) -> Tensor:
        return self._activated(self.pre_acts(x))

    def reconstruct(self, x: Tensor, feature_acts: Tensor) -> Tensor:
        out = self.decode(feature_acts)
        return out + self.seen(x) @ self.W_skip if self.settings.skip else out

    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        pass_of = self._l1_pass if self.settings.k is None else self._top_k_pass
        return pass_of(x, target, schedule, dead)

    def _l1_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        acts = torch.relu(self.pre_acts(x))
        reconstruction = self.reconstruct(x, acts)
        mse, l1 = squared_error(target - reconstruction), widened(acts).sum(dim=1).mean()
        coefficient = (self.settings.l1_coefficient or 0.0) * schedule.warm_up(self.settings.l1_warmup_steps)
        active = (acts > 0).sum(dim=0, dtype=torch.int32)
        return StepResult(mse + coefficient * l1, {"mse": mse, "l1": l1}, reconstruction, active)

    def _top_k_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        from penstock.trainer.sparse import PreActs

        x = self.seen(x)
        pre_acts = PreActs.of(x, self.W_enc, self.b_enc)
        k = min(self.settings.k or 0, self.d_sae)
        acts = pre_acts.top_of_rows(self.settings.kept(k, min(self.d_in, self.d_sae), schedule))
        directions = self.directions()
        reconstruction = acts.decode(directions) + self.b_dec
        if self.settings.skip:
            reconstruction = reconstruction + x @ self.W_skip
        error = target - reconstruction
        mse = squared_error(error)
        components, loss = {"mse": mse}, mse
        if dead is not None:
            components["aux"] = auxiliary_loss(self, pre_acts, dead, error, directions)
            loss = loss + self.settings.aux_coefficient * components["aux"]
        return StepResult(loss, components, reconstruction, acts.active())

    def _activated(self, pre_acts: Tensor) -> Tensor:
        if self.settings.k is None:
            return torch.relu(pre_acts)
        return keep_top(pre_acts, min(self.settings.k, self.d_sae))

    def _start_decoder(self, directions: Tensor, generator: torch.Generator) -> None:
        # the encoder's directions say nothing of another hook point's
        drawn = torch.randn(self.d_sae, self.d_out, generator=generator)
        self.W_dec.copy_(torch.nn.functional.normalize(drawn, dim=1))
        if self.settings.skip:
            self.W_skip.zero_()

    def fold_scale(self, scale: float, scale_out: float | None = None) -> None:
        with torch.no_grad():
            self._shift(-self.x_mean)
            self.x_mean.zero_()
        super().fold_scale(scale, scale_out)
        if self.settings.skip:
            with torch.no_grad():
                self.W_skip.mul_(scale / (scale if scale_out is None else scale_out))

    def _shift(self, by: Tensor) -> None:
        """Make biases such that rows x give what rows x + by [D] have given."""
        by = by.double()
        self.b_enc.copy_(self.b_enc.double() + by @ self.W_enc.double())
        if self.settings.skip:
            self.b_dec.copy_(self.b_dec.double() + by @ self.W_skip.double())

    def start_from(self, other: Self, scale: float, scale_out: float | None = None) -> None:
        # features are measured in the units of the output: its scale takes the rows' place
        out = scale if scale_out is None else scale_out
        mean = self.x_mean.clone()
        super().start_from(other, out)
        with torch.no_grad():
            self.W_enc.mul_(out / scale)
            if self.settings.skip:
                self.W_skip.mul_(out / scale)
            self._shift(mean)
            self.x_mean.copy_(mean)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # checkpoints of earlier versions and other libraries' dictionaries have none
        state_dict.setdefault(f"{prefix}x_mean", torch.zeros(self.d_in))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def to_saelens(self) -> Foreign:
        if self.settings.k is not None:
            raise NoSuchKind("TopK transcoder", "SAELens")
        fields = {"d_out": self.d_out, "apply_b_dec_to_input": False}
        if not self.settings.skip:
            return Foreign("transcoder", fields, by_input(self))
        return Foreign("skip_transcoder", fields, by_input(self) | {"W_skip": plain(self.W_skip.T)})

    def to_sparsify(self) -> Foreign:
        if self.d_in != self.d_out:
            raise NoSuchKind("transcoder between hook points of different widths", "sparsify")
        tensors = by_output(self) | {"W_dec": plain(self.directions())}
        if self.settings.skip:
            tensors["W_skip"] = plain(self.W_skip.T)
        k = self.d_sae if self.settings.k is None else min(self.settings.k, self.d_sae)
        return Foreign("topk", {"k": k, "transcode": True, "skip_connection": self.settings.skip}, tensors)

    @classmethod
    def settings_from_saelens(cls, fields: dict[str, object]) -> dict[str, object]:
        return {"l1_coefficient": 0.0, "skip": fields.get("architecture") == "skip_transcoder"}

    def adopt_saelens(self, source: Foreign) -> None:
        tensors = dict(source.tensors)
        if self.settings.skip:
            tensors["W_skip"] = tensors["W_skip"].T
        self.load_state_dict(tensors)
