"""Rows of one's own: stored exactly once, carried on after anything, refused where they do not fit."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.common.errors import ModelError, PlanMismatch, UserError
from penstock.common.permutation import permutation
from penstock.deploy.heal import faults
from penstock.producer.own import store_rows
from penstock.store.arrays import BFLOAT16
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.objects import open_store
from services.trees import tree_digests

ROWS = [20, 20, 20, 20, 7]
HOOKS = {"hidden": 6, "out": 3}
MADE = ("provenance",)
"""Who made a chunk and when: no part of what follows from the rows."""


def make(index: int) -> dict[str, Any]:
    random = np.random.default_rng(index)
    return {hook: random.standard_normal((ROWS[index], width)) for hook, width in HOOKS.items()}


def store(url: Path, **changes: Any) -> Dataset:
    arguments: dict[str, Any] = {"name": "n", "version": "1", "hooks": HOOKS, "rows": ROWS, "make": make}
    return store_rows(str(url), **arguments | changes)


def test_rows_come_back_as_they_were_given(tmp_path: Path) -> None:
    dataset = store(tmp_path, rows_per_sequence=4)
    assert dataset.committed() == set(range(5))
    for index, rows in enumerate(ROWS):
        chunk, order = dataset.read_chunk(index), permutation(rows, 0, "chunk", index)
        for hook in HOOKS:
            given = torch.from_numpy(make(index)[hook]).bfloat16()[torch.from_numpy(order)]
            assert chunk.acts[hook].tobytes() == given.view(torch.int16).numpy().tobytes()
        assert chunk.sequence.tolist() == (5 * index + order // 4).tolist()
        assert chunk.position.tolist() == (order % 4).tolist()
    assert list(faults(str(tmp_path))[1]) == []


def test_any_floating_type_does(tmp_path: Path) -> None:
    def as_type(kind: Any) -> bytes:
        def cast(index: int) -> dict[str, Any]:
            rounded = {hook: torch.from_numpy(acts).bfloat16() for hook, acts in make(index).items()}
            if isinstance(kind, torch.dtype):
                return {hook: acts.to(kind).requires_grad_() for hook, acts in rounded.items()}
            return {hook: acts.float().numpy().astype(kind) for hook, acts in rounded.items()}

        dataset = store(tmp_path / str(kind), make=cast)
        return b"".join(dataset.read_chunk(i).acts["hidden"].tobytes() for i in range(5))

    types = [np.float64, np.float32, BFLOAT16, torch.bfloat16, torch.float32, torch.float64]
    assert len({as_type(kind) for kind in types}) == 1


def test_it_carries_on_where_it_ended(tmp_path: Path) -> None:
    """Killed in the middle; and one chunk's objects are half there."""
    asked: list[int] = []

    def dying(index: int) -> dict[str, Any]:
        asked.append(index)
        if index == 3:
            raise KeyboardInterrupt
        return make(index)

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "resumed", make=dying)
    left = open_store(str(tmp_path / "resumed"))
    left.delete("commits/0/1.json")
    left.delete("activations.zarr/acts/out/c/1/0")
    asked.clear()

    def noting(index: int) -> dict[str, Any]:
        asked.append(index)
        return make(index)

    dataset = store(tmp_path / "resumed", make=noting)
    assert asked == [1, 3, 4]
    assert dataset.committed() == set(range(5))
    store(tmp_path / "whole")
    assert tree_digests(tmp_path / "resumed", MADE) == tree_digests(tmp_path / "whole", MADE)


def test_several_at_once_store_each_chunk_once(tmp_path: Path) -> None:
    gate = threading.Barrier(3)

    def together(index: int) -> dict[str, Any]:
        if index == 0:
            gate.wait(30)
        return make(index)

    threads = [
        threading.Thread(target=store, args=(tmp_path / "raced",), kwargs={"make": together})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store(tmp_path / "whole")
    assert tree_digests(tmp_path / "raced", MADE) == tree_digests(tmp_path / "whole", MADE)


def test_checking_makes_damaged_chunks_again(tmp_path: Path) -> None:
    dataset = store(tmp_path)
    before = tree_digests(tmp_path, MADE)
    key = "activations.zarr/acts/hidden/c/2/0"
    dataset.store.put(key, dataset.store.get(key)[:-7])
    store(tmp_path)
    assert tree_digests(tmp_path, MADE) != before
    other = {**make(2), "hidden": make(2)["hidden"] + 1}
    with pytest.raises(UserError, match="chunk 2 is damaged, and what was made again is not what it was"):
        store(tmp_path, check=True, make=lambda index: other)
    store(tmp_path, check=True)
    assert tree_digests(tmp_path, MADE) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "2"}, "source.revision is 1 there and 2 here"),
        ({"hooks": {"hidden": 6, "out": 4}}, "hooks.1.d_in is 3 there and 4 here"),
        ({"rows": ROWS[:-1]}, "rows is 5 long"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
    ],
)
def test_other_rows_do_not_go_in_beside(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    store(tmp_path)
    before = tree_digests(tmp_path)
    with pytest.raises(PlanMismatch, match="holds another dataset") as caught:
        store(tmp_path, **changes)
    assert words in str(caught.value)
    assert tree_digests(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hooks": {}}, "hooks: give at least one"),
        ({"hooks": {"a/b": 3}}, "hooks: 'a/b' must consist of"),
        ({"hooks": {"a": 0}}, "hooks: a: d_in is 0"),
        ({"rows": []}, "rows: give the number"),
        ({"rows": [5, 0]}, "rows: give the number"),
        ({"rows_per_sequence": 0}, "rows_per_sequence: 0"),
        ({"rows": [10_000_000]}, "smaller chunks"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_stored(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        store(tmp_path / "x", **changes)
    assert not (tmp_path / "x").exists()


def test_rows_of_the_wrong_shape_or_hook(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make\(0\): hidden is \[3, 6\]; it must be \[20, 6\]"):
        store(tmp_path, make=lambda index: {"hidden": np.zeros((3, 6)), "out": np.zeros((20, 3))})
    with pytest.raises(UserError, match=r"make\(0\) gave \['hiden'\]"):
        store(tmp_path, make=lambda index: {"hiden": np.zeros((20, 6))})
    with pytest.raises(ModelError, match="non-finite"):
        store(tmp_path, make=lambda index: {h: np.full((20, w), np.nan) for h, w in HOOKS.items()})
    assert open_dataset(str(tmp_path)).committed() == set()


def test_compressed(tmp_path: Path) -> None:
    dataset = store(tmp_path / "a", compress=True)
    plain = store(tmp_path / "b")
    for index in range(5):
        there, here = dataset.read_chunk(index), plain.read_chunk(index)
        assert there.acts["hidden"].tobytes() == here.acts["hidden"].tobytes()
