"""One small experiment, run once through the command line, that several tests look at."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.command import penstock, small_config, write_config
from services.valkey import valkey_server


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished small experiment: one producer, one trainer, undisturbed.

    Test processes that run beside each other share it.
    """
    several = "PYTEST_XDIST_WORKER" in os.environ
    own = tmp_path_factory.getbasetemp()
    workdir = (own.parent if several else own) / "small" / "work"
    workdir.parent.mkdir(exist_ok=True)
    with (workdir.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / "summary.json").exists():
            result = penstock("run", write_config(workdir.parent / "config.yaml", small_config(workdir)))
            assert result.returncode == 0, result.stdout + result.stderr
    return workdir


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """An external Redis, as far as the processes under test can tell."""
    with valkey_server() as server:
        yield server.url
