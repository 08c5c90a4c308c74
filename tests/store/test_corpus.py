"""The stored corpus: what was packed comes back, across blocks, and never changed unnoticed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.errors import DamagedObject, ObjectMissing, PlanMismatch, UserError
from penstock.store import corpus as corpus_module
from penstock.store.corpus import HELD_OUT, TRAIN, Corpus, PackedText, open_corpus, write_corpus
from penstock.store.local import LocalStore
from penstock.store.records import crc32c, encode_record
from penstock.store.verify import corpus_faults

CONTEXT = 5
BLOCK = 8
DOCUMENTS = ["a.py", "b/c.py"]
PLAN: dict[str, object] = {
    "description": "text",
    "revision": None,
    "tokenizer_sha256": "aa",
    "special_ids": [0],
    "bos": "prepend",
    "context": CONTEXT,
    "seed": 3,
    "held_out_rule": "none",
    "max_tokens": None,
    "max_held_out_tokens": 100,
}


def packed(n: int, seed: int) -> PackedText:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 2**31, (n, CONTEXT)).astype(np.int32)
    document = random.integers(-1, len(DOCUMENTS), (n, CONTEXT)).astype(np.int32)
    return PackedText(tokens, document, random.integers(0, CONTEXT, n).astype(np.int32))


SPLITS = {TRAIN: packed(27, 1), HELD_OUT: packed(3, 2)}


def write(directory: Path, **changes: Any) -> LocalStore:
    store = LocalStore(str(directory))
    arguments: dict[str, Any] = {"plan": PLAN, "splits": SPLITS, "documents": DOCUMENTS} | changes
    write_corpus(store, **arguments)
    return store


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "BLOCK_SEQUENCES", BLOCK)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return open_corpus(write(tmp_path / "corpus").url)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "BLOCK_SEQUENCES", BLOCK)
        return open_corpus(write(tmp_path_factory.mktemp("corpus")).url)


def faults(corpus: Corpus) -> list[str]:
    return [str(fault) for fault in corpus_faults(corpus)]


def test_everything_comes_back(corpus: Corpus) -> None:
    assert np.array_equal(corpus.tokens(0, 27), SPLITS[TRAIN].tokens)
    assert np.array_equal(corpus.tokens(0, 3, HELD_OUT), SPLITS[HELD_OUT].tokens)
    assert np.array_equal(corpus.special_counts(0, 27), SPLITS[TRAIN].special)
    assert corpus.documents() == DOCUMENTS
    assert (corpus.n_sequences(TRAIN), corpus.n_sequences(HELD_OUT)) == (27, 3)
    assert corpus.manifest.n_documents == 2
    assert faults(corpus) == []


@given(st.integers(0, 27), st.integers(0, 27))
def test_any_stretch_is_read_across_blocks(kept: Corpus, a: int, b: int) -> None:
    start, stop = sorted((a, b))
    tokens = kept.tokens(start, stop)
    assert tokens.shape == (stop - start, CONTEXT)
    assert np.array_equal(tokens, SPLITS[TRAIN].tokens[start:stop])
    assert np.array_equal(kept.special_counts(start, stop), SPLITS[TRAIN].special[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 28)])
def test_sequences_that_are_not_there_are_refused(corpus: Corpus, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="of 27 train"):
        corpus.tokens(start, stop)


def test_only_the_blocks_needed_are_read(corpus: Corpus) -> None:
    for block in (0, 2, 3):
        corpus.store.delete(f"corpus.zarr/train/tokens/c/{block}/0")
    assert np.array_equal(corpus.tokens(BLOCK, 2 * BLOCK), SPLITS[TRAIN].tokens[BLOCK : 2 * BLOCK])
    with pytest.raises(ObjectMissing):
        corpus.tokens(BLOCK, 2 * BLOCK + 1)


def test_zarr_reads_the_same(corpus: Corpus) -> None:
    group = zarr.open_group(f"{corpus.store.url}/corpus.zarr", mode="r")
    for split, text in SPLITS.items():
        for name in ("tokens", "document", "special"):
            array: Any = group[f"{split}/{name}"]
            assert np.array_equal(array[:], getattr(text, name))


def test_a_corpus_without_held_out_text(tmp_path: Path) -> None:
    store = write(tmp_path, splits={TRAIN: SPLITS[TRAIN], HELD_OUT: packed(0, 0)})
    corpus = open_corpus(store.url)
    assert corpus.tokens(0, 0, HELD_OUT).shape == (0, CONTEXT)
    assert faults(corpus) == []


def test_blocks_of_another_size_are_read_as_they_were_written(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "BLOCK_SEQUENCES", 4)
        store = write(tmp_path)
    assert np.array_equal(open_corpus(store.url).tokens(2, 27), SPLITS[TRAIN].tokens[2:])


def test_flipped_bits_are_noticed(corpus: Corpus) -> None:
    key = "corpus.zarr/train/tokens/c/1/0"
    whole = corpus.store.get(key)
    for bit in range(0, len(whole) * 8, 5):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (Path(corpus.store.url) / key).write_bytes(flipped)
        with pytest.raises(DamagedObject, match=key):
            corpus.tokens(BLOCK, BLOCK + 1)
    assert len(faults(corpus)) == 1


def test_a_block_with_a_checksum_of_its_own_is_still_another(corpus: Corpus) -> None:
    corpus.store.put("corpus.zarr/train/tokens/c/1/0", corpus.store.get("corpus.zarr/train/tokens/c/0/0"))
    with pytest.raises(DamagedObject, match="tokens/c/1/0"):
        corpus.tokens(BLOCK, BLOCK + 1)


def test_verify_counts_objects_and_names_each_fault(corpus: Corpus) -> None:
    corpus.store.delete("corpus.zarr/held_out/special/c/0")
    corpus.store.put("corpus.zarr/train/document/c/2/0", b"")
    checked: list[str] = []
    found = [str(fault) for fault in corpus_faults(corpus, checked.append)]
    # 27 sequences are four blocks, 3 are one; three arrays each
    assert len(checked) == 15
    assert len(found) == 2
    assert "train/document/c/2/0" in found[0]
    assert "held_out/special/c/0" in found[1]


@pytest.mark.parametrize("other", [b"not a record", encode_record({"paths": ["x"]})])
def test_documents_are_those_of_the_corpus(corpus: Corpus, other: bytes) -> None:
    corpus.store.put("documents.json", other)
    with pytest.raises(DamagedObject, match=r"documents\.json"):
        corpus.documents()
    assert len(faults(corpus)) == 1


def test_the_digest_covers_every_token(tmp_path: Path) -> None:
    digests = set()
    changed = packed(27, 1)
    changed.tokens[26, 4] ^= 1
    for number, train in enumerate((SPLITS[TRAIN], changed)):
        store = write(tmp_path / str(number), splits=SPLITS | {TRAIN: train})
        manifest = open_corpus(store.url).manifest
        digests.add(manifest.digest)
        values = store.get("corpus.zarr/train/tokens/c/3/0")[:-4]
        assert manifest.blocks["train/tokens"][3] == crc32c(values)
    assert len(digests) == 2


def test_writing_twice_is_one_corpus(tmp_path: Path) -> None:
    digests = {open_corpus(write(tmp_path).url).manifest.digest for _ in range(2)}
    assert len(digests) == 1


@pytest.mark.parametrize("finished", [True, False])
def test_another_corpus_at_the_url_is_refused(tmp_path: Path, finished: bool) -> None:
    store = write(tmp_path)
    before = open_corpus(store.url).manifest
    if not finished:
        store.delete("manifest.json")
    with pytest.raises(PlanMismatch, match="another corpus") as refusal:
        write(tmp_path, splits=SPLITS | {TRAIN: packed(27, 9)})
    assert store.url in str(refusal.value)
    write(tmp_path)
    assert open_corpus(store.url).manifest == before


def test_another_plan_at_the_url_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(PlanMismatch, match="seed is 3 there and 4 here"):
        write(tmp_path, plan=PLAN | {"seed": 4})


def test_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus whose writing was cut short at any object does not exist, and can be finished."""
    whole = {key for key, _ in write(tmp_path / "whole").list("")}
    real = LocalStore._create
    for made in range(0, len(whole), 4):
        left = made

        def cut(store: LocalStore, key: str, data: bytes) -> bool:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return real(store, key, data)

        directory = tmp_path / str(made)
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "_create", cut)
            with pytest.raises(KeyboardInterrupt):
                write(directory)
        with pytest.raises(ObjectMissing, match=r"manifest\.json"):
            open_corpus(str(directory))
    store = write(directory)
    assert {key for key, _ in store.list("")} == whole


def test_a_newer_format_is_refused(corpus: Corpus) -> None:
    record = corpus.manifest.model_dump(mode="json") | {"format_version": 2}
    corpus.store.put("manifest.json", encode_record(record))
    with pytest.raises(UserError, match=r"format version 2.*upgrade"):
        open_corpus(corpus.store.url)


def test_a_record_that_is_no_manifest_is_damaged(corpus: Corpus) -> None:
    corpus.store.put("manifest.json", encode_record({"format_version": 1}))
    with pytest.raises(DamagedObject, match="not a corpus manifest"):
        open_corpus(corpus.store.url)
