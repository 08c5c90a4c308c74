"""Looking costs a few requests, however many chunks there are."""

from pathlib import Path
from typing import Any

import pytest

from penstock.deploy import look, state
from penstock.deploy.config import Config
from penstock.store import dataset as dataset_module
from penstock.store.joined import JoinedDataset
from penstock.store.layout import BLOCK_CHUNKS
from penstock.store.objects import ObjectStore, open_store
from penstock.trainer.config import submit_run
from services.big import big_manifest, write_big
from services.counting import CountingStore
from services.synthetic import RESID

BLOCKS, TAIL = 20, 3
N = BLOCKS * BLOCK_CHUNKS + 10


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[CountingStore]:
    """Every store opened by what looks."""
    found: list[CountingStore] = []

    def open_counting(url: str) -> ObjectStore:
        found.append(CountingStore(open_store(url)))
        return found[-1]

    for module in (look, state, dataset_module):
        monkeypatch.setattr(module, "open_store", open_counting)
    return found


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A config with a run, and its dataset: all blocks but the last are indexed."""
    sae: dict[str, Any] = {"name": "a", "architecture": "topk", "hook_name": RESID, "d_sae": 8, "k": 2}
    settings = {
        "corpus": {"url": str(tmp_path / "corpus")},
        "dataset": {"url": str(tmp_path / "dataset"), "hooks": [RESID]},
        "runs_url": str(tmp_path / "runs"),
        "runs": [{"name": "run", "saes": [sae], "epochs": 2}],
    }
    config = Config.model_validate(settings)
    store, manifest = open_store(config.dataset.url), big_manifest(N)
    write_big(store, manifest, range(N - 10, N - 10 + TAIL))
    submit_run(
        open_store(config.runs_url), JoinedDataset([dataset_module.Dataset(store, manifest)]), config.runs[0]
    )
    return config


def of_dataset(stores: list[CountingStore], config: Config) -> list[tuple[str, str]]:
    return [asked for store in stores if store.url == config.dataset.url for asked in store.asked]


LOOKED = [("list", "index/"), ("folders", "commits/"), ("list", f"commits/{BLOCKS}/")]


def test_status(config: Config, stores: list[CountingStore]) -> None:
    found = state.read_state(config)
    assert (found.planned, found.committed) == (N, N - 10 + TAIL)
    rows = big_manifest(N).rows
    assert found.committed_rows == sum(rows[: N - 10 + TAIL])
    (run,) = found.runs.values()
    assert run.total_rows == 2 * sum(rows)
    assert of_dataset(stores, config) == [("get", "manifest.json"), *LOOKED]


def test_inspect(config: Config, stores: list[CountingStore]) -> None:
    lines = "\n".join(look.describe(config.dataset.url))
    assert f"{N - 10 + TAIL} of {N} chunks committed" in lines
    assert f"over {N - 10 + TAIL} chunks" in lines
    asked = of_dataset(stores, config)
    assert len([key for _, key in asked if key.startswith("commits/") and key.endswith(".json")]) == TAIL
    assert len([1 for what, key in asked if what == "get" and key.startswith("index/")]) == BLOCKS
    assert len(asked) < BLOCKS + 20
