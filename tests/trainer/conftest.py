"""A queue, quick pauses, and torch left as it was."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.common.embedded import EmbeddedServer
from penstock.common.redis import Client
from penstock.producer import work as producer_work
from penstock.store.dataset import Dataset
from penstock.store.objects import open_store
from penstock.trainer import mending, observer, supply, worker
from services.runs import Bench, digests, run_settings
from services.synthetic import write_dataset
from services.valkey import connected, fresh_prefix, valkey_server


@pytest.fixture(scope="session")
def valkey() -> Iterator[EmbeddedServer]:
    with valkey_server() as server:
        yield server


@pytest.fixture(scope="session")
def client(valkey: EmbeddedServer) -> Client:
    return connected(valkey)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A finished synthetic dataset; nobody writes to it but submits."""
    return write_dataset(tmp_path_factory.mktemp("synthetic") / "dataset")


@pytest.fixture(scope="session")
def reference(
    client: Client, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, str]]:
    """Weights and optimizer states of undisturbed runs, by their settings."""
    known: dict[str, dict[str, str]] = {}

    def digests_of(**changes: Any) -> dict[str, str]:
        key = run_settings(**changes).model_dump_json()
        if key not in known:
            directory = tmp_path_factory.mktemp("reference")
            bench = Bench(open_store(str(directory)), client, fresh_prefix())
            config = bench.submit(dataset, **changes)
            bench.work()
            head = bench.head(config)
            assert head.status == "done"
            known[key] = digests(head)
        return known[key]

    return digests_of


@pytest.fixture
def bench(client: Client, tmp_path: Path) -> Bench:
    return Bench(open_store(str(tmp_path / "runs")), client, fresh_prefix())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that are right for days of training are short here, and no power is lost."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(supply, "BLOCK_MS", 20)
    monkeypatch.setattr(worker, "IDLE_SECONDS", 0.02)
    monkeypatch.setattr(worker, "RECONCILE_SECONDS", 0.1)
    monkeypatch.setattr(worker, "ASIDE_SECONDS", 0.05)
    monkeypatch.setattr(worker, "backoff_seconds", lambda barren: 0)
    monkeypatch.setattr(observer, "RECONCILE_SECONDS", 0.1)
    monkeypatch.setattr(mending, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(producer_work, "IDLE_SECONDS", 0.05)


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
