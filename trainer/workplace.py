"""What a worker needs and stands in: its connections, its device, and what its bits depend on."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis
import torch

from penstock.common.device import device_kind
from penstock.common.errors import ConfigError
from penstock.common.health import Health
from penstock.common.heartbeat import Heartbeat
from penstock.common.logs import LOGGER
from penstock.common.redis import Client, RedisSettings
from penstock.store.heads import newest_head
from penstock.store.joined import JoinedDataset
from penstock.store.loader import WindowLoader, WindowReader
from penstock.store.objects import ObjectStore
from penstock.trainer.config import RunConfig, open_pinned
from penstock.trainer.group import Group
from penstock.trainer.loop import Loader

if TYPE_CHECKING:
    from penstock.trainer.judging.splicing.live import LiveEvaluation

_THREADS = torch.get_num_threads()
"""What torch chose for this machine, before any strict run."""


@dataclass(frozen=True)
class Workplace:
    """What a worker needs: where runs are, Redis, itself, its device, and its tools.

    Attributes:
        group: makes the SAEs of a run.
        loader: reads windows from a number on.
        heartbeat: calls a function as long as there is progress.
        open_data: opens the datasets of a run.
        live: evaluates SAEs inside the model while they train, if anything does.
    """

    runs: ObjectStore
    client: Client
    redis: RedisSettings
    worker: str
    device: torch.device
    threads: int | None
    port: int
    group: Callable[[RunConfig, torch.device], Group] = Group
    loader: Callable[[WindowReader, int], Loader] = WindowLoader
    heartbeat: Callable[[Callable[[], None], float, Health], Heartbeat] = Heartbeat
    open_data: Callable[[RunConfig], JoinedDataset] = open_pinned
    live: "LiveEvaluation | None" = None

    def environment(self, strict: bool) -> dict[str, Any]:
        """What the bits of a training depend on."""
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
            "device": device_kind(self.device),
            "strict": strict,
        }


def set_up_strict(strict: bool, place: Workplace) -> None:
    """Threads and algorithms: `strict` means one CPU thread and deterministic kernels."""
    if place.device.type == "cpu":
        torch.set_num_threads(1 if strict else place.threads or _THREADS)
    if strict:
        # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(strict)


def check_environment(runs: ObjectStore, run_id: str, environment: dict[str, Any], strict: bool) -> None:
    head = newest_head(runs, run_id)
    if head is None or not head.checkpoint or head.environment == environment:
        return
    differing = ", ".join(
        f"{key} was {head.environment.get(key)} and is {value}"
        for key, value in environment.items()
        if head.environment.get(key) != value
    )
    if strict:
        raise ConfigError(f"run {run_id} is strict and began elsewhere: {differing}; resume it there")
    LOGGER.warning("run %s: %s; its weights will not be bit-identical to one machine's", run_id, differing)


def forgiving(action: Callable[[], object]) -> None:
    """Do something that only helps others: if Redis is away, reconciling makes up for it later."""
    try:
        action()
    except redis.RedisError as error:
        LOGGER.warning("redis: %s", error)
