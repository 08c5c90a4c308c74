"""A short campaign of random faults on each kind of store. `make chaos` runs longer ones."""

import pytest

from chaos.campaign import Options, campaign
from chaos.compare import Facts
from chaos.light import CHUNK_SECONDS, STEP_SECONDS
from chaos.scenario import CHUNKS

PACE = {CHUNK_SECONDS: "0.7", STEP_SECONDS: "0.04"}


def survives(reference: Facts, kills: int, store: str, seed: int) -> None:
    options = Options(kills, seed, store, chunks=CHUNKS, pace=PACE)
    result = campaign(options, reference)
    words = f"kills={kills} dataset=identical weights=identical rows_lost=0 rows_repeated=0 fenced="
    assert result.line().startswith(words)
    assert result.ok, result


@pytest.mark.long
def test_random_faults_change_nothing_on_files(scenario_facts: Facts) -> None:
    survives(scenario_facts, 6, "local", 1)


@pytest.mark.services
@pytest.mark.timeout(600)
@pytest.mark.parametrize("store", ["moto", "ceph"])
def test_random_faults_change_nothing_on_s3(scenario_facts: Facts, store: str) -> None:
    survives(scenario_facts, 5, store, 2)
