"""Toy data: rows that are sparse sums of known features, as in the interim report "Taking features out of
superposition with sparse autoencoders".

    x = Σ_i active_i · u_i · scale_i · feature_i,   active_i ~ Bernoulli(p_i),   u_i ~ U(0, 1)

Features are unit vectors, uniform on the sphere. Their probabilities are correlated and decay:
z ~ N(0, Σ), q_i = Φ(z_i) λ^i, p = q rescaled to the mean active / features, and none above 1. Σ is a random
covariance A Aᵀ of normal A, *normalised to a diagonal of ones*; without that Φ(z_i) would not be uniform.

Sequence n of a dataset is a function of (settings, n) alone: every draw has a key of its own, derived
from the seed, what it is for and n. Uniform numbers are counter hashes (`common/permutation.py`), normal ones
come from NumPy's generator. Sums over features are elementwise and in a fixed order, and the one matrix
product has operands of so few bits that it is exact: no instruction set and no number of threads changes a
bit.
"""

import math
from functools import cached_property
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from penstock.common.permutation import counter_hash, derive_key
from penstock.common.settings import Settings
from penstock.store.truth import Truth

READ, TARGET = "toy", "toy.target"
"""Hook points: what a dictionary reads, and what it is to give. They differ by their noises alone."""

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]

_BITS = 20
"""Binary places of the factors of z. Sums of their products are multiples of 2⁻⁴⁰ and, whatever the order, no
larger than the factors' norm: float64 holds them exactly up to 2¹³."""


class ToySettings(Settings):
    """Toy data with a known ground truth. Harder options are off at 0 and then change no bit."""

    d_in: int = Field(256, ge=2, le=65536)
    """Dimensions of a row."""
    features: int = Field(512, ge=1, le=8192)
    """Ground-truth features (G)."""
    active: float = Field(5.0, gt=0)
    """Features active in a row, on average (k)."""
    decay: float = Field(0.99, gt=0, le=1)
    """λ: feature i is λ^i times as likely as it would be."""
    draw: Literal["dataset", "batch", "row"] = "dataset"
    """How often probabilities are drawn: once, for each rows_per_sequence rows, or for each row."""
    rows_per_sequence: int = Field(256, ge=1, le=65536)
    """Rows that are made together; with `draw: batch`, those that share their probabilities."""
    seed: int = 0
    """Seed of everything. Another seed is another ground truth."""
    direction_jitter: float = Field(0.0, ge=0)
    """Length of normal noise on a feature's direction, anew whenever it is active; its norm stays 1."""
    input_noise: float = Field(0.0, ge=0)
    """Standard deviation per dimension of normal noise on the rows of `toy`, which dictionaries read."""
    label_noise: float = Field(0.0, ge=0)
    """Standard deviation per dimension of normal noise on the rows of `toy.target`."""
    strictly_positive: bool = False
    """Features have positive entries only."""
    extra_features: int = Field(0, ge=0, le=8192)
    """More superposition: features beyond `features`, as likely on average, so that more are active, too."""
    correlation_factors: int = Field(0, ge=0, le=8192)
    """Other correlation: z depends on this many shared factors, on few strongly. 0: as many as features."""
    power_decay: float = Field(0.0, ge=0)
    """Other decay: feature i is (i + 1)^−this times as likely, on top of λ^i."""
    scale_spread: float = Field(0.0, ge=0)
    """Unequal feature scales: standard deviation of their logarithm."""

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        if self.active > self.features:
            raise ValueError(
                f"active: {self.active:g} of {self.features} features cannot be active on average"
            )
        if 4 * self.total_features * self.d_in >= 60 * 2**20:
            raise ValueError(
                f"features: {self.total_features} in {self.d_in} dimensions take more than 60 MiB; lower them"
            )
        return self

    @property
    def total_features(self) -> int:
        return self.features + self.extra_features

    def record(self) -> dict[str, object]:
        """As JSON, without what is off: options to come must not change what there is."""
        dumped = self.model_dump(mode="json")
        return {name: value for name, value in dumped.items() if name in _ALWAYS or value}


_ALWAYS = ("d_in", "features", "active", "decay", "draw", "rows_per_sequence", "seed")


class Toy:
    """The ground truth that settings stand for, and the rows that are made of it."""

    def __init__(self, settings: ToySettings) -> None:
        self.settings = settings

    @cached_property
    def truth(self) -> Truth:
        """Where probabilities are drawn again and again, those of the truth are what they are on average
        (Φ(z) is ½ on average)."""
        count = self.settings.total_features
        if self.settings.draw == "dataset":
            q = self._likelihoods(
                self._factors(self._normal("probabilities").standard_normal(self._n_factors))
            )
        else:
            q = np.full(count, 0.5) * self._decays
        return Truth(
            features=self._features(),
            probabilities=rescaled(q[None], self.settings.active * count / self.settings.features)[0],
            scales=self._scales(),
            settings=self.settings.record(),
        )

    def rows(self, sequence: int, held_out: bool = False) -> dict[str, Rows]:
        """Hook point -> [rows_per_sequence, d_in] of one sequence.

        Args:
            held_out: of the sequences that no dataset holds.
        """
        split = "held-out" if held_out else "rows"
        clean = self._clean(split, sequence)
        settings, given = self.settings, {READ: clean, TARGET: clean}
        for hook, noise in ((READ, settings.input_noise), (TARGET, settings.label_noise)):
            if noise:
                drawn = self._normal(split, sequence, hook).standard_normal(clean.shape)
                given[hook] = clean + (noise * drawn).astype(np.float32)
        return given

    def coefficients(
        self, split: str, sequence: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
        """(row, feature, value) of whatever is active in a sequence, in order of row, then of feature."""
        rows, count = self.settings.rows_per_sequence, self.settings.total_features
        p = self._probabilities(split, sequence)
        drawn = counter_hash(self._key(split, sequence, "coefficients"), rows * count).reshape(rows, count)
        drawn >>= np.uint64(11)  # as many bits as a float64 has
        row, feature = np.nonzero(drawn < np.ceil(p * 2.0**53).astype(np.uint64))
        # given that u < p, u/p is uniform again: one number decides whether and how much
        likely = p[0, feature] if len(p) == 1 else p[row, feature]
        uniform = drawn[row, feature].astype(np.float64) * 2.0**-53 / likely
        return row, feature, uniform * self.truth.scales[feature]

    def _clean(self, split: str, sequence: int) -> Rows:
        row, feature, value = self.coefficients(split, sequence)
        directions = self.truth.features
        which = feature
        if self.settings.direction_jitter:
            directions = self._jittered(split, sequence, feature)
            which = np.arange(len(feature))
        out = np.zeros((self.settings.rows_per_sequence, self.settings.d_in), np.float32)
        counts = np.bincount(row, minlength=len(out))
        first = np.cumsum(counts) - counts
        strength = value.astype(np.float32)[:, None]
        for rank in range(int(counts.max(initial=0))):
            there = np.flatnonzero(counts > rank)
            entry = first[there] + rank
            out[there] += strength[entry] * directions[which[entry]]
        return out

    def _jittered(self, split: str, sequence: int, feature: npt.NDArray[np.int64]) -> Rows:
        """[active, d_in] the direction of each occurrence of a feature."""
        drawn = self._normal(split, sequence, "jitter").standard_normal((len(feature), self.settings.d_in))
        moved = drawn * (self.settings.direction_jitter / math.sqrt(self.settings.d_in))
        return _unit(self.truth.features[feature] + moved).astype(np.float32)

    def _features(self) -> Rows:
        """[G, d_in]: those of the base data first."""
        s = self.settings
        drawn = [self._normal("features").standard_normal((s.features, s.d_in))]
        if s.extra_features:
            drawn.append(self._normal("extra features").standard_normal((s.extra_features, s.d_in)))
        features = np.concatenate(drawn)
        return _unit(np.abs(features) if s.strictly_positive else features).astype(np.float32)

    def _scales(self) -> Floats:
        count, spread = self.settings.total_features, self.settings.scale_spread
        if not spread:
            return np.ones(count)
        return np.array([math.exp(spread * n) for n in self._normal("scales").standard_normal(count)])

    def _probabilities(self, split: str, sequence: int) -> Floats:
        """[1 or rows, G] of a sequence."""
        s = self.settings
        if s.draw == "dataset":
            return self.truth.probabilities[None]
        times = 1 if s.draw == "batch" else s.rows_per_sequence
        drawn = self._normal(split, sequence, "probabilities").standard_normal((times, self._n_factors))
        q = self._likelihoods(self._factors(drawn))
        return rescaled(q, s.active * s.total_features / s.features)

    @property
    def _n_factors(self) -> int:
        return self.settings.correlation_factors or self.settings.total_features

    @cached_property
    def _loadings(self) -> Floats:
        """[G, factors]: z of unit variance is this times independent normal factors."""
        shape = (self.settings.total_features, self._n_factors)
        return _rounded(_unit(self._normal("covariance").standard_normal(shape)), _BITS)

    def _factors(self, drawn: Floats) -> Floats:
        """z [..., G] of independent normal factors [..., F]. Exact, see `_BITS`."""
        return np.asarray(_rounded(drawn, _BITS) @ self._loadings.T)

    @cached_property
    def _decays(self) -> Floats:
        count, s = self.settings.total_features, self.settings
        decays = np.cumprod(np.concatenate([[1.0], np.full(count - 1, s.decay)]))
        if s.power_decay:
            decays = decays * np.array([(i + 1) ** -s.power_decay for i in range(count)])
        return np.asarray(decays)

    def _likelihoods(self, z: Floats) -> Floats:
        """Φ(z) λ^i [..., G]."""
        erf = np.array([math.erf(value) for value in (z / math.sqrt(2)).ravel().tolist()]).reshape(z.shape)
        # C libraries differ in the last bits of erf
        return np.asarray(_rounded((1 + erf) / 2, 30) * self._decays)

    def _key(self, *purpose: str | int) -> int:
        return derive_key(self.settings.seed, "toy", *purpose)

    def _normal(self, *purpose: str | int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(self._key(*purpose)))


def rescaled(q: Floats, total: float) -> Floats:
    """[n, G] likelihoods ≥ 0 in proportion, so that each row sums to `total` and none is above 1.

    What would be above 1 is 1, and the others make up for it.
    """
    p: Floats = q * (total / q.sum(axis=1, keepdims=True))
    for row in np.flatnonzero((p > 1).any(axis=1)):
        certain = p[row] >= 1
        while True:
            left = q[row] * ~certain
            spread = left * ((total - certain.sum()) / left.sum()) if left.any() else left
            p[row] = np.where(certain, 1.0, spread)
            if not (p[row] > 1).any():
                break
            certain = p[row] >= 1
    return p


def _unit(vectors: Floats) -> Floats:
    norms = np.sqrt((vectors * vectors).sum(axis=-1, keepdims=True))
    return np.asarray(vectors / norms)


def _rounded(values: Floats, places: int) -> Floats:
    return np.asarray(np.rint(values * 2.0**places) * 2.0**-places)
