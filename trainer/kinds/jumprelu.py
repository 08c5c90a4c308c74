"""JumpReLU autoencoder (Rajamanoharan et al. 2024, "Jumping ahead: improving reconstruction fidelity with
JumpReLU sparse autoencoders").

    z = (x − b_dec) W_enc + b_enc,   f = z · [z > θ],   x̂ = f W_dec + b_dec
    loss = mean_rows Σ_d (x − x̂)² + λ(step) · L0                        or, to hold a target,
    loss = mean_rows Σ_d (x − x̂)² + λ(step) · (L0 / l0_target − 1)²

with a threshold θ ≥ 0 per feature, and L0 the mean over rows of how many features are active. What θ is
pulled by is in `trainer/straight_through.py`. The paper trains log θ; Adam moves that by a share of θ per
step at most, so small thresholds hardly move in a short training. Here θ itself is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from penstock.trainer.kinds.base import (
    Kind,
    SAESettings,
    Schedule,
    StepResult,
    squared_error,
    torch,
)
from penstock.trainer.kinds.foreign import Foreign, by_input, centred_bias, plain

if TYPE_CHECKING:
    from torch import Tensor, nn


SMALL = 0.01
"""What thresholds start at without a target, on scaled rows."""


class JumpReLUSettings(SAESettings):
    """JumpReLU."""

    architecture: Literal["jumprelu"]
    """Kind of autoencoder."""
    l0_target: float | None = Field(None, gt=0)
    """Active features per row to hold on average; null lets λ alone decide."""
    l0_coefficient: float | None = Field(None, ge=0)
    """λ, on scaled inputs (mean ‖x‖² = d_in): of L0 or, with a target, of its squared relative distance from
    it; null with a target means 10 × d_in."""
    l0_warmup_steps: int = Field(200, ge=0)
    """Steps over which λ rises from 0."""
    bandwidth: float = Field(0.05, gt=0)
    """ε: how far around a threshold, on scaled inputs, pre-activations tell what moving it would change."""
    initial_threshold: float | None = Field(None, ge=0)
    """What thresholds start at, on scaled inputs; null means 0.01 or, with a target, where the first batch
    meets it."""

    @model_validator(mode="after")
    def _has_a_penalty(self) -> Self:
        if self.l0_target is None and self.l0_coefficient is None:
            raise ValueError("set l0_target, or l0_coefficient")
        if self.l0_target is not None and self.l0_target > self.d_sae:
            raise ValueError(f"l0_target is {self.l0_target}, more than its d_sae of {self.d_sae}")
        return self

    @property
    def held_l0(self) -> float | None:
        return self.l0_target


class JumpReLU(Kind):
    """See the module.

    Attributes:
        threshold: [S], of scaled rows. Training can leave some below 0, which counts as 0.
    """

    Settings = JumpReLUSettings
    from_saelens = ("jumprelu",)
    in_units_of_rows = ("b_enc", "b_dec", "threshold")
    feature_axes = {"W_enc": 1, "b_enc": 0, "threshold": 0, "W_dec": 0}
    settings: JumpReLUSettings
    threshold: nn.Parameter

    def __init__(self, d_in: int, settings: Any, d_out: int | None = None) -> None:
        super().__init__(d_in, settings, d_out)
        start = self.settings.initial_threshold
        self.threshold = torch.nn.Parameter(torch.full((self.d_sae,), SMALL if start is None else start))

    def encode(self, x: Tensor) -> Tensor:
        pre_acts = self.pre_acts(x)
        return torch.relu(pre_acts) * (pre_acts > self.threshold)

    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        from penstock.trainer.straight_through import jump_relu, mean_l0

        settings = self.settings
        pre_acts = self.pre_acts(x)
        with torch.no_grad():
            if schedule.step == 0 and self._meets_target_at_once:
                self.threshold.copy_(self._threshold_of(pre_acts))
            # here and not in the graph: at 0 it would have no gradient, and stay there
            self.threshold.clamp_(min=0)
        acts = jump_relu(pre_acts, self.threshold, settings.bandwidth)
        reconstruction = self.decode(acts)
        mse = squared_error(target - reconstruction)
        penalty = mean_l0(pre_acts, self.threshold, settings.bandwidth)
        coefficient = settings.l0_coefficient
        if settings.l0_target is not None:
            penalty = (penalty / settings.l0_target - 1).square()
            coefficient = 10.0 * self.d_in if coefficient is None else coefficient
        assert coefficient is not None
        return StepResult(
            loss=mse + coefficient * schedule.warm_up(settings.l0_warmup_steps) * penalty,
            components={"mse": mse, "penalty": penalty},
            reconstruction=reconstruction,
            active=(acts > 0).sum(dim=0, dtype=torch.int32),
        )

    def reset_features(self, features: Tensor, rows: Tensor, targets: Tensor) -> None:
        super().reset_features(features, rows, targets)
        start = self.settings.initial_threshold
        with torch.no_grad():
            if start is None and self.settings.l0_target is not None:
                others = torch.ones_like(self.threshold)
                others[features] = 0
                self.threshold[features] = (self.threshold * others).sum() / others.sum().clamp(min=1)
            else:
                self.threshold[features] = SMALL if start is None else start

    @property
    def _meets_target_at_once(self) -> bool:
        settings = self.settings
        chosen = settings.initial_threshold is not None or settings.init_from is not None
        return settings.l0_target is not None and not chosen

    def _threshold_of(self, pre_acts: Tensor) -> Tensor:
        """Scalar: the threshold for all features at which these rows have `l0_target` of them active.

        Adam remembers its largest gradients for long. From a small threshold the first ones, with half of
        all features active, would be so large that the threshold could hardly follow its target later.
        """
        n = round((self.settings.l0_target or 0) * len(pre_acts))
        return pre_acts.flatten().topk(min(max(1, n), pre_acts.numel()), sorted=False).values.min()

    def to_saelens(self) -> Foreign:
        return Foreign("jumprelu", {}, by_input(self) | {"threshold": plain(self.threshold)})

    def to_dictionary_learning(self) -> Foreign:
        # its module has a switch for subtracting b_dec, but its loader leaves it off
        tensors = by_input(self) | {"b_enc": centred_bias(self), "threshold": plain(self.threshold)}
        return Foreign("JumpReluAutoEncoder", {}, tensors)

    @classmethod
    def settings_from_saelens(cls, fields: dict[str, object]) -> dict[str, object]:
        return {"l0_coefficient": 0.0}

    def _scale_features(self, factors: Tensor) -> None:
        super()._scale_features(factors)
        with torch.no_grad():
            self.threshold.copy_(self.threshold.double() * factors)
