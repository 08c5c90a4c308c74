"""The kinds of sparse autoencoders. A new kind is its settings in `trainer/kinds.py`, one module, and
the line that builds it here."""

from penstock.trainer.kinds import AnySettings, SAESettings, StandardSettings, TopKSettings
from penstock.trainer.sae.base import SAE
from penstock.trainer.sae.standard import StandardSAE
from penstock.trainer.sae.topk import TopKSAE

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
