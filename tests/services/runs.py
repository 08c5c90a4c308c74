"""Training runs on synthetic datasets: settings, submitting, workers in this process."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from penstock.common.health import Health
from penstock.common.redis import Client, RedisSettings
from penstock.store.dataset import Dataset
from penstock.store.heads import Head, chain, newest_head
from penstock.store.joined import JoinedDataset
from penstock.store.objects import ObjectStore
from penstock.trainer.config import ResolvedSettings, RunConfig, submit_run
from penstock.trainer.judging.splicing.live import LiveEvaluation
from penstock.trainer.worker import work
from penstock.trainer.workplace import Workplace
from services.synthetic import MLP, RESID


def topk(**changes: Any) -> dict[str, Any]:
    """A TopK SAE that has dead features soon, so that AuxK takes part."""
    return {
        "name": "topk",
        "architecture": "topk",
        "hook_name": RESID,
        "d_sae": 64,
        "k": 2,
        "dead_after_rows": 150,
        "lr": 3e-3,
        "lr_warmup_steps": 5,
    } | changes


def standard(**changes: Any) -> dict[str, Any]:
    return {
        "name": "l1",
        "architecture": "standard",
        "hook_name": MLP,
        "d_sae": 32,
        "l1_coefficient": 0.5,
        "l1_warmup_steps": 10,
        "dead_after_rows": 500,
        "lr": 3e-3,
        "lr_warmup_steps": 5,
    } | changes


def run_settings(**changes: Any) -> ResolvedSettings:
    """Two SAEs on two hook points; six windows of three chunks, the last one short."""
    base: dict[str, Any] = {
        "name": "run",
        "saes": [topk(), standard()],
        "batch_rows": 64,
        "window_chunks": 3,
        "head_interval": 2,
        "strict": True,
    }
    return ResolvedSettings.model_validate(base | changes)


class Bench:
    """A runs store and a queue; `work` is one worker process's life."""

    def __init__(self, runs: ObjectStore, client: Client, prefix: str, lease_seconds: float = 20.0) -> None:
        self.runs = runs
        self.client = client
        self.redis = RedisSettings(prefix=prefix, lease_seconds=lease_seconds)
        self.live: LiveEvaluation | None = None
        self._workers = 0

    def submit(self, dataset: Dataset, budget_chunks: int | None = None, **changes: Any) -> RunConfig:
        return self.submit_joined([dataset], budget_chunks, **changes)

    def submit_joined(
        self, datasets: Sequence[Dataset], budget_chunks: int | None = None, **changes: Any
    ) -> RunConfig:
        """A run that reads several datasets as one."""
        data = JoinedDataset(datasets)
        config, _ = submit_run(self.runs, data, run_settings(**changes), budget_chunks)
        return config

    def place(self) -> Workplace:
        """A new worker's."""
        self._workers += 1
        return Workplace(
            runs=self.runs,
            client=self.client,
            redis=self.redis,
            worker=f"trainer-{self._workers}",
            device=torch.device("cpu"),
            threads=1,
            port=-1,
            live=self.live,
        )

    def work(self, stop: threading.Event | None = None, drain: bool = True) -> None:
        """A worker from start to exit: until every run has ended (with `drain`) or `stop` is set."""
        work(self.place(), Health(), stop or threading.Event(), drain)

    def head(self, config: RunConfig) -> Head:
        head = newest_head(self.runs, config.run_id)
        assert head is not None
        return head

    def ended(self, config: RunConfig) -> bool:
        head = newest_head(self.runs, config.run_id)
        return head is not None and head.terminal

    def position(self, config: RunConfig) -> int:
        head = newest_head(self.runs, config.run_id)
        return -1 if head is None else head.position

    def heads(self, config: RunConfig) -> list[Head]:
        """The lineage, oldest first."""
        return chain(self.runs, config.run_id, self.head(config))[::-1]

    def all_heads(self, config: RunConfig) -> Iterator[str]:
        """Keys of every head there is, also of those that are not in the lineage."""
        keys = (key for key, _ in self.runs.list(f"{config.run_id}/heads/"))
        return (key for key in keys if key.endswith(".json"))


def digests(head: Head) -> dict[str, str]:
    """SHA-256 of each file of a head's checkpoint: weights and optimizer state."""
    return {name: file.sha256 for name, file in sorted(head.checkpoint.items())}
