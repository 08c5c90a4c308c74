"""A full disk: one clear line and a non-zero exit code; with space made, the same command carries on."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.compare import Facts
from chaos.light import light_plan
from chaos.scenario import Scenario, Worker
from penstock.common.embedded import EmbeddedServer
from services.synthetic import write_dataset

pytestmark = pytest.mark.long


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        reason = f"no tmpfs can be mounted: {mounted.stderr.strip()}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def assert_full(worker: Worker, place: Path) -> None:
    """One line with numbers, no traceback."""
    code, said = worker.end(), worker.said()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2, said
    assert "Traceback" not in said
    assert len(errors) == 1, said
    wanted = rf"No space left on device: [\d,]+ bytes do not fit, [\d,]+ are free at {re.escape(str(place))}"
    assert re.search(wanted, errors[0]), errors[0]


@pytest.mark.parametrize(("key", "nth"), [("/c/", 17), ("provenance/", 4), ("commits/", 4)])
def test_a_producer_on_a_full_disk(
    tmp_path: Path, small_disk: Path, valkey: EmbeddedServer, scenario_facts: Facts, key: str, nth: int
) -> None:
    filler = small_disk / "filler"
    with Scenario(tmp_path, valkey.url, small_disk) as scenario:
        full = scenario.start("produce", fill={"key": key, "nth": nth, "file": str(filler)})
        assert_full(full, small_disk)
        assert filler.stat().st_size > 1 << 20
        filler.unlink()
        again = scenario.start("produce")
        assert again.end() == 0, again.said()
        found = scenario.judge(scenario_facts)
    # no run was submitted
    assert (found.dataset, found.faults) == ([], [])


@pytest.mark.parametrize(
    ("key", "nth"),
    # a record's copy, then the record
    [("checkpoints/", 6), ("history/", 3), ("history/", 4), ("heads/", 5), ("heads/", 6)],
)
def test_a_trainer_on_a_full_disk(
    tmp_path: Path, small_disk: Path, valkey: EmbeddedServer, scenario_facts: Facts, key: str, nth: int
) -> None:
    filler = small_disk / "filler"
    with Scenario(tmp_path, valkey.url, small_disk) as scenario:
        dataset = scenario.config.dataset
        write_dataset(Path(dataset.url), light_plan(dataset), indexed=True)
        scenario.submit()
        full = scenario.start("train", "--drain", fill={"key": key, "nth": nth, "file": str(filler)})
        assert_full(full, small_disk)
        filler.unlink()
        again = scenario.start("train", "--drain")
        assert again.end() == 0, again.said()
        found = scenario.judge(scenario_facts)
    assert found.clean, found
