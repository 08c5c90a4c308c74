"""Rows by place and by token, and the text around them; nothing is read that is not needed."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.common.errors import DamagedObject, ObjectMissing, UserError
from penstock.store.arrays import BFLOAT16
from penstock.store.chunks import Chunk
from penstock.store.dataset import Dataset
from penstock.store.layout import commit_key
from penstock.store.local import LocalStore
from penstock.store.lookup import ABSENT, Context
from services.synthetic import CHUNKS, CONTEXT, MLP, RESID, ROWS, WIDTHS, make_manifest, write_dataset

TOTAL = sum(ROWS)
EDGES = [sum(ROWS[:index]) for index in range(CHUNKS + 1)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def chunks(dataset: Dataset) -> list[Chunk]:
    return [dataset.read_chunk(index) for index in range(CHUNKS)]


@pytest.fixture
def got(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the objects that are read, without what precedes them."""
    keys: list[str] = []
    real = LocalStore.get

    def get(store: LocalStore, key: str) -> bytes:
        keys.append(key.removeprefix("activations.zarr/"))
        return real(store, key)

    monkeypatch.setattr(LocalStore, "get", get)
    return keys


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("read")] == []


def bits(array: Any) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.ascontiguousarray(array).view(np.uint16)


@pytest.mark.parametrize("hook", [RESID, MLP])
@pytest.mark.parametrize(
    ("start", "stop"),
    [
        *[(0, None), (0, 1), (5, 5), (7, 3), (TOTAL, None), (TOTAL + 5, TOTAL + 9)],
        *[(EDGES[2], EDGES[3]), (EDGES[2] - 1, EDGES[2] + 1), (EDGES[1] + 3, EDGES[9] - 4)],
        *[(-10, None), (-300, -1), (0, 10**12)],
    ],
)
def test_rows_by_their_place(
    dataset: Dataset, chunks: list[Chunk], hook: str, start: int, stop: int | None
) -> None:
    every = np.concatenate([chunk.acts[hook] for chunk in chunks])
    found = dataset.as_numpy(hook, start, stop)
    assert found.dtype == BFLOAT16
    assert found.shape == every[start:stop].shape
    assert np.array_equal(bits(found), bits(every[start:stop]))


def test_only_the_objects_that_hold_them_are_read(dataset: Dataset, got: list[str]) -> None:
    dataset.as_numpy(RESID, EDGES[3] - 1, EDGES[5] + 1)
    wanted = [key for i in (2, 3, 4, 5) for key in (commit_key(i), f"acts/{RESID}/c/{i}/0")]
    assert sorted(got) == sorted(wanted)


def test_tokens_are_found_in_stored_order(dataset: Dataset, chunks: list[Chunk]) -> None:
    for wanted in ([17], [3, 50, 3], (1, 999)):
        found = dataset.rows(tokens=wanted, limit=None)
        hits = [np.isin(chunk.tokens, wanted) for chunk in chunks]
        assert len(found) == sum(int(hit.sum()) for hit in hits) > 0
        for hook in (RESID, MLP):
            expected = np.concatenate([c.acts[hook][hit] for c, hit in zip(chunks, hits, strict=True)])
            assert np.array_equal(bits(found.acts[hook]), bits(expected))
        for name in ("tokens", "sequence", "position"):
            parts = [getattr(c, name)[hit] for c, hit in zip(chunks, hits, strict=True)]
            assert np.array_equal(getattr(found, name), np.concatenate(parts))
            assert getattr(found, name).dtype == getattr(chunks[0], name).dtype


def test_few_rows_read_few_objects(dataset: Dataset, chunks: list[Chunk], got: list[str]) -> None:
    here = int(np.count_nonzero(chunks[0].tokens == 17))
    found = dataset.rows(tokens=[17], hooks=[MLP], limit=here + 1)
    assert list(found.acts) == [MLP]
    assert (found.sequence // 10).tolist() == [0] * here + [1]
    acts = [key for key in got if key.startswith("acts/")]
    assert acts == [f"acts/{MLP}/c/0/0", f"acts/{MLP}/c/1/0"]
    searched = [key for key in got if key.startswith("tokens/")]
    assert len(searched) < 10, "looking ends soon after there are enough"


def test_activations_are_read_only_where_there_are_hits(tmp_path: Path, got: list[str]) -> None:
    """Token 41 is missing from chunks that are too short for it."""
    dataset = write_dataset(tmp_path, make_manifest([60, 30, 35, 60]))
    got.clear()
    found = dataset.rows(tokens=[41], hooks=[RESID])
    assert (found.sequence // 10).tolist() == [0, 3]
    assert [key for key in got if key.startswith("acts/")] == [f"acts/{RESID}/c/{i}/0" for i in (0, 3)]
    got.clear()
    assert len(dataset.rows(tokens=[41], hooks=[])) == 2
    assert not [key for key in got if key.startswith("acts/")]


@pytest.mark.parametrize(("tokens", "limit"), [([], 10), ([999], None), ([17], 0)])
def test_no_rows_are_found_with_their_shapes(dataset: Dataset, tokens: list[int], limit: int | None) -> None:
    found = dataset.rows(tokens=tokens, limit=limit)
    assert {hook: acts.shape for hook, acts in found.acts.items()} == {h: (0, w) for h, w in WIDTHS.items()}
    assert (len(found), found.sequence.dtype.name) == (0, "int64")


def test_rows_of_a_dataset_that_is_not_complete(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, indices=[1, 4])
    with pytest.raises(UserError, match="14 of its 16 chunks are not committed"):
        dataset.rows(tokens=[17])
    assert set((dataset.rows(tokens=[17], partial=True).sequence // 10).tolist()) == {1, 4}
    with pytest.raises(ObjectMissing, match="chunk 0 is not committed"):
        dataset.as_numpy(RESID, 0, 1)
    first = sum(ROWS[:1])
    assert np.array_equal(
        bits(dataset.as_numpy(RESID, first, first + ROWS[1])), bits(dataset.read_chunk(1).acts[RESID])
    )
    with pytest.raises(ObjectMissing, match="chunk 2 is not committed"):
        dataset.context(20, 3)


def test_quarantined_chunks_hold_no_tokens(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    dataset.store.put("quarantine/4.json", b"")
    dataset.store.delete("activations.zarr/tokens/c/4")
    found = dataset.rows(tokens=[17], limit=None)
    assert set((found.sequence // 10).tolist()) == set(range(CHUNKS)) - {4}


@pytest.mark.parametrize(
    ("look", "key"),
    [
        (lambda d: d.as_numpy(RESID), f"acts/{RESID}/c/4/0"),
        (lambda d: d.rows(tokens=[17]), "tokens/c/4"),
        (lambda d: d.rows(tokens=[17]), f"acts/{MLP}/c/4/0"),
        (lambda d: d.context(40, 1), "sequence/c/4"),
    ],
)
def test_damage_is_never_shown(tmp_path: Path, look: Callable[[Dataset], Any], key: str) -> None:
    dataset = write_dataset(tmp_path)
    key = f"activations.zarr/{key}"
    data = bytearray(dataset.store.get(key))
    data[5] ^= 1
    dataset.store.put(key, bytes(data))
    with pytest.raises(DamagedObject, match="is damaged"):
        look(dataset)


@pytest.mark.parametrize("hook", ["nothing", ""])
def test_hooks_that_are_not_there(dataset: Dataset, hook: str) -> None:
    for look in (lambda: dataset.as_numpy(hook), lambda: dataset.rows([1], [hook])):
        with pytest.raises(UserError, match="is not in this dataset"):
            look()


@pytest.mark.parametrize("limit", [-1, -1000])
def test_a_negative_limit_is_refused(dataset: Dataset, limit: int) -> None:
    with pytest.raises(UserError, match=f"limit is {limit}"):
        dataset.rows([17], limit=limit)


def test_every_row_finds_its_own_context(dataset: Dataset, chunks: list[Chunk]) -> None:
    for chunk in chunks[:2]:
        for row in range(chunk.rows):
            sequence, position = int(chunk.sequence[row]), int(chunk.position[row])
            context = dataset.context(sequence, position, before=2, after=3)
            assert (context.sequence, context.position) == (sequence, position)
            start, stop = max(0, position - 2), min(CONTEXT, position + 4)
            assert context.positions.tolist() == list(range(start, stop))
            assert context.tokens[position - start] == chunk.tokens[row]
            for place, token in zip(context.positions, context.tokens, strict=True):
                there = (chunk.sequence == sequence) & (chunk.position == place)
                assert chunk.tokens[there].tolist() == ([] if token == ABSENT else [token])


def test_what_was_left_out_is_marked(dataset: Dataset) -> None:
    """Chunk 0 has 190 rows: its tenth sequence ends after one of 21."""
    context = dataset.context(9, 0, after=100)
    assert context.tokens.tolist() == [1 + 189 % 50] + [ABSENT] * (CONTEXT - 1)
    everything = dataset.context(3, 20, before=1000)
    assert everything.positions.tolist() == list(range(CONTEXT))
    assert ABSENT not in everything.tokens


def test_a_context_reads_one_chunk_and_no_activations(dataset: Dataset, got: list[str]) -> None:
    dataset.context(57, 3)
    assert sorted(got) == sorted([commit_key(5), "tokens/c/5", "sequence/c/5", "position/c/5"])


def test_text_wants_a_tokenizer(dataset: Dataset) -> None:
    def decode(ids: list[int]) -> str:
        return "<" + " ".join(map(str, ids)) + ">"

    positions = np.arange(5, dtype=np.int32)
    context = Context(0, 2, positions, np.array([ABSENT, 4, 5, ABSENT, 6], np.int32))
    assert context.text(decode) == "[special]<4 5>[special]<6>"
    assert context.text(decode, absent="") == "<4 5><6>"
    assert dataset.context(0, 1, before=1, after=1).text(decode) == "<1 2 3>"


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ({"sequence": 160, "position": 0}, "sequence is 160; .* has sequences 0 to 159"),
        ({"sequence": -1, "position": 0}, "sequence is -1"),
        ({"sequence": 0, "position": 21}, "position is 21; .* has positions 0 to 20"),
        ({"sequence": 0, "position": -1}, "position is -1"),
        ({"sequence": 0, "position": 0, "before": -1}, "before is -1"),
        ({"sequence": 0, "position": 0, "after": -2}, "after -2; neither may be negative"),
    ],
)
def test_places_that_are_not_there(dataset: Dataset, place: dict[str, int], line: str) -> None:
    with pytest.raises(UserError, match=line):
        dataset.context(**place)
