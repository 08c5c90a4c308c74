"""A language model's files: finding the directory, digests, the tokenizer. No model is run here."""

import hashlib
import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field, field_validator

from penstock.common.errors import ModelError, nearest
from penstock.common.settings import Settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUILTIN = "builtin:"

Weights = Literal["trained", "random", "random-keep-embeddings"]
"""The model's own weights, or those of a control: drawn anew, all of them or all but the embeddings."""


class ModelSettings(Settings):
    """Which language model, and how it is run."""

    name: str = "builtin:pystd-6l"
    """A local Hugging Face directory, a hub name, or builtin:pystd-6l, which ships with us."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); the commit is what gets recorded."""
    device: str = "cpu"
    """torch device of this process: cpu, cuda, cuda:1, …"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type the model computes in. bfloat16 is slower than float32 on most CPUs."""
    attention: Literal["eager", "sdpa"] = "eager"
    """Attention kernel for capture: eager gives the bits of TransformerLens's bridge; sdpa is faster on GPUs
    and serves hook points at the edges of the model's modules only. Bits depend on it."""
    threads: int | None = Field(1, ge=1)
    """CPU threads per producer; null leaves it to torch. Bits depend on it."""
    weights: Weights = "trained"
    """trained, or a control of the same architecture: random as the architecture begins, or
    random-keep-embeddings, which keeps the tables of tokens and positions (docs/judging.md)."""
    weights_seed: int = Field(0, ge=0)
    """Seed of random weights."""

    @field_validator("weights", mode="before")
    @classmethod
    def _is_known(cls, value: object) -> object:
        known = get_args(Weights)
        if isinstance(value, str) and value not in known:
            raise ValueError(f"no weights {value!r}.{nearest(value, known)} There are {', '.join(known)}")
        return value


@dataclass(frozen=True)
class ModelFiles:
    """A model directory on this machine, and which weights are meant.

    Attributes:
        revision: the hub commit, if it came from there.
    """

    name: str
    directory: Path
    revision: str | None
    weights: Weights = "trained"
    weights_seed: int = 0

    @property
    def label(self) -> str:
        """What manifests call it: a local directory by its last part, so that moving it is harmless."""
        path = Path(self.name).expanduser()
        name = path.resolve().name if path.is_dir() else self.name
        return name if self.weights == "trained" else f"{name} ({self.weights}, seed {self.weights_seed})"

    def weights_sha256(self) -> str:
        """SHA-256 over the safetensors files in order of their names, or over the weights that are drawn."""
        if self.weights != "trained":
            from penstock.common.model.random_weights import random_weights_sha256

            return random_weights_sha256(self)
        digest = hashlib.sha256()
        for file in self.weight_files():
            with open(file, "rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def weight_files(self) -> list[Path]:
        """The weights; pickled ones are never read.

        Raises:
            ModelError: there are none.
        """
        found = sorted(self.directory.glob("*.safetensors"))
        if not found:
            raise ModelError(f"model.name: {self.name} has no safetensors weights; convert it first")
        return found


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer, its digest and its special tokens."""

    tokenizer: "Tokenizer"
    sha256: str
    special_ids: list[int]
    bos_id: int | None
    eos_id: int | None


def find_model(settings: ModelSettings) -> ModelFiles:
    """Locate a model's directory, fetching it from the hub if the name is not a local one.

    Raises:
        ModelError: neither a directory nor reachable; one line says which was tried.
    """
    found = _find(settings)
    return replace(found, weights=settings.weights, weights_seed=settings.weights_seed)


def _find(settings: ModelSettings) -> ModelFiles:
    name = settings.name
    if name.startswith(BUILTIN):
        root = Path(str(files("penstock.common.model")))
        directory = root / name.removeprefix(BUILTIN)
        if not (directory / "config.json").is_file():
            have = [f"{BUILTIN}{p.parent.name}" for p in root.glob("*/config.json")]
            raise ModelError(f"model.name: no {name}.{nearest(name, have)}")
        return ModelFiles(name, directory, None)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.name: {name} has no config.json; it is not a model directory")
        return ModelFiles(name, path, None)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise ModelError(f"model.name: {name} is not a directory; give a model directory or a hub name")
    return _fetch(name, settings.revision)


def _fetch(name: str, revision: str | None) -> ModelFiles:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"],
            etag_timeout=5,
        )
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OSError,
        ValueError,
    ) as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"model.name: {name} is neither a directory here nor reachable on the hub{at} "
            f"({type(error).__name__}); check the name, the network and the hub token"
        ) from error
    path = Path(directory)
    return ModelFiles(name, path, path.name)


def load_tokenizer(model: ModelFiles) -> LoadedTokenizer:
    """The model's fast tokenizer.

    Raises:
        ModelError: it has none.
    """
    from tokenizers import Tokenizer

    file = model.directory / "tokenizer.json"
    if file.is_file():
        text = file.read_text(encoding="utf-8")
    else:
        text = _converted_tokenizer(model)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"model.name: the tokenizer of {model.name} cannot be read: {error}") from error
    added = tokenizer.get_added_tokens_decoder()
    special = sorted(number for number, token in added.items() if token.special)
    names = _special_names(model)
    return LoadedTokenizer(
        tokenizer=tokenizer,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        special_ids=special,
        bos_id=_id_of(tokenizer, names.get("bos_token")),
        eos_id=_id_of(tokenizer, names.get("eos_token")),
    )


def _special_names(model: ModelFiles) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = model.directory / name
        if file.is_file():
            for key, value in json.loads(file.read_text(encoding="utf-8")).items():
                text = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(text, str):
                    found[key] = text
    return found


def _id_of(tokenizer: "Tokenizer", token: str | None) -> int | None:
    return None if token is None else tokenizer.token_to_id(token)


def _converted_tokenizer(model: ModelFiles) -> str:
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(model.directory, local_files_only=True)
        return str(slow.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"model.name: {model.name} has no tokenizer that can be used") from error
