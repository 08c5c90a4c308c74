"""The same order of batches out of real DataLoader worker processes, started anew on files and S3."""

import copy
import importlib.util
import multiprocessing
import os
import random
from itertools import islice, zip_longest
from multiprocessing.context import BaseContext
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader

from penstock.common.errors import UserError
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.torch_dataset import TorchBatches
from services.batches import SETTINGS, fingerprint, whole_order
from services.synthetic import MLP, RESID, make_manifest, write_dataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata uses it
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def order(dataset: Dataset) -> list[str]:
    return whole_order(dataset)


@pytest.fixture(scope="module")
def forkserver() -> BaseContext:
    """Objects reach workers by pickle, as with spawn, but torch is imported once and not in each of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["penstock.store.torch_dataset"])
    return context


def loader(
    batches: TorchBatches, workers: int, context: BaseContext | str | None
) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(
        batches, batch_size=None, num_workers=workers, multiprocessing_context=context if workers else None
    )


def read(
    dataset: Dataset,
    workers: int,
    world_size: int,
    context: BaseContext | str | None,
    state: dict[str, Any] | None = None,
    rounds: int | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Let every rank take some batches from a state on: the merged order, and the state after it."""
    turns: dict[int, list[str]] = {}
    for rank in range(world_size):
        batches = dataset.as_torch([RESID, MLP], **SETTINGS, rank=rank, world_size=world_size)
        if state is not None:
            batches.load_state_dict(state)
        own = loader(batches, workers, context)
        assert len(own) == len(batches)
        found = [fingerprint(batch) for batch in islice(own, rounds)]
        first = 0 if state is None else state["batches"]
        turns[(rank - first) % world_size] = found
    merged = [
        b for turn in zip_longest(*(turns[i] for i in range(world_size))) for b in turn if b is not None
    ]
    return merged, batches.state_after(len(found) if rounds is None else rounds)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_the_order_does_not_depend_on_workers_and_ranks(
    dataset: Dataset, order: list[str], forkserver: BaseContext, workers: int, world_size: int
) -> None:
    assert read(dataset, workers, world_size, forkserver)[0] == order


def test_twenty_stops_with_other_workers_and_ranks_each_time(
    dataset: Dataset, order: list[str], forkserver: BaseContext
) -> None:
    draw = random.Random(3)
    stops = sorted(draw.sample(range(1, len(order)), 20))
    found: list[str] = []
    state = None
    for stop in [*stops, len(order)]:
        workers, world_size = draw.choice([0, 1, 2, 4]), draw.choice([1, 2])
        rounds = -(-(stop - len(found)) // world_size)
        part, state = read(dataset, workers, world_size, forkserver, state, rounds)
        assert len(part) <= rounds * world_size
        found += part
        assert state["batches"] == len(found)
    assert found == order


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_saves_and_resumes_by_itself(
    dataset: Dataset, order: list[str], forkserver: BaseContext, workers: int
) -> None:
    if importlib.util.find_spec("torchdata") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no torchdata: pip install '.[dev]'")
    from torchdata.stateful_dataloader import StatefulDataLoader

    found: list[str] = []
    state = None
    for taken in (7, 1, 12, None):
        batches = dataset.as_torch([RESID, MLP], **SETTINGS)
        context = forkserver if workers else None
        own = StatefulDataLoader(
            batches, batch_size=None, num_workers=workers, multiprocessing_context=context
        )
        if state is not None:
            own.load_state_dict(state)
        iterator = iter(own)
        found += [fingerprint(batch) for batch in islice(iterator, taken)]
        state = copy.deepcopy(own.state_dict())
    assert found == order


def test_a_spawned_worker_opens_s3_anew(bucket: str) -> None:
    url = f"s3://{bucket}/dataset"
    write_dataset(url, make_manifest([40, 33, 40, 17]))
    dataset = open_dataset(url)
    whole = whole_order(dataset)
    assert read(dataset, 1, 1, "spawn")[0] == whole


def test_forked_workers_read_files_and_not_s3(bucket: str, dataset: Dataset, order: list[str]) -> None:
    assert read(dataset, 2, 1, "fork")[0] == order
    url = f"s3://{bucket}/dataset"
    write_dataset(url, make_manifest([40]))
    with pytest.raises(
        UserError, match=r'cannot be read in a forked process; .*multiprocessing_context="spawn"'
    ):
        read(open_dataset(url), 1, 1, "fork")
