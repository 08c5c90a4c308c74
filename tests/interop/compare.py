"""When two libraries' outputs count as equal. Imported in both environments: needs torch alone."""

from dataclasses import dataclass

from torch import Tensor

TOLERANCE = 1e-5
"""Largest difference, relative to the largest value of what is compared."""
MOST_TIES = 1 / 200
"""Share of rows that rounding may decide."""


@dataclass(frozen=True)
class Comparison:
    """Differences of feature activations and of reconstructions, over the rows without ties."""

    acts: float
    acts_relative: float
    reconstruction: float
    reconstruction_relative: float
    ties: int
    rows: int

    @property
    def same(self) -> bool:
        worst = max(self.acts_relative, self.reconstruction_relative)
        return worst <= TOLERANCE and self.ties <= MOST_TIES * self.rows

    def __str__(self) -> str:
        return (
            f"{self.acts:8.1e} {self.acts_relative:8.1e}   {self.reconstruction:8.1e} "
            f"{self.reconstruction_relative:8.1e}   {self.ties:3d} of {self.rows}"
            + ("" if self.same else "  DIFFERENT")
        )


HEADER = "acts abs      rel   recons abs     rel   ties"


def compare(acts: tuple[Tensor, Tensor], reconstructions: tuple[Tensor, Tensor]) -> Comparison:
    """Compare one library's outputs with another's for the same rows.

    Args:
        acts: [R, S] feature activations, of the one and of the other.
        reconstructions: [R, D], likewise.
    """
    tied = ties(*acts)
    found: list[float] = []
    for ours, theirs in (acts, reconstructions):
        assert ours.shape == theirs.shape
        largest = float(ours.abs().max())
        assert largest > 0
        # a comparison with NaN is never small enough
        difference = float((ours - theirs)[~tied].abs().max())
        found += [difference, difference / largest]
    one, one_relative, other, other_relative = found
    return Comparison(one, one_relative, other, other_relative, int(tied.sum()), len(tied))


def ties(ours: Tensor, theirs: Tensor) -> Tensor:
    """[R] rows where rounding decided whether a feature was kept.

    Where the k-th and the next pre-activation are all but equal, the last bit of a matrix product decides
    between two features: sorted activations are the same to the tolerance, but not of the same features.
    Where a pre-activation is all but equal to its threshold, it decides about one feature.
    """
    others = ((ours > 0) != (theirs > 0)).sum(dim=1)
    distance = (ours.sort(dim=1).values - theirs.sort(dim=1).values).abs().amax(dim=1)
    return (others == 1) | ((others > 0) & (distance <= TOLERANCE * ours.abs().max()))
