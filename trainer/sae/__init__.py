"""The kinds of sparse autoencoders. A new kind is one module and one line here."""

from typing import Annotated

from pydantic import Field

from penstock.trainer.sae.base import SAE, SAESettings
from penstock.trainer.sae.standard import StandardSAE, StandardSettings
from penstock.trainer.sae.topk import TopKSAE, TopKSettings

AnySettings = Annotated[StandardSettings | TopKSettings, Field(discriminator="architecture")]

FROM_SAELENS: dict[str, type[SAE]] = {"standard": StandardSAE, "topk": TopKSAE}
"""SAELens architecture -> the kind that it becomes here."""


def build(d_in: int, settings: SAESettings) -> SAE:
    """An uninitialised module of the kind that the settings are of."""
    if isinstance(settings, StandardSettings):
        return StandardSAE(d_in, settings)
    if isinstance(settings, TopKSettings):
        return TopKSAE(d_in, settings)
    raise TypeError(f"no SAE for {type(settings).__name__}")


__all__ = ["FROM_SAELENS", "SAE", "AnySettings", "SAESettings", "StandardSettings", "TopKSettings", "build"]
