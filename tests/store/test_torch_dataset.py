"""Batches for torch: one order, cut into ranks and resumed anywhere, without reading what is skipped."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.data
from torch import Tensor

from penstock.common.errors import DamagedObject, DataError, UserError
from penstock.store import torch_dataset
from penstock.store.dataset import Dataset
from penstock.store.layout import commit_key
from penstock.store.local import LocalStore
from penstock.store.order import ReadingOrder
from penstock.store.torch_dataset import TorchBatches
from services.batches import SETTINGS, fingerprint, whole_order
from services.synthetic import CHUNKS, MLP, RESID, ROWS, make_manifest, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def order(dataset: Dataset) -> list[str]:
    """The uninterrupted sequence of batches."""
    return whole_order(dataset)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    left = [t.name for t in threading.enumerate() if t.name == "loader" or t.name.startswith("read")]
    assert left == []


class Worker:
    """What torch says of the DataLoader worker that a process is."""

    def __init__(self, id: int, num_workers: int) -> None:
        self.id = id
        self.num_workers = num_workers


def as_worker(monkeypatch: pytest.MonkeyPatch, worker: Worker | None) -> None:
    monkeypatch.setattr(torch_dataset, "get_worker_info", lambda: worker)


def take(batches: TorchBatches, n: int | None = None) -> list[str]:
    """Fingerprints of the first n batches; the state is that after them."""
    found: list[str] = []
    iterator = iter(batches)
    while n is None or len(found) < n:
        batch = next(iterator, None)
        if batch is None:
            break
        found.append(fingerprint(batch))
    return found


def merge(parts: list[list[str]]) -> list[str]:
    """What parts of an order that take turns give together."""
    return [item for turn in zip_longest(*parts) for item in turn if item is not None]


def test_the_order_is_that_of_a_run(dataset: Dataset, order: list[str]) -> None:
    batches = dataset.as_torch([RESID, MLP], **SETTINGS)
    found = []
    for batch in batches:
        assert list(batch) == [RESID, MLP]
        assert batch[RESID].dtype == torch.bfloat16
        found.append(fingerprint(batch))
    assert found == order
    assert len(order) == len(batches) == len(set(order))
    assert [fingerprint(batch) for batch in batches] == order, "every iteration begins at the start point"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_order(dataset: Dataset, order: list[str], world_size: int) -> None:
    parts = []
    for rank in range(world_size):
        batches = dataset.as_torch([RESID, MLP], **SETTINGS, rank=rank, world_size=world_size)
        parts.append(take(batches))
        assert len(parts[-1]) == len(batches)
    assert merge(parts) == order


def test_twenty_stops_and_resumptions(dataset: Dataset, order: list[str]) -> None:
    """At each point another number of ranks goes on, through a state that was JSON in between."""
    draw = random.Random(1)
    for stop in draw.sample(range(len(order) + 1), 20):
        before = draw.choice([1, 2, 3])
        rounds = stop // before
        first, states = [], []
        for rank in range(before):
            batches = dataset.as_torch([RESID, MLP], **SETTINGS, rank=rank, world_size=before)
            first.append(take(batches, rounds))
            states.append(json.dumps(batches.state_dict()))
            assert batches.state_dict() == batches.state_after(rounds)
        assert len(set(states)) == 1, "ranks in step say the same"
        after = draw.choice([1, 2, 3])
        rest = {}
        for rank in range(after):
            batches = dataset.as_torch([RESID, MLP], **SETTINGS, rank=rank, world_size=after)
            batches.load_state_dict(json.loads(states[0]))
            assert batches.state_dict() == json.loads(states[0])
            rest[(rank - rounds * before) % after] = take(batches)
            assert len(batches) == len(rest[(rank - rounds * before) % after])
        assert merge(first) + merge([rest[turn] for turn in range(after)]) == order


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_resume_by_their_own_states(
    dataset: Dataset, order: list[str], monkeypatch: pytest.MonkeyPatch, workers: int, world_size: int
) -> None:
    """As with torchdata's StatefulDataLoader: each worker saves and loads for itself, at another progress."""
    draw = random.Random(2)
    begun = 5
    start = dataset.as_torch([RESID], **SETTINGS).state_after(begun)
    ranks = {}
    for rank in range(world_size):
        parts = []
        for id in range(workers):
            as_worker(monkeypatch, Worker(id, workers))
            state, part = start, []
            for taken in (draw.randrange(9), draw.randrange(9), None):
                batches = dataset.as_torch([RESID, MLP], **SETTINGS, rank=rank, world_size=world_size)
                batches.load_state_dict(state)
                part += take(batches, taken)
                state = json.loads(json.dumps(batches.state_dict()))
            parts.append(part)
        ranks[(rank - begun) % world_size] = merge(parts)
    assert merge([ranks[turn] for turn in range(world_size)]) == order[begun:]


def test_a_workers_state_is_of_no_use_to_others(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = dataset.as_torch([RESID], **SETTINGS)
    as_worker(monkeypatch, Worker(1, 2))
    state = batches.state_dict()
    batches.load_state_dict(state)
    for other in (None, Worker(0, 2), Worker(1, 3)):
        as_worker(monkeypatch, other)
        with pytest.raises(UserError, match="DataLoader worker 1 of 2 of rank 0 of 1, and of no use"):
            batches.load_state_dict(state)


def test_the_state_is_that_of_the_newest_iteration(dataset: Dataset) -> None:
    batches = dataset.as_torch([RESID], **SETTINGS)
    old = iter(batches)
    next(old)
    new = iter(batches)
    assert batches.state_dict() == batches.state_after(0)
    next(new)
    next(old)
    next(old)
    assert batches.state_dict() == batches.state_after(1)
    del old, new


def test_a_longer_reading_goes_on_from_a_finished_one(dataset: Dataset) -> None:
    short = dataset.as_torch([RESID, MLP], **SETTINGS | {"epochs": 1})
    first = take(short)
    longer = dataset.as_torch([RESID, MLP], **SETTINGS | {"epochs": 3})
    longer.load_state_dict(short.state_dict())
    assert first + take(longer) == take(dataset.as_torch([RESID, MLP], **SETTINGS | {"epochs": 3}))


def test_a_finished_reading_gives_nothing_more(dataset: Dataset) -> None:
    batches = dataset.as_torch([RESID], **SETTINGS)
    batches.load_state_dict(batches.state_after(len(batches)))
    assert (take(batches), len(batches)) == ([], 0)


def test_skipped_windows_are_not_read(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are chunks read twice, nor hooks that nobody asked for."""
    got: list[str] = []
    real = LocalStore.get

    def get(store: LocalStore, key: str) -> bytes:
        got.append(key)
        return real(store, key)

    batches = dataset.as_torch([RESID], **SETTINGS)
    plan = ReadingOrder((CHUNKS,), SETTINGS["epochs"], SETTINGS["window_chunks"], SETTINGS["seed"])
    monkeypatch.setattr(LocalStore, "get", get)
    for number in range(plan.n_windows):
        for within in (0, 2):
            # by the first batch of each window, and by one in its middle
            done = sum(
                -(-sum(ROWS[plan.chunk_at(p)] for p in range(w.start, w.stop)) // SETTINGS["batch_rows"])
                for w in map(plan.window, range(number))
            )
            batches.load_state_dict(dataset.as_torch([RESID], **SETTINGS).state_after(done + within))
            got.clear()
            take(batches)
            chunks = [plan.chunk_at(p) for p in range(plan.window(number).start, plan.n_positions)]
            wanted = sorted(f"activations.zarr/acts/{RESID}/c/{chunk}/0" for chunk in chunks)
            assert sorted(key for key in got if "/acts/" in key) == wanted


def test_rows_come_with_their_tokens(dataset: Dataset) -> None:
    where: dict[bytes, tuple[int, int, int]] = {}
    for index in range(CHUNKS):
        chunk = dataset.read_chunk(index)
        for row in range(chunk.rows):
            origin = (int(chunk.tokens[row]), int(chunk.sequence[row]), int(chunk.position[row]))
            where[chunk.acts[RESID][row].tobytes()] = origin
    seen = 0
    for batch in dataset.as_torch([RESID], **SETTINGS | {"epochs": 1}, with_tokens=True):
        assert set(batch) == {RESID, "tokens", "sequence", "position"}
        assert (batch["tokens"].dtype, batch["sequence"].dtype) == (torch.int32, torch.int64)
        origins = zip(*(batch[name].tolist() for name in ("tokens", "sequence", "position")), strict=True)
        for row, origin in zip(batch[RESID], origins, strict=True):
            assert where[row.view(torch.int16).numpy().tobytes()] == origin
            seen += 1
    assert seen == sum(ROWS)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        ({"seed": 9}, "the state is of another order: seed is 9 in it and 7 here"),
        ({"batch_rows": 8}, "batch_rows is 8 in it and 64 here"),
        ({"window_chunks": 8}, "window_chunks is 8 in it and 3 here"),
        ({"digest": "d"}, "the dataset's digest is d in it and"),
        ({"batches": 5000}, "the state is 5000 batches far, and 2 epochs have 107"),
        ({"batches": -1}, "not the state of a reading: batches: Input should be greater"),
        ({"batches": "1"}, "not the state of a reading: batches: "),
        ({"version": 2}, "not the state of a reading: version: "),
        ({"more": 1}, "not the state of a reading: more: "),
        ({"chunks": [[0, 17]]}, "not ascending ranges of this dataset's"),
        ({"chunks": [[0, 2], [2, 4]]}, "not ascending ranges"),
        ({"chunks": [[3, 3]]}, "not ascending ranges"),
        ({"chunks": []}, "not the state of a reading: chunks: "),
    ],
)
def test_another_state_is_refused_in_one_line(dataset: Dataset, spoil: dict[str, Any], line: str) -> None:
    batches = dataset.as_torch([RESID], **SETTINGS)
    good = batches.state_after(3)
    batches.load_state_dict(good)
    with pytest.raises(UserError) as refused:
        batches.load_state_dict(good | spoil)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert batches.state_dict() == good, "nothing was changed"


@pytest.mark.parametrize("state", [{}, [], None, 3])
def test_what_is_no_state_is_refused(dataset: Dataset, state: Any) -> None:
    with pytest.raises(UserError, match="not the state of a reading"):
        dataset.as_torch([RESID]).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"batch_rows": 0}, "batch_rows is 0"),
        ({"window_chunks": -1}, "window_chunks is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"world_size": 0}, "world_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2; with world_size 2 it must be 0 to 1"),
        ({"rank": -1}, "rank is -1"),
        ({"hooks": ["nothing"]}, "'nothing' is not in this dataset"),
    ],
)
def test_settings_out_of_range_are_refused(dataset: Dataset, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        dataset.as_torch(**{"hooks": [RESID]} | settings)


@pytest.mark.parametrize("taken", [-1, 108])
def test_more_than_there_is_was_not_taken(dataset: Dataset, taken: int) -> None:
    with pytest.raises(UserError, match=f"{taken} batches were not taken: this rank has 107"):
        dataset.as_torch([RESID], **SETTINGS).state_after(taken)


def test_closing_early_stops_the_reading(dataset: Dataset) -> None:
    """The fixture above looks at the threads."""
    batches = dataset.as_torch([RESID], **SETTINGS | {"epochs": 50})
    for _ in batches:
        break
    iterator = iter(batches)
    next(iterator)
    del iterator
    loader: torch.utils.data.DataLoader[dict[str, Tensor]] = torch.utils.data.DataLoader(
        batches, batch_size=None
    )
    for _ in loader:
        break
    assert batches.state_dict() == batches.state_after(1)


def test_a_dataset_that_is_not_complete(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, indices=[0, 2, 3, 7])
    with pytest.raises(UserError, match=r"12 of its 16 chunks are not committed; finish .*partial=True"):
        dataset.as_torch([RESID])
    batches = dataset.as_torch([RESID, MLP], **SETTINGS, partial=True, with_tokens=True)
    sequences = {int(s) for batch in batches for s in batch["sequence"]}
    assert {sequence // 10 for sequence in sequences} == {0, 2, 3, 7}
    batches = dataset.as_torch([RESID, MLP], **SETTINGS, partial=True)
    every = take(batches)
    first = take(batches, 6)
    state = json.loads(json.dumps(batches.state_dict()))
    write_dataset(tmp_path)
    for partial in (True, False):
        later = dataset.as_torch([RESID, MLP], **SETTINGS, partial=partial)
        assert len(later) > len(batches)
        later.load_state_dict(state)
        assert first + take(later) == every, "what was committed meanwhile is not mixed in"


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, indices=[])
    with pytest.raises(UserError, match="none of its 16 chunks is committed yet"):
        dataset.as_torch([RESID], partial=True)


def test_quarantined_chunks_are_left_out_and_counted(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    before = dataset.as_torch([RESID, MLP], **SETTINGS)
    whole = take(before)
    dataset.store.put("quarantine/4.json", b"")
    dataset.store.delete(commit_key(4))
    batches = dataset.as_torch([RESID, MLP], **SETTINGS)
    every = take(batches)
    assert every == whole_order(dataset) != whole
    assert len(every) == len(batches) < len(whole)
    for done in (0, 7, 30, len(every)):
        later = dataset.as_torch([RESID, MLP], **SETTINGS)
        later.load_state_dict(batches.state_after(done))
        assert take(later) == every[done:]


def test_a_chunk_that_is_quarantined_later_is_read_while_it_is_whole(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    batches = dataset.as_torch([RESID, MLP], **SETTINGS)
    every = take(batches)
    dataset.store.put("quarantine/4.json", b"")
    later = dataset.as_torch([RESID, MLP], **SETTINGS)
    assert len(later) < len(batches)
    later.load_state_dict(batches.state_after(5))
    assert take(later) == every[5:], "the state's chunks count"
    dataset.store.delete(f"activations.zarr/acts/{RESID}/c/4/0")
    with pytest.raises(DataError, match="chunk 4 was quarantined after the order of this reading was fixed"):
        take(later)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda store: store.put(f"activations.zarr/acts/{RESID}/c/4/0", b"x"), "acts/.*/c/4/0"),
        (lambda store: store.put(commit_key(4), store.get(commit_key(5))), "the commit of chunk 5"),
    ],
)
def test_damage_ends_the_iteration(tmp_path: Path, spoil: Callable[[Any], None], line: str) -> None:
    dataset = write_dataset(tmp_path)
    spoil(dataset.store)
    with pytest.raises(DamagedObject, match=line):
        take(dataset.as_torch([RESID], **SETTINGS))


def test_rows_that_were_not_planned_are_no_rows(tmp_path: Path) -> None:
    """Places are counted by the manifest's row counts: a chunk that has others would shift them."""
    written = write_dataset(tmp_path)
    rows = [*ROWS[:4], ROWS[4] - 1, *ROWS[5:]]
    dataset = Dataset(written.store, make_manifest(rows))
    with pytest.raises(DamagedObject, match=rf"chunk 4 has {ROWS[4]} rows, not the {ROWS[4] - 1} planned"):
        take(dataset.as_torch([RESID], **SETTINGS))


def test_a_dataset_that_keeps_only_a_window_is_read_by_runs_alone(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, make_manifest(retention="window"))
    with pytest.raises(UserError, match="keeps only a window of its chunks: read it with a run"):
        dataset.as_torch([RESID])
