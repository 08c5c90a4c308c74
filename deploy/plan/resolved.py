"""What a plan is made from: a config, and what it was resolved to."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch

from penstock.common.device import open_device
from penstock.common.model.language_model import LanguageModel
from penstock.deploy.config import Config
from penstock.store.corpus import Corpus
from penstock.store.manifest import Manifest
from penstock.trainer.config import RunConfig


@dataclass(frozen=True)
class Resolved:
    """A config's dataset and runs, nothing of which needs to exist.

    Attributes:
        language_model, tokens: what the rows are made from, if not toy data; not necessarily all tokens.
        runs: by name.
        threads: objects stored at a time.
        base_bytes, base_seconds: of a process that has loaded what a trainer needs.
        loading_seconds: of a process until it could make its first chunk.
        corpus_seconds: until the corpus was there.
    """

    config: Config
    manifest: Manifest
    language_model: LanguageModel | None
    tokens: Corpus | None
    runs: dict[str, RunConfig]
    threads: int
    base_bytes: int
    base_seconds: float
    loading_seconds: float
    corpus_seconds: float

    @property
    def model(self) -> LanguageModel:
        assert self.language_model is not None
        return self.language_model

    @property
    def corpus(self) -> Corpus:
        assert self.tokens is not None
        return self.tokens

    @property
    def trainer_device(self) -> torch.device:
        return open_device(self.config.trainer.device, "trainer.device")

    @property
    def trainers(self) -> int:
        """Trainers that have something to do."""
        return min(self.config.trainers, len(self.runs))

    @property
    def model_threads(self) -> int:
        """CPU threads of a producer."""
        if self.model.device.type != "cpu":
            return 1
        return min(cores(), self.config.model.threads or cores())

    def trainer_threads(self, strict: bool) -> int:
        """CPU threads of a trainer."""
        if self.trainer_device.type != "cpu" or strict:
            return 1
        return min(cores(), self.config.trainer.threads or cores())


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_path(url: str) -> Path | None:
    """Where a URL lies on this machine's file systems, if it does."""
    if "://" not in url:
        return Path(url).absolute()
    return Path(url.removeprefix("file://")).absolute() if urlsplit(url).scheme == "file" else None
