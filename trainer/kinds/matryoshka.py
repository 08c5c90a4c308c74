"""Matryoshka autoencoder (Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse
autoencoders"): BatchTopK, whose first features must do without the later ones.

    f as BatchTopK has it,   x̂_m = f[: m] W_dec[: m] + b_dec   for each prefix of m features
    loss = mean_m mean_rows Σ_d (x − x̂_m)² + aux_coefficient · aux

The last prefix is the whole dictionary; `mse` and aux are of that one. Everything after training is as for
BatchTopK: any prefix of the features is a dictionary, too.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from penstock.trainer.kinds.auxk import auxiliary_loss
from penstock.trainer.kinds.base import Schedule, StepResult, squared_error, torch
from penstock.trainer.kinds.batchtopk import BatchTopK, BatchTopKSettings
from penstock.trainer.kinds.foreign import Foreign, by_input, plain

if TYPE_CHECKING:
    from torch import Tensor


class MatryoshkaSettings(BatchTopKSettings):
    """Nested BatchTopK dictionaries."""

    architecture: Literal["matryoshka"]  # type: ignore[assignment]
    """Kind of autoencoder."""
    prefixes: list[float] = Field([1 / 32, 3 / 32, 7 / 32, 15 / 32], min_length=1)
    """Nested dictionaries, small to large, as shares of d_sae, or as numbers of features if above 1; the
    whole one is always the last."""

    @model_validator(mode="after")
    def _nested(self) -> Self:
        sizes = self.prefix_sizes
        if sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"prefixes: {sizes} features do not grow from 1 to d_sae")
        return self

    @property
    def prefix_sizes(self) -> list[int]:
        """Features of each prefix; the last is d_sae."""
        sizes = [round(p * self.d_sae) if p <= 1 else round(p) for p in self.prefixes]
        return sizes if sizes[-1] == self.d_sae else [*sizes, self.d_sae]


class Matryoshka(BatchTopK):
    """See the module."""

    Settings = MatryoshkaSettings  # type: ignore[assignment]
    settings: MatryoshkaSettings

    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        from penstock.trainer.sparse import PreActs

        centred, bias = self.centred(x)
        pre_acts = PreActs.of(centred, self.W_enc, bias)
        k = self.settings.kept(self.settings.k, min(self.d_in, self.d_sae), schedule)
        acts = pre_acts.top_of_batch(k)
        self.follow(acts.smallest())
        directions, sizes = self.directions(), self.settings.prefix_sizes
        widths = [end - begin for begin, end in pairwise([0, *sizes])]
        reconstruction, losses = self.b_dec.expand_as(target), []
        for part, rows in zip(acts.split(widths), torch.split(directions, widths), strict=True):
            reconstruction = reconstruction + part.decode(rows)
            error = target - reconstruction
            losses.append(squared_error(error))
        nested = torch.stack(losses).mean()
        components = {"mse": losses[-1], "nested": nested}
        loss = nested
        if dead is not None:
            components["aux"] = auxiliary_loss(self, pre_acts, dead, error, directions)
            loss = loss + self.settings.aux_coefficient * components["aux"]
        return StepResult(loss, components, reconstruction, acts.active())

    def to_dictionary_learning(self) -> Foreign:
        sizes = self.settings.prefix_sizes
        widths = [end - begin for begin, end in pairwise([0, *sizes])]
        tensors = by_input(self) | {
            "k": torch.tensor(self.settings.k, dtype=torch.int32),
            "threshold": plain(self.threshold),
            "group_sizes": torch.tensor(widths),
        }
        return Foreign("MatryoshkaBatchTopKSAE", {"k": self.settings.k}, tensors)
