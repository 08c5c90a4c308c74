"""A model with random weights: the control that anything found in a trained one has to beat.

Every parameter begins as transformers begins it for that architecture: the scheme is the model's own, only
the random numbers are ours. A module's come from NumPy's generator, keyed by the seed and the module's name,
on the CPU and in float32, so that neither torch's kernels nor the device nor the type that the model computes
in has a say.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.common.errors import ModelError
from penstock.common.model.files import ModelFiles
from penstock.common.model.offline import quiet_transformers
from penstock.common.permutation import derive_key

_BUILDING = "building"
"""What draws are keyed by while the model is built; the model's own scheme then draws by module."""


def random_model(files: ModelFiles) -> Any:
    """The architecture of a model directory with the weights that `files.weights` asks for.

    Returns:
        A transformers model on the CPU, in float32, for inference.

    Raises:
        ModelError: transformers cannot build it, or draws in a way that cannot be repeated.
    """
    quiet_transformers()
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            files.directory, local_files_only=True, attn_implementation="eager"
        )
        made = getattr(transformers, (config.architectures or ["?"])[0], None)
        if made is None:
            raise ModelError(
                f"model.weights: {files.name} names no architecture of transformers in its config.json; "
                "only trained weights can be had of it"
            )
        model = _drawn(made, config, files)
        if files.weights == "random-keep-embeddings":
            trained = made.from_pretrained(files.directory, local_files_only=True, dtype=torch.float32)
            _keep_embeddings(model, trained)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"model.name: {files.name} cannot be built: {first}") from error
    return model.eval()


def random_weights_sha256(files: ModelFiles) -> str:
    """SHA-256 over the weights as they are drawn: names, shapes and float32 values."""
    return _digest(files.directory, files)


@cache
def _digest(directory: Path, files: ModelFiles) -> str:
    weights: Mapping[str, Tensor] = random_model(files).state_dict()
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().contiguous().numpy()
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(values.data)
    return digest.hexdigest()


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random draws made inside come from NumPy, by the key that is set."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self.use(_BUILDING)

    def use(self, *purpose: str) -> None:
        """Begin the stream of a purpose."""
        key = derive_key(self._seed, "weights", *purpose)
        self._random = np.random.Generator(np.random.PCG64(key))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        draw = {
            torch.ops.aten.normal_.default: self._normal,
            torch.ops.aten.uniform_.default: self._uniform,
        }.get(func)
        if draw is None:
            raise ModelError(f"model.weights: this model begins with draws of {func}; only trained is known")
        return draw(*args, **{key: value for key, value in kwargs.items() if key != "generator"})

    def _normal(self, tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return self._fill(tensor, lambda n: self._random.standard_normal(n) * std + mean)

    def _uniform(self, tensor: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self._fill(tensor, lambda n: self._random.random(n) * (high - low) + low)

    def _fill(self, tensor: Tensor, values: Callable[[int], Any]) -> Tensor:
        drawn = torch.from_numpy(values(tensor.numel()).astype(np.float32)).view(tensor.shape)
        return tensor.copy_(drawn)


def _drawn(made: Any, config: Any, files: ModelFiles) -> Any:
    draws = _Draws(files.weights_seed)
    with torch.no_grad(), draws:
        model = made(config).float()
        for name, module, owner in _in_order(model, model, ""):
            draws.use(name)
            owner._init_weights(module)
        model.tie_weights()
    return model


def _in_order(module: nn.Module, owner: Any, name: str) -> Iterator[tuple[str, nn.Module, Any]]:
    """Modules, children first, with the (sub-)model whose scheme is theirs: the order of transformers."""
    for part, child in module.named_children():
        own = child if hasattr(child, "_init_weights") else owner
        yield from _in_order(child, own, f"{name}.{part}" if name else part)
    yield name, module, owner


def _keep_embeddings(model: nn.Module, trained: nn.Module) -> None:
    """Tables of tokens and positions as trained; an unembedding that is tied to one follows it."""
    theirs = dict(trained.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.copy_(cast(nn.Embedding, theirs[name]).weight)
