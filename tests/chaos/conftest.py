"""An undisturbed experiment to compare with, and torch left as it was."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chaos.compare import Facts, gather
from chaos.light import light_plan
from chaos.scenario import Scenario
from penstock.common.embedded import EmbeddedServer
from penstock.common.health import Health
from penstock.trainer.worker import work
from services.synthetic import write_dataset
from services.valkey import connected


@pytest.fixture(scope="session")
def scenario_facts(tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedServer) -> Facts:
    """What `Scenario` comes to when one worker in this process reads its finished dataset."""

    scenario = Scenario(tmp_path_factory.mktemp("undisturbed"), valkey.url)
    write_dataset(Path(scenario.config.dataset.url), light_plan(scenario.config.dataset), indexed=True)
    scenario.submit()
    threads = torch.get_num_threads()
    try:
        work(scenario.place(connected(valkey)), Health(), threading.Event(), drain=True)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    return gather(scenario.config.dataset.url, scenario.config.runs_url)


@pytest.fixture
def scenario(tmp_path: Path, valkey: EmbeddedServer) -> Iterator[Scenario]:
    """An experiment whose processes a test starts, with a queue of its own."""
    with Scenario(tmp_path, valkey.url) as scenario:
        yield scenario
