"""The auxiliary loss for dead features of kinds that keep the largest activations ("AuxK": Gao et al. 2024).

    aux = mean_rows Σ_d (e − ê)²

where e = x − x̂ (no gradient) and ê is its reconstruction by the `aux_k` strongest dead features of each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from penstock.trainer.kinds.base import SAESettings, Schedule, StepResult, squared_error, torch

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.trainer.sae import SAE
    from penstock.trainer.sparse import Few, PreActs


class AuxKSettings(SAESettings):
    """Settings of kinds that keep a number of features per row, and of the auxiliary loss."""

    k_warmup_steps: int = Field(0, ge=0)
    """Steps over which the features kept per row fall linearly to k, from as many as the input has
    dimensions; 0: k from the first step on."""
    aux_k: int | None = Field(None, ge=1)
    """Dead features that reconstruct the error; null means d_in / 2."""
    aux_coefficient: float = Field(1 / 32, ge=0)
    """Weight of the auxiliary loss."""

    def kept(self, k: int, most: int, schedule: Schedule) -> int:
        """Features that a row keeps in this step.

        Args:
            most: with which the warm-up begins.
        """
        return schedule.fall(max(k, most), k, self.k_warmup_steps)


def auxiliary_loss(sae: SAE, pre_acts: PreActs, dead: Tensor, error: Tensor, directions: Tensor) -> Tensor:
    """Scalar `aux`, before its coefficient.

    Args:
        sae: its settings are `AuxKSettings`.
        pre_acts: [B, S].
        dead: [S] bool.
        error: [B, D] what the live features leave of the target.
        directions: [S, D] decoder rows of unit norm.
    """
    # the settings bound aux_k; fewer dead features than that fill up with zeros
    aux_k = min(sae.settings.aux_k or sae.d_in // 2, sae.d_sae)
    dead_acts = pre_acts.only(dead).top_of_rows(aux_k)
    aux = squared_error(error.detach() - dead_acts.decode(directions))
    # early on the auxiliary loss can overflow; a step without it is better than none
    return torch.nan_to_num(aux, nan=0.0, posinf=0.0)


def reconstructed(sae: SAE, pre_acts: PreActs, acts: Few, target: Tensor, dead: Tensor | None) -> StepResult:
    """What a step gives once it is decided which activations are kept."""
    directions = sae.directions()
    reconstruction = acts.decode(directions) + sae.b_dec
    error = target - reconstruction
    mse = squared_error(error)
    components, loss = {"mse": mse}, mse
    if dead is not None:
        components["aux"] = auxiliary_loss(sae, pre_acts, dead, error, directions)
        loss = loss + sae.settings.aux_coefficient * components["aux"]
    return StepResult(loss, components, reconstruction, acts.active())
