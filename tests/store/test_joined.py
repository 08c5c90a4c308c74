"""Several datasets read as one: chunks numbered through, rows of all, and what does not go together."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.common.errors import DamagedObject, ObjectMissing, UserError
from penstock.store.dataset import Dataset
from penstock.store.joined import JoinedDataset, open_datasets
from penstock.store.layout import FORMAT_VERSION, quarantine_key
from penstock.store.manifest import Manifest
from services.synthetic import MLP, RESID, WIDTHS, make_manifest, write_dataset

SIZES = (3, 4, 2)
FIRST = make_manifest([20, 15, 18])
SECOND = make_manifest([20, 19, 20, 7], first_sequence=30)
THIRD = make_manifest([11, 20], first_sequence=70)


def changed(manifest: Manifest, part: str, **fields: Any) -> Manifest:
    pin = getattr(manifest, part).model_copy(update=fields)
    return manifest.model_copy(update={part: pin})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    directory = tmp_path_factory.mktemp("parts")
    manifests = {"first": FIRST, "second": SECOND, "third": THIRD}
    return [write_dataset(directory / name, manifest) for name, manifest in manifests.items()]


@pytest.fixture(scope="module")
def joined(parts: list[Dataset]) -> JoinedDataset:
    return open_datasets([part.url for part in parts])


def rows(acts: "np.ndarray[Any, np.dtype[Any]]") -> list[bytes]:
    return [row.tobytes() for row in acts]


def test_chunks_are_those_of_the_parts_one_after_the_other(
    joined: JoinedDataset, parts: list[Dataset]
) -> None:
    assert (joined.sizes, joined.n_chunks) == (SIZES, 9)
    own = [(part, index) for part in parts for index in range(part.n_chunks)]
    for number, (part, index) in enumerate(own):
        dataset, at = joined.locate(number)
        assert (dataset.url, at) == (part.url, index)
        assert parts[joined.part_of(number)] is part
        chunk, alone = joined.read_chunk(number), part.read_chunk(index)
        assert chunk.index == number
        assert chunk.sequence.tolist() == alone.sequence.tolist()
        assert {h: a.tobytes() for h, a in chunk.acts.items()} == {
            h: a.tobytes() for h, a in alone.acts.items()
        }
        assert joined.name_of(number) == f"chunk {index} of {part.url}"
    assert list(joined.read_chunk(4, [MLP]).acts) == [MLP]


def test_a_dataset_alone_keeps_its_own_names(parts: list[Dataset]) -> None:
    alone = JoinedDataset(parts[1:2])
    assert alone.name_of(2) == "chunk 2"
    assert alone.url == parts[1].url


def test_batches_hold_every_row_of_every_part_once_per_epoch(
    joined: JoinedDataset, parts: list[Dataset]
) -> None:
    stored = Counter(
        row
        for part in parts
        for index in range(part.n_chunks)
        for row in rows(part.read_chunk(index).acts[RESID].view(np.int16))
    )
    read: list[bytes] = []
    for batch in joined.batches([RESID, MLP], batch_rows=16, window_chunks=2, epochs=2, seed=3):
        assert len(batch[RESID]) == len(batch[MLP]) <= 16
        read += rows(batch[RESID].view(torch.int16).numpy())
    total = stored.total()
    assert Counter(read[:total]) == Counter(read[total:]) == stored
    assert read[:total] != read[total:]


def test_what_is_there_is_said_by_number(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "first", FIRST, [0, 2])
    second = write_dataset(tmp_path / "second", SECOND, [1])
    record = {"format_version": FORMAT_VERSION, "index": 3, "reason": "test", "time": time.time()}
    second.store.create_guarded(quarantine_key(3), record)
    data = JoinedDataset([first, second])
    assert data.committed() == {0, 2, 4}
    assert [chunk for chunk in range(7) if data.is_committed(chunk)] == [0, 2, 4]
    assert data.quarantined() == {6}
    with pytest.raises(ObjectMissing, match="second"):
        data.read_chunk(3)


class TestWhatDoesNotGoTogether:
    @pytest.mark.parametrize(
        ("second", "message"),
        [
            (FIRST, r"hold the same rows; list it once"),
            (changed(SECOND, "source", weights_sha256="0" * 64), r"the model weights of .* differ"),
            (changed(SECOND, "corpus", tokenizer_sha256="0" * 64), r"the tokenizer of .* differ"),
            (changed(SECOND, "corpus", held_out_rule="other"), r"the held-out rule of .* differ"),
            (make_manifest([5, 6], first_sequence=20), r"both hold sequences 20 to 29 .*dataset\.after"),
            (SECOND.model_copy(update={"retention": "window"}), r"second keeps only a window"),
        ],
        ids=["twice", "weights", "tokenizer", "held out", "overlap", "window"],
    )
    def test_it_is_refused_naming_both(self, tmp_path: Path, second: Manifest, message: str) -> None:
        urls = [
            write_dataset(tmp_path / name, manifest, []).url
            for name, manifest in (("first", FIRST), ("second", second))
        ]
        with pytest.raises(UserError, match=message) as caught:
            open_datasets(urls)
        assert "\n" not in str(caught.value)
        assert urls[1] in str(caught.value)
        assert urls[0] in str(caught.value) or second.retention == "window"

    def test_overlap_counts_within_one_corpus_only(self, tmp_path: Path) -> None:
        other = changed(SECOND, "corpus", digest="d" * 64, first_sequence=0)
        parts = [write_dataset(tmp_path / "a", FIRST, []), write_dataset(tmp_path / "b", other, [])]
        assert JoinedDataset(parts).sizes == (3, 4)

    def test_widths_of_the_hooks_that_are_read(self, tmp_path: Path) -> None:
        wide = make_manifest([20], WIDTHS | {MLP: 32}, first_sequence=30)
        parts = [write_dataset(tmp_path / "a", FIRST, []), write_dataset(tmp_path / "b", wide, [])]
        data = JoinedDataset(parts)
        assert data.d_in(RESID) == WIDTHS[RESID]
        with pytest.raises(UserError, match=rf"{MLP} has d_in 16 in .*/a and 32 in .*/b"):
            data.d_in(MLP)
        with pytest.raises(UserError, match=r"hook_out' is not in this dataset"):
            data.batches(["blocks.9.hook_out"])

    def test_none_at_all(self) -> None:
        with pytest.raises(UserError, match="at least one dataset"):
            open_datasets([])

    def test_a_part_that_is_missing_or_damaged(self, tmp_path: Path) -> None:
        first = write_dataset(tmp_path / "first", FIRST, [])
        with pytest.raises(ObjectMissing, match="none"):
            open_datasets([first.url, str(tmp_path / "none")])
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "manifest.json").write_text("{}")
        with pytest.raises(DamagedObject, match="bad"):
            open_datasets([first.url, str(tmp_path / "bad")])


def test_a_window_alone_can_be_joined_but_not_iterated(tmp_path: Path) -> None:
    manifest = SECOND.model_copy(update={"retention": "window"})
    data = JoinedDataset([write_dataset(tmp_path / "window", manifest)])
    assert data.keeps_window
    with pytest.raises(UserError, match="keeps only a window of its chunks: read it with a run"):
        data.batches([RESID])
