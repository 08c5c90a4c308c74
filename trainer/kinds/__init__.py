"""The kinds of dictionaries. A new one is a file beside this one, and its lines here."""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, get_args

from pydantic import Field

from penstock.trainer.kinds.base import Kind, SAESettings
from penstock.trainer.kinds.batchtopk import BatchTopK, BatchTopKSettings
from penstock.trainer.kinds.gated import Gated, GatedSettings
from penstock.trainer.kinds.jumprelu import JumpReLU, JumpReLUSettings
from penstock.trainer.kinds.matryoshka import Matryoshka, MatryoshkaSettings
from penstock.trainer.kinds.standard import Standard, StandardSettings
from penstock.trainer.kinds.switch import Switch, SwitchSettings
from penstock.trainer.kinds.topk import TopK, TopKSettings
from penstock.trainer.kinds.transcoder import Transcoder, TranscoderSettings


def architecture_of(kind: type[Kind]) -> str:
    """What settings call a kind."""
    (name,) = get_args(kind.Settings.model_fields["architecture"].annotation)
    return str(name)


KINDS: dict[str, type[Kind]] = {
    architecture_of(kind): kind
    for kind in (
        Standard,
        TopK,
        BatchTopK,
        Gated,
        JumpReLU,
        Matryoshka,
        Switch,
        Transcoder,
    )
}
"""Architecture -> kind."""

FROM_SAELENS: dict[str, type[Kind]] = {
    theirs: kind for kind in KINDS.values() for theirs in kind.from_saelens
}
"""SAELens architecture -> the kind that it becomes here."""

LOSS_CONVENTION = "sum-over-dims: mean_rows(sum_d (x - x_hat)^2) + coefficient * mean_rows(penalty)"

if TYPE_CHECKING:
    AnySettings = SAESettings
else:
    AnySettings = Annotated[
        reduce(or_, (kind.Settings for kind in KINDS.values())), Field(discriminator="architecture")
    ]
"""Settings of any kind, told apart by `architecture`."""

__all__ = [
    "FROM_SAELENS",
    "KINDS",
    "LOSS_CONVENTION",
    "AnySettings",
    "BatchTopKSettings",
    "GatedSettings",
    "JumpReLUSettings",
    "Kind",
    "MatryoshkaSettings",
    "SAESettings",
    "StandardSettings",
    "SwitchSettings",
    "TopKSettings",
    "TranscoderSettings",
    "architecture_of",
]
