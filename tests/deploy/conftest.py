"""One small experiment, run once through the command line, that several tests look at."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.command import penstock, small_config, write_config
from services.valkey import valkey_server


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished small experiment: one producer, one trainer, undisturbed."""
    workdir = tmp_path_factory.mktemp("small") / "work"
    result = penstock("run", write_config(workdir.parent / "config.yaml", small_config(workdir)))
    assert result.returncode == 0, result.stdout + result.stderr
    return workdir


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """An external Redis, as far as the processes under test can tell."""
    with valkey_server() as server:
        yield server.url
