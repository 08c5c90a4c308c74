"""A producer of many hook points stays within the memory it was given."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from services.valkey import valkey_server

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.long
@pytest.mark.parametrize("budget", [160_000_000, 320_000_000])
def test_a_producer_of_eighteen_hook_points_stays_within_its_budget(tmp_path: Path, budget: int) -> None:
    with valkey_server() as server:
        command = [sys.executable, "-m", "services.held_memory", server.url, str(tmp_path), str(budget)]
        done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["hooks"] == 18
    assert told["chunks"] > 4
    assert told["held"] <= budget
    assert told["stored"] > budget, "too little was made to tell"
