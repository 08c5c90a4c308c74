"""SAELens 6 dictionaries read: `load_saelens` for evaluation; `read_saelens` and `assemble` for training on.

Read strictly and from safetensors only; a pickle is never opened.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from penstock.common.errors import UserError, nearest
from penstock.common.settings import Settings, load_yaml, one_line, parse
from penstock.trainer.exchange.names import CONFIG, WEIGHTS
from penstock.trainer.kinds import FROM_SAELENS, AnySettings, architecture_of
from penstock.trainer.kinds.foreign import Foreign
from penstock.trainer.sae import SAE, build, module_of

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types whose values float32 holds exactly."""


@dataclass(frozen=True)
class Source:
    """A SAELens dictionary as its files have it.

    Attributes:
        fields: cfg.json without what says nothing about the function: metadata and device.
        weights: bytes of the weights file.
        name, hook_name, hook_out: what its metadata says, or stand-ins.
    """

    fields: dict[str, Any]
    weights: bytes
    name: str
    hook_name: str
    hook_out: str = "unknown"


def load_saelens(directory: str | Path) -> SAE:
    """A SAELens 6 dictionary on disk, taking raw activations.

    Args:
        directory: with cfg.json and sae_weights.safetensors.

    Returns:
        A module as `load_sae` gives it, computing in float32. Its settings for training are stand-ins.

    Raises:
        UserError: not such a dictionary, or one that cannot be represented here.
    """
    source = read_saelens(directory)
    told = (source.name, source.hook_name, source.hook_out)
    return assemble(source.fields, source.weights, str(directory), *told)


def read_saelens(directory: str | Path) -> Source:
    """Read the files of a SAELens dictionary.

    Raises:
        UserError: they are not there, or of a version before 6.
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        raise UserError(f"{directory}: no such directory; give that of a SAELens dictionary")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{directory}: no {CONFIG}; this is not a SAELens dictionary")
    data = load_yaml(folder / CONFIG)
    metadata = data.pop("metadata", None)
    metadata = metadata if isinstance(metadata, dict) else {}
    data.pop("device", None)
    version = str(metadata.get("sae_lens_version"))
    if not re.match(r"0*[1-9]\d+\.|0*[6-9]\.", version):
        raise UserError(
            f"{directory}/{CONFIG}: not of SAELens 6 or newer (metadata.sae_lens_version is "
            f"{one_line(version, 30)}); load and save it with SAELens 6"
        )
    own = metadata.get("penstock")
    name = own.get("sae") if isinstance(own, dict) else None
    hooks = [metadata.get(key) for key in ("hook_name", "hook_name_out")]
    hook_name, hook_out = (hook if isinstance(hook, str) else "unknown" for hook in hooks)
    return Source(
        fields=data,
        weights=_read_weights(folder, str(directory)),
        name=_as_name(name if isinstance(name, str) else folder.resolve().name),
        hook_name=hook_name,
        hook_out=hook_out,
    )


def _read_weights(folder: Path, directory: str) -> bytes:
    try:
        return (folder / WEIGHTS).read_bytes()
    except FileNotFoundError as error:
        pickles = [file.name for end in ("*.pt", "*.pth", "*.bin", "*.pkl") for file in folder.glob(end)]
        hint = f"{pickles[0]} is a pickle, which is never read; save it as safetensors" if pickles else ""
        raise UserError(f"{directory}: no {WEIGHTS}; {hint or 'this is not a SAELens dictionary'}") from error
    except OSError as error:
        raise UserError(f"{directory}/{WEIGHTS} cannot be read: {error.strerror or error}") from error


def _as_name(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")
    return name or "imported"


class _Config(BaseModel):
    """What every kind of SAELens dictionary has in its cfg.json."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    architecture: str
    d_in: PositiveInt
    d_sae: PositiveInt
    d_out: PositiveInt | None = None
    dtype: str = "float32"
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"


class _Own(Settings):
    """Settings of any kind here."""

    imported: AnySettings


def assemble(
    fields: dict[str, Any],
    weights: bytes,
    where: str,
    name: str = "imported",
    hook_name: str = "unknown",
    hook_out: str = "unknown",
) -> SAE:
    """The module of a SAELens dictionary, taking raw activations.

    Args:
        fields, weights: as `Source` has them.
        where: for messages.

    Raises:
        UserError: it cannot be represented here.
    """
    config = parse(_Config, fields, f"{where}/{CONFIG}")
    kind = FROM_SAELENS.get(config.architecture)
    if kind is None:
        raise UserError(
            f"{where}/{CONFIG}: architecture {one_line(config.architecture, 60)!r} cannot be imported."
            f"{nearest(config.architecture, FROM_SAELENS)} Can be: {', '.join(FROM_SAELENS)}."
        )
    _check_config(config, where)
    settings: dict[str, object] = {
        "name": name,
        "hook_name": hook_name,
        "architecture": architecture_of(kind),
        "d_sae": config.d_sae,
    } | module_of(architecture_of(kind)).settings_from_saelens(fields)
    if "hook_out" in kind.Settings.model_fields:
        settings["hook_out"] = hook_out
    own = parse(_Own, {"imported": settings}, f"{where}/{CONFIG}").imported
    sae = build(config.d_in, own, config.d_out if len(own.hooks) > 1 else None)
    k = getattr(sae.settings, "k", None) or 0
    if k > config.d_sae:
        raise UserError(f"{where}/{CONFIG}: k is {k}, more than its d_sae of {config.d_sae}")
    sae.folded_scale = 1.0
    if not sae.subtracts_b_dec:
        _check_uncentred(config, where)
    tensors = _parse_weights(weights, f"{where}/{WEIGHTS}")
    _check_tensors(tensors, sae.to_saelens().tensors, f"{where}/{WEIGHTS}")
    tensors = {name: tensor.to(_type_of(config.dtype)).float() for name, tensor in tensors.items()}
    if sae.subtracts_b_dec and not config.apply_b_dec_to_input:
        tensors |= sae.centre(tensors)
    try:
        sae.adopt_saelens(Foreign(config.architecture, fields, tensors))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return sae.eval().requires_grad_(False)


def _check_config(config: _Config, where: str) -> None:
    if config.normalize_activations != "none":
        raise UserError(
            f"{where}/{CONFIG}: normalize_activations is {one_line(config.normalize_activations, 60)}: its "
            "inputs are not raw activations; fold the normalisation into the weights with SAELens first"
        )
    if config.reshape_activations not in ("none", "hook_z"):
        reshape = one_line(config.reshape_activations, 60)
        raise UserError(f"{where}/{CONFIG}: reshape_activations {reshape} is not known here")
    if _type_of(config.dtype) is None:
        raise UserError(
            f"{where}/{CONFIG}: dtype {one_line(config.dtype, 60)} cannot be imported exactly; can be: "
            f"{', '.join(TYPES)}"
        )


def _type_of(name: str) -> torch.dtype | None:
    return TYPES.get(name.removeprefix("torch."))


def _parse_weights(data: bytes, where: str) -> dict[str, Tensor]:
    if data[:2] == b"PK" or data[:1] == b"\x80":
        raise UserError(f"{where} is a pickle, which is never read; save it as safetensors")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{where} is not a safetensors file: {one_line(str(error), 100)}") from error
    return tensors


def _check_tensors(tensors: dict[str, Tensor], wanted: dict[str, Tensor], where: str) -> None:
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise UserError(f"{where}: holds {one_line(', '.join(extra), 100)}, which its kind does not have")
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise UserError(f"{where}: {', '.join(missing)} is missing")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            shape, right = list(tensor.shape), list(wanted[name].shape)
            raise UserError(f"{where}: {name} has shape {shape}, but its {CONFIG} says {right}")
        if tensor.dtype not in TYPES.values():
            raise UserError(f"{where}: {name} is {tensor.dtype}; save it as {', '.join(TYPES)}")
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {name} holds values that are not finite")


def _check_uncentred(config: _Config, where: str) -> None:
    if config.apply_b_dec_to_input:
        raise UserError(
            f"{where}/{CONFIG}: apply_b_dec_to_input: true does not go with {config.architecture}: its b_dec "
            "belongs to its output"
        )
    if config.d_out is None:
        raise UserError(f"{where}/{CONFIG}: d_out is missing")
