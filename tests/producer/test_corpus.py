"""Packing: every token is accounted for, sequences are permuted by the seed, nothing held out leaks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from penstock.common.documents import is_held_out
from penstock.common.errors import ConfigError, PlanMismatch, UserError
from penstock.common.model.files import LoadedTokenizer
from penstock.common.permutation import permutation
from penstock.producer.corpus import NO_DOCUMENT, CorpusSettings, ensure_corpus
from penstock.producer.text import file_paths
from penstock.store.corpus import HELD_OUT, TRAIN, Corpus, open_corpus
from penstock.store.local import LocalStore
from penstock.store.verify import corpus_faults
from services.lm import shipped_tokenizer, write_text

CONTEXT = 32
SEED = 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"), documents=60)


@pytest.fixture(scope="module")
def tokenizer() -> LoadedTokenizer:
    return shipped_tokenizer()


def settings(url: Path, text: str, **changes: Any) -> CorpusSettings:
    base: dict[str, Any] = {"text": "files", "files": [text], "context": CONTEXT, "seed": SEED}
    return CorpusSettings(url=str(url), **base | changes)


def build(settings: CorpusSettings) -> Corpus:
    return ensure_corpus(settings, shipped_tokenizer(), lambda done, wanted: None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, text: str) -> Corpus:
    return build(settings(tmp_path_factory.mktemp("built") / "corpus", text))


def through_zarr(corpus: Corpus, array: str) -> npt.NDArray[np.int32]:
    """An array by zarr-python: a second way to read what was stored."""
    return np.asarray(zarr.open_array(f"{corpus.store.url}/corpus.zarr/{array}", mode="r")[...])


def streams(corpus: Corpus, text: str) -> Iterator[tuple[str, list[int], list[int]]]:
    """(split, tokens, document of each token) as they must be before cutting, one file at a time."""
    files = dict(file_paths([text]))
    tokenizer = shipped_tokenizer()
    for split in (TRAIN, HELD_OUT):
        tokens: list[int] = []
        owners: list[int] = []
        for number, path in enumerate(corpus.documents()):
            if is_held_out(path) == (split == HELD_OUT):
                ids = tokenizer.tokenizer.encode(files[path].read_text(), add_special_tokens=False).ids
                assert tokenizer.eos_id is not None
                tokens += [*ids, tokenizer.eos_id]
                owners += [number] * (len(ids) + 1)
        yield split, tokens, owners


@pytest.mark.parametrize("split", [TRAIN, HELD_OUT])
def test_every_token_is_in_its_place(corpus: Corpus, text: str, split: str) -> None:
    expected = {name: (tokens, owners) for name, tokens, owners in streams(corpus, text)}
    tokens, owners = expected[split]
    n = corpus.n_sequences(split)
    body = CONTEXT - 1
    assert n == len(tokens) // body > 3
    stored = corpus.tokens(0, n, split)
    document = through_zarr(corpus, f"{split}/document")
    assert (stored[:, 0] == shipped_tokenizer().bos_id).all()
    assert (document[:, 0] == NO_DOCUMENT).all()
    order = np.argsort(permutation(n, SEED, "corpus", split))
    assert stored[order, 1:].reshape(-1).tolist() == tokens[: n * body]
    assert document[order, 1:].reshape(-1).tolist() == owners[: n * body]


def test_every_document_is_taken_in_an_order_drawn_from_the_seed(corpus: Corpus, text: str) -> None:
    paths = [path for path, _ in file_paths([text])]
    names = corpus.documents()
    assert sorted(names) == sorted(paths)
    assert names == [paths[i] for i in permutation(len(paths), SEED, "documents")]
    assert names != paths
    assert corpus.manifest.n_documents == len(paths)


def test_sequences_are_permuted(corpus: Corpus) -> None:
    document = through_zarr(corpus, "train/document")[:, 1].astype(int)
    assert (np.diff(document) < 0).sum() > len(document) / 4


def test_special_counts_are_right(corpus: Corpus) -> None:
    n = corpus.n_sequences(TRAIN)
    tokens = corpus.tokens(0, n)
    special = [sum(int(t) in shipped_tokenizer().special_ids for t in row) for row in tokens]
    assert corpus.special_counts(0, n).tolist() == special
    assert min(special) >= 1
    assert max(special) >= 2, "an end of text lies in some sequence"


def test_held_out_documents_are_only_in_held_out(corpus: Corpus) -> None:
    names = corpus.documents()
    for split in (TRAIN, HELD_OUT):
        owners = set(through_zarr(corpus, f"{split}/document").flatten().tolist()) - {NO_DOCUMENT}
        assert owners
        assert all(is_held_out(names[owner]) == (split == HELD_OUT) for owner in owners)


def test_zarr_reads_what_the_corpus_reads(corpus: Corpus) -> None:
    for split in (TRAIN, HELD_OUT):
        n = corpus.n_sequences(split)
        assert np.array_equal(through_zarr(corpus, f"{split}/tokens"), corpus.tokens(0, n, split))
    assert np.array_equal(corpus.tokens(3, 7), through_zarr(corpus, "train/tokens")[3:7])


def test_the_same_settings_give_the_same_corpus_anywhere(corpus: Corpus, text: str, tmp_path: Path) -> None:
    again = build(settings(tmp_path / "elsewhere", text))
    assert again.manifest.digest == corpus.manifest.digest
    other = build(settings(tmp_path / "other-seed", text, seed=SEED + 1))
    assert other.manifest.digest != corpus.manifest.digest


def test_building_again_changes_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = settings(tmp_path / "corpus", text)
    build(wanted)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr("penstock.producer.corpus._documents", lambda settings: pytest.fail("read again"))
    build(wanted)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_build_that_was_killed_is_carried_on(
    text: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(tmp_path / "corpus", text)
    create = LocalStore.create
    creates = 0

    def dies(store: LocalStore, key: str, data: bytes) -> bool:
        nonlocal creates
        creates += 1
        if creates == 12:
            raise KeyboardInterrupt
        return create(store, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "create", dies)
        with pytest.raises(KeyboardInterrupt):
            build(wanted)
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    assert build(wanted).manifest.digest == corpus.manifest.digest
    assert list(corpus_faults(open_corpus(wanted.url))) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("context", 64), ("seed", 6), ("bos", "none"), ("max_tokens", 1000), ("max_held_out_tokens", 100)],
)
def test_other_settings_are_refused_by_name(corpus: Corpus, text: str, field: str, value: object) -> None:
    wanted = settings(Path(corpus.store.url), text, **{field: value})
    with pytest.raises(PlanMismatch, match=rf"another corpus: {field} is .* there and {value} here"):
        build(wanted)


def test_another_tokenizer_is_refused(corpus: Corpus, text: str, tokenizer: LoadedTokenizer) -> None:
    other = replace(tokenizer, sha256="0" * 64)
    with pytest.raises(PlanMismatch, match="tokenizer_sha256"):
        ensure_corpus(settings(Path(corpus.store.url), text), other, lambda done, wanted: None)


def test_max_tokens_ends_with_the_document_that_reaches_it(text: str, tmp_path: Path) -> None:
    limited = build(settings(tmp_path / "corpus", text, max_tokens=2_000, max_held_out_tokens=300))
    longest = 31 + max(
        len(shipped_tokenizer().tokenizer.encode(file.read_text()).ids) for _, file in file_paths([text])
    )
    body = CONTEXT - 1
    assert 2_000 - body < limited.manifest.n_sequences * body < 2_000 + longest
    assert 300 - body < limited.manifest.n_held_out * body < 300 + longest


def test_without_bos_sequences_are_text_from_the_first_position(
    corpus: Corpus, text: str, tmp_path: Path
) -> None:
    plain = build(settings(tmp_path / "corpus", text, bos="none"))
    n = plain.n_sequences(TRAIN)
    tokens = next(tokens for split, tokens, _ in streams(plain, text) if split == TRAIN)
    assert n == len(tokens) // CONTEXT
    order = np.argsort(permutation(n, SEED, "corpus", TRAIN))
    assert plain.tokens(0, n)[order].reshape(-1).tolist() == tokens[: n * CONTEXT]


def test_a_tokenizer_without_bos_is_refused(text: str, tmp_path: Path, tokenizer: LoadedTokenizer) -> None:
    with pytest.raises(UserError, match=r"corpus\.bos"):
        ensure_corpus(
            settings(tmp_path / "corpus", text), replace(tokenizer, bos_id=None), lambda done, wanted: None
        )


def test_without_end_of_text_documents_follow_each_other(
    text: str, tmp_path: Path, tokenizer: LoadedTokenizer
) -> None:
    bare = replace(tokenizer, eos_id=None)
    corpus = ensure_corpus(settings(tmp_path / "corpus", text), bare, lambda done, wanted: None)
    assert (corpus.special_counts(0, corpus.n_sequences(TRAIN)) == 1).all()


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"the text gives \d+ tokens, fewer than one sequence of 32"):
        build(settings(tmp_path / "corpus", str(tmp_path / "*.txt")))
    assert not (tmp_path / "corpus" / "manifest.json").exists()


def test_a_local_dataset_is_packed(tmp_path: Path) -> None:
    import datasets

    rows = [f"def f{i}():\n    return {i}\n" * 3 for i in range(40)]
    datasets.Dataset.from_dict({"code": rows}).save_to_disk(str(tmp_path / "saved"))
    wanted = CorpusSettings(
        url=str(tmp_path / "corpus"),
        text="dataset",
        dataset=str(tmp_path / "saved"),
        column="code",
        context=16,
    )
    corpus = build(wanted)
    assert corpus.manifest.description == "dataset: saved, column code"
    assert corpus.documents() == [f"row-{i:09d}" for i in range(40)]
    held_out = set(through_zarr(corpus, "held_out/document").flatten().tolist()) - {NO_DOCUMENT}
    assert held_out == {10, 17, 35}
    decoded = shipped_tokenizer().tokenizer.decode(corpus.tokens(0, 1)[0, 1:].tolist())
    assert "return" in decoded


def test_a_source_that_is_not_given_is_refused() -> None:
    with pytest.raises(ValueError, match="files must list patterns"):
        CorpusSettings(text="files")
    with pytest.raises(ValueError, match="dataset must name a directory"):
        CorpusSettings(text="dataset")
