"""Switch autoencoder: a mixture of TopK experts (Mudide et al. 2024, "Efficient dictionary learning with
switch sparse autoencoders").

    p = softmax((x − b_dec) W_router + b_router),   e = argmax p
    f = p_e · ReLU(TopK_e((x − b_dec) W_enc + b_enc)),   x̂ = f W_dec + b_dec
    loss = mean_rows Σ_d (x − x̂)² + aux_coefficient · aux + balance_coefficient · D · (E Σ_i load_i p̄_i − 1)

Each expert has S / E features with consecutive numbers, and TopK_e looks at those of expert e alone: all
others are zero, and are not computed. load_i is the share of rows that expert i gets and p̄_i its mean
probability; their sum of products is 1/E when the load is even. aux is that of TopK dictionaries, where the
dead features of a row are those of its own expert.

With `always_on_k` the first expert sees every row beside the chosen one. It is not among those that the
router chooses from, and its features are not scaled by a probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from penstock.trainer.kinds.auxk import AuxKSettings
from penstock.trainer.kinds.base import Kind, Schedule, StepResult, keep_top, squared_error, torch
from penstock.trainer.kinds.grouped import Groups

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.trainer.sae import SAE


class SwitchSettings(AuxKSettings):
    """Mixture of TopK experts."""

    architecture: Literal["switch"]
    """Kind of autoencoder."""
    k: int = Field(ge=1)
    """Features that the chosen expert keeps per row."""
    experts: int = Field(ge=2)
    """Number of experts (E); d_sae must be a multiple of it."""
    always_on_k: int = Field(0, ge=0)
    """Features kept per row of an expert that sees every row, besides the chosen one's; 0: none does."""
    balance_coefficient: float = Field(0.1, ge=0)
    """Weight of the load-balance loss, as a share of d_in."""

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.d_sae % self.experts:
            raise ValueError(f"d_sae of {self.d_sae} is not a multiple of experts ({self.experts})")
        if max(self.k, self.always_on_k) > self.d_sae // self.experts:
            raise ValueError(f"k: an expert has {self.d_sae // self.experts} features only")
        return self

    @property
    def held_l0(self) -> float | None:
        return float(self.k + self.always_on_k)


@dataclass(frozen=True)
class Routed:
    """Rows with their experts, sorted by expert.

    Attributes:
        probability: [B, 1] of the chosen expert, sorted.
        pre_acts: [B, S/E] of the chosen expert, sorted.
        mean: [E'] mean probability of each expert that the router chooses from.
    """

    groups: Groups
    probability: Tensor
    pre_acts: Tensor
    mean: Tensor


class Switch(Kind):
    """See the module.

    Attributes:
        W_router: [D, E'] for the E' experts that the router chooses from.
        b_router: [E'].
    """

    Settings = SwitchSettings
    settled = ("k", "experts", "always_on_k")
    settings: SwitchSettings

    def __init__(self, d_in: int, settings: Any, d_out: int | None = None) -> None:
        super().__init__(d_in, settings, d_out)
        self.always_on = int(settings.always_on_k > 0)
        self.size = settings.d_sae // settings.experts
        self.W_router = torch.nn.Parameter(torch.empty(d_in, settings.experts - self.always_on))
        self.b_router = torch.nn.Parameter(torch.zeros(settings.experts - self.always_on))

    def encode(self, x: Tensor) -> Tensor:
        centred = x - self.b_dec
        routed = self._route(centred)
        acts = keep_top(routed.pre_acts, self.settings.k) * routed.probability
        spread = acts.new_zeros(len(x), self.settings.experts, self.size)
        spread[routed.groups.order, routed.groups.expert + self.always_on] = acts
        if self.always_on:
            spread[:, 0] = self._always_on(centred)[1]
        return spread.flatten(1)

    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        centred = x - self.b_dec
        routed = self._route(centred)
        groups, n = routed.groups, self.settings.experts
        k = self.settings.kept(self.settings.k, min(self.d_in, self.size), schedule)
        acts = keep_top(routed.pre_acts, k) * routed.probability
        directions = self.directions().view(n, self.size, self.d_in)
        own = directions[self.always_on :]
        decoded = groups.sorted_back(groups.product(acts, own)) + self.b_dec
        active = torch.zeros(n, self.size, dtype=torch.int32, device=x.device)
        active.index_add_(0, groups.expert + self.always_on, (acts > 0).to(torch.int32))
        if self.always_on:
            all_pre_acts, all_acts = self._always_on(centred)
            decoded = decoded + all_acts @ directions[0]
            active[0] = (all_acts > 0).sum(dim=0, dtype=torch.int32)
        error = target - decoded
        mse = squared_error(error)
        load = groups.counts / len(x)
        balance = len(load) * (load * routed.mean).sum() - 1
        loss = mse + self.settings.balance_coefficient * self.d_in * balance
        components = {"mse": mse, "balance": balance, "max_load": load.max(), "min_load": load.min()}
        if dead is not None:
            dead_ones = dead.view(n, self.size)
            aux_k = min(self.settings.aux_k or self.d_in // 2, self.size)
            unused = routed.pre_acts.masked_fill(~dead_ones[groups.expert + self.always_on], float("-inf"))
            again = groups.sorted_back(groups.product(keep_top(unused, aux_k), own))
            if self.always_on:
                unused = all_pre_acts.masked_fill(~dead_ones[0], float("-inf"))
                again = again + keep_top(unused, aux_k) @ directions[0]
            # as for TopK: a step without it is better than none
            aux = torch.nan_to_num(squared_error(error.detach() - again), nan=0.0, posinf=0.0)
            components["aux"] = aux
            loss = loss + self.settings.aux_coefficient * aux
        return StepResult(loss, components, decoded, active.flatten())

    def _route(self, centred: Tensor) -> Routed:
        """Sort rows [B, D] less b_dec by their experts, and let these see them."""
        probabilities = torch.softmax(centred @ self.W_router + self.b_router, dim=1)
        probability, chosen = probabilities.max(dim=1, keepdim=True)
        groups = Groups.of(chosen[:, 0], probabilities.shape[1])
        experts = self.W_enc.view(self.d_in, -1, self.size).movedim(1, 0)[self.always_on :]
        biases = self.b_enc.view(-1, self.size)[self.always_on :]
        pre_acts = groups.product(centred[groups.order], experts) + biases[groups.expert]
        return Routed(groups, probability[groups.order], pre_acts, probabilities.mean(dim=0))

    def _always_on(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S/E] pre-activations and activations of the first expert."""
        pre_acts = centred @ self.W_enc[:, : self.size] + self.b_enc[: self.size]
        return pre_acts, keep_top(pre_acts, self.settings.always_on_k)

    def router_directions(self) -> Tensor:
        """[E', D] of unit norm: what each expert is chosen for."""
        return torch.nn.functional.normalize(self.W_router.detach().T, dim=1)

    def initialise(self, seed: int, bias: Tensor | None, rows: Tensor | None = None) -> None:
        super().initialise(seed, bias, rows)
        generator = torch.Generator().manual_seed(seed ^ 1)
        drawn = torch.randn(self.W_router.shape[::-1], generator=generator)
        with torch.no_grad():
            self.W_router.copy_(torch.nn.functional.normalize(drawn, dim=1).T)
            self.b_router.zero_()

    def fold_scale(self, scale: float, scale_out: float | None = None) -> None:
        super().fold_scale(scale, scale_out)
        with torch.no_grad():
            self.W_router.mul_(scale)

    def start_from(self, other: Self, scale: float, scale_out: float | None = None) -> None:
        super().start_from(other, scale, scale_out)
        with torch.no_grad():
            self.W_router.div_(scale)


def router_cosines(switch: Switch, dense: SAE) -> Tensor:
    """[E', S] cosines of a switch dictionary's router directions and a dense one's encoder directions.

    Both take rows of the same hook point. A router direction that is an encoder direction of some feature
    sends that feature's rows to one expert.
    """
    encoder = torch.nn.functional.normalize(dense.W_enc.detach(), dim=0)
    return switch.router_directions() @ encoder
