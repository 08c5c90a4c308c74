"""Every released format opens and means what it meant: rows, orders, states, dictionaries, open runs."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from formats import experiment
from penstock.common.redis import Client
from penstock.deploy.config import load_config
from penstock.deploy.heal import faults
from penstock.deploy.look import describe
from penstock.store.dataset import open_dataset
from penstock.store.layout import BLOCK_CHUNKS, FORMAT_VERSION
from penstock.store.objects import open_store
from penstock.trainer.config import load_run_config
from services.moto import MotoServer
from services.runs import Bench

FIXTURES = sorted(Path(__file__).parent.glob("*.tar.xz"))


def test_the_current_format_has_a_fixture() -> None:
    assert f"{FORMAT_VERSION}.tar.xz" in {file.name for file in FIXTURES}


@pytest.fixture(scope="module", params=FIXTURES, ids=lambda file: str(file.name.split(".")[0]))
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("format")
    with tarfile.open(request.param) as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture
def expected(unpacked: Path, clean_aws: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What was read when the fixture was made; its objects are where they were."""
    with MotoServer() as moto:
        for name, value in moto.environment().items():
            clean_aws.setenv(name, value)
        moto.make_bucket(experiment.BASE.removeprefix("s3://"))
        store, objects = open_store(experiment.BASE), unpacked / "objects"
        for file in objects.rglob("*"):
            if file.is_file():
                store.put(file.relative_to(objects).as_posix(), file.read_bytes())
        yield json.loads((unpacked / "expected.json").read_text())


def test_corpus_and_datasets_hold_the_same(expected: dict[str, Any]) -> None:
    assert experiment.look_at_corpus(f"{experiment.BASE}/corpus") == expected["corpus"]
    for url, told in expected["datasets"].items():
        assert experiment.look_at_dataset(url) == told
        assert list(faults(url)[1]) == []
        assert list(describe(url))


def test_a_state_goes_on_where_it_was(expected: dict[str, Any]) -> None:
    batches = experiment.reading(open_dataset(experiment.FIRST))
    batches.load_state_dict(expected["state"])
    assert experiment.digest_of_batches(batches) == expected["rest"]


def test_dictionaries_do_what_they_did(expected: dict[str, Any]) -> None:
    run_url = f"{experiment.FIRST}-runs/{expected['done']}"
    assert list(faults(run_url)[1]) == []
    assert list(describe(run_url))
    for name, told in expected["saes"].items():
        # another processor sums in another order
        assert experiment.look_at_sae(run_url, name) == pytest.approx(told, rel=1e-3)


def test_a_run_under_way_is_finished(expected: dict[str, Any], client: Client, prefix: str) -> None:
    bench = Bench(open_store(f"{experiment.SECOND}-runs"), client, prefix)
    run = load_run_config(bench.runs, expected["half"])
    before = bench.heads(run)
    bench.work()
    assert bench.head(run).status == "done"
    assert bench.head(run).rows == run.total_rows()
    assert [head.n for head in bench.heads(run)][: len(before)] == [head.n for head in before]
    assert list(faults(f"{bench.runs.url}/{run.run_id}")[1]) == []


def test_configs_are_understood(unpacked: Path) -> None:
    for file in unpacked.glob("*.yaml"):
        config = load_config(str(file))
        assert config.runs[0].name == "run"


def test_the_index_of_a_large_dataset_is_read(unpacked: Path) -> None:
    dataset = open_dataset(str(unpacked / "big"))
    assert dataset.committed() == set(range(BLOCK_CHUNKS + 2))
