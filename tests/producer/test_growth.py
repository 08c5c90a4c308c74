"""Growing: a dataset that begins where earlier ones end, on the very rows of one bigger dataset."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import ConfigError
from penstock.producer.corpus import CorpusSettings, ensure_corpus
from penstock.producer.plan import DatasetSettings, plan_dataset
from penstock.producer.source import LanguageModelSource
from penstock.store.corpus import Corpus
from penstock.store.dataset import Dataset
from penstock.store.objects import open_store
from penstock.store.writer import DatasetWriter
from services.lm import MLP_2, RESID_3, shipped_model, shipped_tokenizer, write_text

PER_CHUNK = 6
Rows = dict[tuple[int, int], tuple[int, dict[str, bytes]]]
"""(sequence, position) -> token and the bits of its row at each hook point."""


def settings(url: Path | str, **changes: Any) -> DatasetSettings:
    base: dict[str, Any] = {
        "url": str(url),
        "hooks": [RESID_3, MLP_2],
        "sequences_per_chunk": PER_CHUNK,
        "sequences_per_forward": 4,
    }
    return DatasetSettings(**base | changes)


def begin(corpus: Corpus, url: Path | str, **changes: Any) -> Dataset:
    """A dataset of which only the manifest is there."""
    plan = plan_dataset(settings(url, **changes), corpus, shipped_model())
    DatasetWriter(open_store(str(url)), plan).close()
    return Dataset(open_store(str(url)), plan)


def make(corpus: Corpus, url: Path, **changes: Any) -> Dataset:
    """A whole dataset."""
    dataset = begin(corpus, url, **changes)
    writer = DatasetWriter(dataset.store, dataset.manifest)
    source = LanguageModelSource(dataset.manifest, corpus, shipped_model())
    for index in range(dataset.n_chunks):
        writer.write(index, source.chunk(index))
    writer.close()
    return dataset


def rows_of(*datasets: Dataset) -> Rows:
    found: Rows = {}
    for dataset in datasets:
        for index in range(dataset.n_chunks):
            chunk = dataset.read_chunk(index)
            for row in range(chunk.rows):
                place = (int(chunk.sequence[row]), int(chunk.position[row]))
                assert place not in found, f"{place} is stored twice"
                acts = {hook: values[row].tobytes() for hook, values in chunk.acts.items()}
                found[place] = (int(chunk.tokens[row]), acts)
    return found


def test_parts_hold_the_very_rows_of_one_bigger_dataset(small_corpus: Corpus, tmp_path: Path) -> None:
    whole = make(small_corpus, tmp_path / "whole")
    first = make(small_corpus, tmp_path / "first", max_rows=sum(whole.manifest.rows[:2]))
    second = make(small_corpus, tmp_path / "second", after=first.url, max_rows=whole.manifest.rows[2])
    third = make(small_corpus, tmp_path / "third", after=[first.url, second.url])

    pins = [part.manifest.corpus for part in (first, second, third)]
    assert [pin.first_sequence for pin in pins] == [0, 2 * PER_CHUNK, 3 * PER_CHUNK]
    assert [pin.end for pin in pins] == [2 * PER_CHUNK, 3 * PER_CHUNK, small_corpus.manifest.n_sequences]
    assert first.manifest.rows + second.manifest.rows + third.manifest.rows == whole.manifest.rows
    assert rows_of(first, second, third) == rows_of(whole)


def test_it_begins_where_the_last_of_those_before_it_ends(small_corpus: Corpus, tmp_path: Path) -> None:
    first = begin(small_corpus, tmp_path / "first", max_rows=1)
    second = begin(small_corpus, tmp_path / "second", max_rows=1, after=first.url)
    for after in ([first.url, second.url], [second.url, first.url], second.url):
        plan = plan_dataset(settings(tmp_path / "x", after=after), small_corpus, shipped_model())
        assert plan.corpus.first_sequence == 2 * PER_CHUNK


def test_a_dataset_of_another_corpus_is_no_beginning(small_corpus: Corpus, tmp_path: Path) -> None:
    other = ensure_corpus(
        CorpusSettings(
            url=str(tmp_path / "corpus"),
            text="files",
            files=[write_text(tmp_path / "text", documents=50)],
            context=24,
        ),
        shipped_tokenizer(),
        lambda done, wanted: None,
    )
    first = begin(other, tmp_path / "first", max_rows=1)
    with pytest.raises(ConfigError, match=r"dataset\.after: .*first is of the corpus") as caught:
        plan_dataset(settings(tmp_path / "x", after=first.url), small_corpus, shipped_model())
    for corpus in (other, small_corpus):
        assert corpus.manifest.digest[:12] in str(caught.value), "both are named"


def test_where_nothing_is_left_nothing_begins(small_corpus: Corpus, tmp_path: Path) -> None:
    whole = begin(small_corpus, tmp_path / "whole")
    n = small_corpus.manifest.n_sequences
    with pytest.raises(ConfigError, match=rf"dataset\.after: .* use all {n} sequences"):
        plan_dataset(settings(tmp_path / "x", after=whole.url), small_corpus, shipped_model())


def test_more_rows_than_are_left_are_refused(small_corpus: Corpus, tmp_path: Path) -> None:
    whole = begin(small_corpus, tmp_path / "whole").manifest.rows
    first = begin(small_corpus, tmp_path / "first", max_rows=sum(whole[:-1]))
    more = settings(tmp_path / "x", after=first.url, max_rows=whole[-1] + 1)
    with pytest.raises(ConfigError, match=rf"dataset\.max_rows: .* the corpus has {whole[-1]} left"):
        plan_dataset(more, small_corpus, shipped_model())


def test_an_earlier_dataset_may_be_gone_once_the_later_one_has_begun(
    small_corpus: Corpus, tmp_path: Path
) -> None:
    first = begin(small_corpus, tmp_path / "first", max_rows=1)
    second = begin(small_corpus, tmp_path / "second", after=first.url)
    shutil.rmtree(tmp_path / "first")
    again = plan_dataset(settings(second.url, after=first.url), small_corpus, shipped_model())
    assert again == second.manifest
    with pytest.raises(ConfigError, match=r"dataset\.after: no dataset at .*first; make it first"):
        plan_dataset(settings(tmp_path / "third", after=first.url), small_corpus, shipped_model())
