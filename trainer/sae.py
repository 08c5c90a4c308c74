"""What every kind of sparse autoencoder has in common.

Shapes: B rows, D d_in, S d_sae. Weights follow the field's names: W_enc [D, S], b_enc [S],
W_dec [S, D], b_dec [D]. Modules work on scaled inputs x·s, where the scale s makes mean ‖x·s‖² = D over
the first window; `fold_scale` folds s away so that a trained module takes raw activations, and
`start_from` is its inverse.

Squared errors are summed over D and averaged over rows; penalties are summed over S and averaged over
rows (the convention `sum-over-dims`, recorded with every run).
"""

import math
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from penstock.common.permutation import derive_key
from penstock.trainer.kinds import KINDS
from penstock.trainer.kinds.base import SAESettings, Schedule, StepResult
from penstock.trainer.kinds.foreign import Foreign, NoSuchKind

_BLOCK = 1024


class SAE(nn.Module, ABC):
    """A sparse autoencoder with rows of W_dec as feature directions."""

    Settings: ClassVar[type[SAESettings]]
    """Settings of this kind."""
    from_saelens: tuple[str, ...] = ()
    """SAELens architectures that are imported as this kind."""
    encoder_length: float = 0.5
    """Norm of a feature's encoder at the start. With 1, the features that a row activates, which overlap, add
    up to more than the row, and the first steps go into shortening them."""
    subtracts_b_dec: bool = True
    """Whether the encoder sees x − b_dec: not where b_dec belongs to another hook point."""
    in_units_of_rows: tuple[str, ...] = ("b_enc", "b_dec")
    """Tensors that grow in proportion to the rows, where those of W_dec have unit norm."""
    encoder_vectors: tuple[str, ...] = ("b_enc",)
    """Parameters [S] of the encoder that are 0 in a feature at its start."""
    feature_axes: ClassVar[dict[str, int]] = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
    """Parameter, if there is one of that name -> which of its dimensions counts features."""
    settled: tuple[str, ...] = ()
    """Settings that the function depends on besides the weights."""
    b_enc: nn.Parameter

    def __init__(self, d_in: int, settings: Any, d_out: int | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.d_in = d_in
        self.d_out = d_in if d_out is None else d_out
        self.d_sae = d_sae = int(settings.d_sae)
        self.W_enc = nn.Parameter(torch.empty(d_in, d_sae))
        for name in self.encoder_vectors:
            self.register_parameter(name, nn.Parameter(torch.zeros(d_sae)))
        self.W_dec = nn.Parameter(torch.empty(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.folded_scale: float | None = None
        """The input scale that was folded into the weights, if it was."""

    @property
    def architecture(self) -> str:
        """The kind, as settings call it."""
        return str(self.settings.architecture)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [B, S] of activations [B, D]."""

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstructions [B, D] of feature activations [B, S]."""
        return feature_acts @ self.directions() + self.b_dec

    def reconstruct(self, x: Tensor, feature_acts: Tensor) -> Tensor:
        """Reconstructions [B, D_out] from activations [B, D] and their feature activations [B, S]."""
        return self.decode(feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions [B, D_out] of activations [B, D]."""
        return self.reconstruct(x, self.encode(x))

    @abstractmethod
    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        """Forward pass with the loss. Buffers may change; nothing may wait for the device.

        Args:
            x: [B, D] scaled rows.
            target: [B, D_out] what is to be reconstructed: the same rows, except in transcoders.
            dead: [S] bool, features that are dead; None while there are none.
        """

    @torch.no_grad()
    def after_step(self) -> None:
        """Once the optimizer has stepped: rows of W_dec get unit norm again.

        Otherwise they would grow, as their gradient is at right angles to them, and turn ever more slowly.
        """
        self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp(min=1e-12))

    def pre_acts(self, x: Tensor) -> Tensor:
        """(x − b_dec) W_enc + b_enc [B, S], or what `seen` says in place of x − b_dec."""
        if not self.subtracts_b_dec:
            return torch.addmm(self.b_enc, self.seen(x), self.encoder())
        if not torch.is_grad_enabled():
            return (x - self.b_dec) @ self.encoder() + self.b_enc
        centred, bias = self.centred(x)
        return torch.addmm(bias, centred, self.encoder())

    def centred(self, x: Tensor, bias: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
        """x − b_dec [B, D] without gradient, and a bias [S] (b_enc by default) with the gradient of b_dec.

        The pre-activations are the same, but b_dec gets its gradient through a vector: through x − b_dec
        autograd would multiply a [B, S] by a [S, D] matrix only to sum the rows of the product.
        """
        fixed = self.b_dec.detach()
        shift = (fixed - self.b_dec) @ self.encoder().detach()
        return x - fixed, (self.b_enc if bias is None else bias) + shift

    def encoder(self) -> Tensor:
        """[D, S] what rows are multiplied by."""
        return self.W_enc

    def directions(self) -> Tensor:
        """[S, D] decoder rows of unit norm (of norm 1/scale once the scale is folded)."""
        if self.folded_scale is not None:
            return self.W_dec
        norms: Tensor = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        return self.W_dec / norms

    @torch.no_grad()
    def note_mean(self, mean: Tensor) -> None:
        """Told first, before anything starts: mean [D] of the scaled rows of the first window."""

    def seen(self, x: Tensor) -> Tensor:
        """[B, D] what the encoder multiplies, of scaled rows."""
        return x - self.b_dec if self.subtracts_b_dec else x

    @torch.no_grad()
    def initialise(self, seed: int, bias: Tensor | None, rows: Tensor | None = None) -> None:
        """Decoder rows as the settings say, scaled to unit norm; encoder their transpose, shorter.

        Drawn on the CPU, so that every device starts from the same weights.

        Args:
            bias: [D_out] what b_dec starts at; None means zero.
            rows: [R, D] scaled rows of the first window, for `initialisation: data`.
        """
        self.b_dec.zero_()
        if bias is not None:
            self.b_dec.copy_(bias)
        generator = torch.Generator().manual_seed(seed)
        shape, way = (self.d_sae, self.d_in), self.settings.initialisation
        drawn = torch.randn(shape, generator=generator)
        if way == "orthogonal":
            nn.init.orthogonal_(drawn, generator=generator)
        elif way == "kaiming":
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        elif way == "data" and rows is not None:
            chosen = torch.randperm(len(rows), generator=generator)[: self.d_sae]
            picked = self.seen(rows[chosen].to(self.b_dec.device)).cpu()
            # a row of nothing, as sparse data has some, has no direction: that feature keeps a random one
            drawn[: len(chosen)] = torch.where(picked.any(dim=1, keepdim=True), picked, drawn[: len(chosen)])
        norms = drawn.norm(dim=1, keepdim=True)
        drawn /= torch.where(norms > 0, norms, 1.0)
        self._start_encoder(drawn)
        for name in self.encoder_vectors:
            self.get_parameter(name).zero_()
        self._start_decoder(drawn, generator)

    def _start_encoder(self, directions: Tensor) -> None:
        """Set W_enc. directions: [S, D] of unit norm."""
        self.W_enc.copy_(self.encoder_length * directions.T)

    def _start_decoder(self, directions: Tensor, generator: torch.Generator) -> None:
        """Set W_dec. directions: [S, D] of unit norm, the encoder's."""
        self.W_dec.copy_(directions)

    @torch.no_grad()
    def reset_features(self, features: Tensor, rows: Tensor, targets: Tensor) -> None:
        """Give some features the directions of rows (Bricken et al. 2023, "Towards Monosemanticity").

        Args:
            features: [n] their numbers.
            rows: [n, D] scaled rows, one for each.
            targets: [n, D_out] what is to be reconstructed of them.
        """
        self.W_dec[features] = nn.functional.normalize(targets - self.b_dec, dim=1)
        self._reset_encoder(features, nn.functional.normalize(self.seen(rows), dim=1))
        for name in self.encoder_vectors:
            self.get_parameter(name)[features] = 0.0

    def _reset_encoder(self, features: Tensor, directions: Tensor) -> None:
        """Set columns of W_enc. directions: [n, D] of unit norm."""
        alive = torch.ones(self.d_sae, dtype=torch.bool, device=self.W_enc.device)
        alive[features] = False
        norms = torch.linalg.vector_norm(self.W_enc, dim=0)
        # far below the others': a new feature should not take over at once
        length = 0.2 * (norms * alive).sum() / alive.sum().clamp(min=1)
        self.W_enc[:, features] = directions.T * length / _overlaps(directions)

    def noise(self, like: Tensor, schedule: Schedule) -> Tensor:
        """Standard normal noise in the shape of a tensor: the same at the same step of any training."""
        seed = derive_key(self.settings.seed, "noise", schedule.step) >> 1
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    @torch.no_grad()
    def fold_scale(self, scale: float, scale_out: float | None = None) -> None:
        """Make a module trained on x·scale take raw x: W_enc·s, W_dec of unit norm / s, b_dec / s.

        Feature activations keep their value.

        Args:
            scale_out: of the target, if that is another hook point.
        """
        out = scale if scale_out is None else scale_out
        folded = self.directions() / out
        self.folded_scale = out
        self.W_enc.mul_(scale)
        self.W_dec.copy_(folded)
        self.b_dec.div_(out)

    @torch.no_grad()
    def normalise_decoder(self) -> Self:
        """Give the rows of W_dec unit norm without changing reconstructions; for modules that take raw rows.

        A row's norm goes into its feature's encoder, so that feature activations are measured in the units
        of the rows. That is exact where a feature's activation grows in proportion to its pre-activation.

        Raises:
            ValueError: this kind cannot represent the same function so.
        """
        assert self.folded_scale is not None
        W_dec = self.W_dec.double()
        norms = torch.linalg.vector_norm(W_dec, dim=1)
        if (norms == 0).any():
            feature = int((norms == 0).nonzero()[0])
            raise ValueError(f"feature {feature} has a decoder row of norm 0, which has no direction")
        self._scale_features(norms)
        self.W_dec.copy_(W_dec / norms[:, None])
        self.folded_scale = 1.0
        return self

    @torch.no_grad()
    def _scale_features(self, factors: Tensor) -> None:
        """Multiply feature activations by factors [S] > 0, in the encoder; W_dec stays as it is."""
        for name in ("W_enc", *(set(self.encoder_vectors) & set(self.in_units_of_rows))):
            tensor = self.get_parameter(name)
            tensor.copy_(tensor.double() * factors)

    @torch.no_grad()
    def start_from(self, other: Self, scale: float, scale_out: float | None = None) -> None:
        """Become another module of the same kind, so that training on x·scale starts at its function.

        Args:
            other: takes raw rows; rows of its W_dec have unit norm.
            scale: the run's input scale s. Feature activations are s times those of `other`.
            scale_out: of the target, if that is another hook point.
        """
        there = other.state_dict()
        for name, tensor in self.state_dict().items():
            tensor.copy_(there[name])
            if name in self.in_units_of_rows:
                tensor.mul_(scale)

    def to_saelens(self) -> Foreign:
        """This dictionary as SAELens has it.

        Raises:
            NoSuchKind
        """
        raise NoSuchKind(self.architecture, "SAELens")

    def to_dictionary_learning(self) -> Foreign:
        """This dictionary as dictionary_learning has it.

        Raises:
            NoSuchKind
        """
        raise NoSuchKind(self.architecture, "dictionary_learning")

    def to_sparsify(self) -> Foreign:
        """This dictionary as sparsify has it.

        Raises:
            NoSuchKind
        """
        raise NoSuchKind(self.architecture, "sparsify")

    @classmethod
    def settings_from_saelens(cls, fields: dict[str, object]) -> dict[str, object]:
        """Settings of this kind, besides name, hook point and d_sae, of a SAELens dictionary.

        Args:
            fields: of its cfg.json.
        """
        return {}

    def adopt_saelens(self, source: Foreign) -> None:
        """Take the weights of a SAELens dictionary, which subtracts b_dec from its input.

        Args:
            source: its tensors have been checked to be those that `to_saelens` gives, in their shapes.
        """
        self.load_state_dict(source.tensors)

    @staticmethod
    def centre(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encoder biases of a dictionary that does not subtract b_dec, to be used in one that does."""
        b_enc, b_dec, W_enc = (tensors[name].double() for name in ("b_enc", "b_dec", "W_enc"))
        return {"b_enc": (b_enc + b_dec @ W_enc).float()}


def _overlaps(directions: Tensor) -> Tensor:
    """[n] Σ_j max(0, cos(i, j)): among how many features a row in this direction is shared out.

    Rows that are reconstructed badly are often alike. Features that all begin with the same one would add up
    to many times that row.

    Args:
        directions: [n, D] of unit norm.
    """
    shared = [torch.relu(part @ directions.T).sum(dim=1) for part in torch.split(directions, _BLOCK)]
    return torch.cat(shared).clamp(min=1)


def build(d_in: int, settings: SAESettings, d_out: int | None = None) -> SAE:
    """An uninitialised module of the kind that the settings are of; d_out is d_in unless given."""
    if settings.architecture not in KINDS:
        raise TypeError(f"no SAE for {type(settings).__name__}")
    return module_of(settings.architecture)(d_in, settings, d_out)


@cache
def module_of(architecture: str) -> type[SAE]:
    """The module class of a kind."""
    kind = KINDS[architecture]
    return type(kind.__name__, (kind, SAE), {"__doc__": kind.__doc__})
