"""Hugging Face datasets: directories, and names on a hub that is played here; read only as far as needed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.common.documents import Document
from penstock.common.errors import ConfigError, PlanMismatch, Unavailable
from penstock.producer import hub as hub_module
from penstock.producer.corpus import CorpusSettings, ensure_corpus
from penstock.producer.hub import TableText, dataset_documents, find_commit
from penstock.store.corpus import open_corpus
from services.hub import Hub, serving
from services.lm import shipped_tokenizer

COMMIT = "ab12" * 10


def documents(path: Path | str, column: str = "text", **changes: Any) -> list[Document]:
    return list(dataset_documents(TableText(str(path), column, **changes)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    import datasets

    table = datasets.Dataset.from_dict({"text": ["first", "", "third"], "body": ["x", "y", "z"]})
    table.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


class TestSaved:
    def test_rows_are_documents(self, saved: Path) -> None:
        assert documents(saved) == [Document("row-000000000", "first"), Document("row-000000002", "third")]
        assert [d.text for d in documents(saved, "body")] == ["x", "y", "z"]

    def test_the_training_split_is_taken_unless_another_is_named(self, tmp_path: Path) -> None:
        import datasets

        splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("test", "train")}
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
        assert documents(tmp_path / "both") == [Document("row-000000000", "train")]
        assert documents(tmp_path / "both", split="test") == [Document("row-000000000", "test")]
        with pytest.raises(
            ConfigError, match=r"corpus\.split: no split 'tests'.*Did you mean test\?.*test, tr"
        ):
            documents(tmp_path / "both", split="tests")

    def test_a_single_table_has_neither_splits_nor_configurations(self, saved: Path) -> None:
        with pytest.raises(ConfigError, match=r"corpus\.split: .* single table"):
            documents(saved, split="train")
        with pytest.raises(ConfigError, match=r"corpus\.dataset_config: .* has none"):
            documents(saved, config="en")


ROWS = [f"text {number}\n" if number % 7 else "" for number in range(50)]


def write(directory: Path, kind: str) -> Path:
    """The rows in two files of a kind."""
    import datasets

    directory.mkdir()
    for part, rows in (("a", ROWS[:20]), ("b", ROWS[20:])):
        table = datasets.Dataset.from_dict({"number": range(len(rows)), "text": rows})
        if kind == "json":
            table.to_json(str(directory / f"{part}.jsonl"))
        elif kind == "parquet":
            table.to_parquet(str(directory / f"{part}.parquet"))
        elif kind == "csv":
            table.to_csv(str(directory / f"{part}.csv"))
        else:
            (directory / f"{part}.txt").write_text("".join(row or "\n" for row in rows))
    return directory


class TestDirectory:
    @pytest.mark.parametrize("kind", ["json", "parquet", "csv", "text"])
    def test_files_are_streamed_in_the_order_of_their_rows(
        self, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        found = documents(write(tmp_path / "files", kind))
        expected = [(f"row-{n:09d}", row.strip()) for n, row in enumerate(ROWS) if row]
        assert [(d.path, d.text.strip()) for d in found] == expected
        assert not list((tmp_path / "cache").rglob("*.arrow")), "it was copied to this machine"

    def test_configurations_are_those_of_its_card(self, tmp_path: Path) -> None:
        for language in ("de", "en"):
            (tmp_path / language).mkdir()
            (tmp_path / language / "train.jsonl").write_text(json.dumps({"text": language}) + "\n")
        configs = [{"config_name": name, "data_files": f"{name}/*.jsonl"} for name in ("de", "en")]
        (tmp_path / "README.md").write_text("---\n" + yaml.safe_dump({"configs": configs}) + "---\n")
        assert [d.text for d in documents(tmp_path, config="en")] == ["en"]
        for config in (None, "eng"):
            with pytest.raises(ConfigError, match=r"corpus\.dataset_config: .*\['de', 'en'\]") as caught:
                documents(tmp_path, config=config)
            assert "\n" not in str(caught.value)

    def test_what_cannot_be_read_is_refused(self, tmp_path: Path, saved: Path) -> None:
        with pytest.raises(ConfigError, match=r"corpus\.column: no column 'txt'.*Did you mean text"):
            documents(saved, "txt")
        with pytest.raises(ConfigError, match=r"corpus\.column: 'number' of .* holds int and not text"):
            documents(write(tmp_path / "files", "json"), "number")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match=r"corpus\.dataset: .*cannot be read") as caught:
            documents(tmp_path / "empty")
        assert "\n" not in str(caught.value)
        (tmp_path / "files" / "b.jsonl").write_text('{"number": 1, "text": "x"}\n{"numb')
        with pytest.raises(
            ConfigError, match=r"corpus\.dataset: .*cannot be read as a dataset after \d+ rows"
        ):
            documents(tmp_path / "files")


class Stream:
    """Rows without end, that says how far it was read and whether it was closed."""

    def __init__(self, error: Exception | None = None) -> None:
        self.read = 0
        self.closed = False
        self._error = error

    def rows(self) -> Iterator[dict[str, str]]:
        try:
            while True:
                if self._error is not None and self.read == 3:
                    raise self._error
                self.read += 1
                yield {"text": f"def f{self.read}():\n    return {self.read}\n" * 5}
        finally:
            self.closed = True


def corpus_settings(url: Path, **changes: Any) -> CorpusSettings:
    base: dict[str, Any] = {
        "url": str(url),
        "text": "dataset",
        "dataset": "someone/texts",
        "revision": COMMIT,
        "context": 16,
    }
    return CorpusSettings(**base | changes)


class TestStream:
    def test_reading_stops_as_soon_as_both_splits_are_full(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = Stream()
        monkeypatch.setattr(hub_module, "_table", lambda text: stream.rows())
        settings = corpus_settings(tmp_path / "corpus", max_tokens=30_000, max_held_out_tokens=1_000)
        corpus = ensure_corpus(settings, shipped_tokenizer(), lambda done, wanted: None)
        tokens = sum(n * 15 for n in (corpus.manifest.n_sequences, corpus.manifest.n_held_out))
        assert 30_000 < tokens < 35_000
        per_row = tokens / corpus.manifest.n_documents
        assert stream.read <= 35_000 / per_row + 64, "at most what is tokenised at once is read besides"
        assert stream.closed

    def test_a_full_training_split_does_not_read_on_further_than_it_must(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Held-out rows are one in twenty: 64 of them would be more than a thousand rows."""
        stream = Stream()
        monkeypatch.setattr(hub_module, "_table", lambda text: stream.rows())
        settings = corpus_settings(tmp_path / "corpus", max_tokens=1_000, max_held_out_tokens=300)
        corpus = ensure_corpus(settings, shipped_tokenizer(), lambda done, wanted: None)
        last = corpus.documents()[-1]
        assert stream.read - 1 == max(int(last.removeprefix("row-")), 63)

    def test_rows_are_read_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = Stream()
        monkeypatch.setattr(hub_module, "_table", lambda text: stream.rows())
        with closing(dataset_documents(TableText("someone/texts", "text", commit=COMMIT))) as found:
            assert [d.path for d in islice(found, 2)] == ["row-000000000", "row-000000001"]
            assert stream.read == 2

    @pytest.mark.parametrize(
        "error", [ConnectionError("at https://x?sig=secret"), OSError("hf_secretSecret")]
    )
    def test_a_hub_that_breaks_off_says_where(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        monkeypatch.setattr(hub_module, "_table", lambda text: Stream(error).rows())
        with pytest.raises(Unavailable, match="broke off after 3 rows of someone/texts") as caught:
            documents("someone/texts", commit=COMMIT)
        assert "secret" not in str(caught.value)

    def test_a_token_is_never_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        error = ValueError("Invalid header value b'Bearer hf_secretSecret\\n'")
        monkeypatch.setattr(hub_module, "_table", lambda text: Stream(error).rows())
        with pytest.raises(ConfigError, match="Bearer hf_…") as caught:
            documents("someone/texts", commit=COMMIT)
        assert "secret" not in str(caught.value)


class TestName:
    def test_what_is_neither_a_directory_nor_a_hub_name_is_refused(self, tmp_path: Path) -> None:
        for name in (str(tmp_path / "nowhere"), "nowhere", "../there", "a/b/c", "a/b c"):
            with pytest.raises(ConfigError, match=r"corpus\.dataset: .* is not a directory; .*hub name"):
                find_commit(name, None)

    def test_a_directory_has_no_revision(self, tmp_path: Path) -> None:
        assert find_commit(str(tmp_path), None) is None
        with pytest.raises(ConfigError, match=r"corpus\.revision: goes with a hub name"):
            find_commit(str(tmp_path), "main")

    def test_a_commit_is_taken_at_its_word(self) -> None:
        assert find_commit("someone/texts", COMMIT) == COMMIT

    def test_settings_of_datasets_go_with_datasets(self) -> None:
        for field in ("dataset_config", "split", "revision"):
            with pytest.raises(ValueError, match=f"{field} goes with text: dataset"):
                CorpusSettings.model_validate({field: "x"})

    def test_the_recorded_commit_counts_unless_another_one_is_asked_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hub_module, "_table", lambda text: Stream().rows())
        limits = {"max_tokens": 1_000, "max_held_out_tokens": 100}
        url = tmp_path / "corpus"

        def build(**changes: Any) -> str:
            settings = corpus_settings(url, **limits, **changes)
            return ensure_corpus(settings, shipped_tokenizer(), lambda done, wanted: None).manifest.digest

        first = build()
        manifest = open_corpus(str(url)).manifest
        assert manifest.revision == COMMIT
        assert manifest.description == f"dataset: someone/texts at {COMMIT[:12]}, column text"
        assert build(revision="main") == build(revision=None) == first, "wherever main is by now"
        with pytest.raises(PlanMismatch, match=f"description is .* at {COMMIT[:12]}, column text there"):
            build(revision="cd34" * 10)
        with pytest.raises(PlanMismatch, match="description"):
            build(split="test")


SHARDS, PER_SHARD = 12, 200

SHELL = """
import contextlib, io, json, sys
from penstock.deploy.cli import main
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(json.loads(line))
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Shell:
    """`penstock` commands in one process, which talks to a hub of ours."""

    def __init__(self, hub: Hub, directory: Path, **environment: str) -> None:
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(directory / "home"), "NO_PROXY": "127.0.0.1"}
        self.directory = directory
        self._child = subprocess.Popen(
            [sys.executable, "-c", SHELL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=plain | places | environment,
        )

    def penstock(self, *arguments: str) -> tuple[int, str, str]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(json.dumps(arguments), file=self._child.stdin, flush=True)
        code, out, err = json.loads(self._child.stdout.readline())
        return int(code), str(out), str(err)

    def corpus(self, **changes: Any) -> tuple[int, str, str]:
        settings = corpus_settings(self.directory / "corpus").model_dump(exclude_defaults=True)
        settings |= {"revision": None, "max_tokens": 20_000, "max_held_out_tokens": 500, "url": "corpus"}
        config = {"workdir": str(self.directory), "corpus": settings | changes, "dataset": {"hooks": ["x"]}}
        self.config = self.directory / "config.yaml"
        self.config.write_text(yaml.safe_dump(config))
        return self.penstock("corpus", str(self.config))

    def close(self) -> None:
        with self._child:
            pass  # closes its pipes, upon which it ends


def shards(salt: str = "") -> dict[str, bytes]:
    files = {
        f"data/train-{shard:05d}-of-{SHARDS:05d}.jsonl": "".join(
            json.dumps({"text": f"def f{shard}_{row}():\n    return {row}{salt}\n" * 5}) + "\n"
            for row in range(PER_SHARD)
        ).encode()
        for shard in range(SHARDS)
    }
    return files | {"README.md": b"---\nlicense: mit\n---\nSome texts.\n"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as served:
        yield served


def test_a_hub_dataset_from_its_name_to_a_corpus(hub: Hub, tmp_path: Path) -> None:
    commit = hub.push("someone/texts", shards())
    with closing(Shell(hub, tmp_path)) as shell:
        code, _, err = shell.corpus()
        assert code == 0, err
        manifest = open_corpus(str(tmp_path / "corpus")).manifest
        assert manifest.revision == commit
        assert manifest.description == f"dataset: someone/texts at {commit[:12]}, column text"
        assert open_corpus(str(tmp_path / "corpus")).documents()[0] == "row-000000000"
        served = [path for path in hub.served if path.startswith("data/")]
        assert 0 < len(served) <= SHARDS // 2, "much more was downloaded than was needed"
        assert all(f"/resolve/{commit}/" in line for line in hub.asked if "/resolve/" in line)

        # the dataset moves on, the hub goes away: the corpus stays what it is
        later = hub.push("someone/texts", shards("  # new"))
        assert later != commit
        hub.down = True
        assert shell.corpus()[0] == 0
        assert open_corpus(str(tmp_path / "corpus")).manifest == manifest
        hub.down = False
        code, _, err = shell.corpus(revision=later)
        assert (code, err.count("\n")) == (2, 1)
        assert later[:12] in err
        assert commit[:12] in err

        # what is damaged is packed again from the very commit
        (block,) = (tmp_path / "corpus").glob("corpus.zarr/train/tokens/c/0/0")
        before = block.read_bytes()
        block.write_bytes(before[:-1])
        assert shell.corpus()[0] == 0
        assert "1 objects packed again" in shell.penstock("repair", str(shell.config))[1]
        assert block.read_bytes() == before


def test_what_the_hub_refuses_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.push("someone/texts", shards())
    hub.push("someone/gated", shards())
    hub.gated.add("someone/gated")
    told: list[str] = []
    with closing(Shell(hub, tmp_path)) as shell:
        for changes, message in (
            ({"dataset": "someone/txts"}, "corpus.dataset: someone/txts is neither a directory here nor"),
            ({"revision": "v9"}, "corpus.revision: someone/texts has no such revision on the hub"),
            ({"dataset": "someone/gated"}, "corpus.dataset: someone/gated is gated on the hub"),
            ({"split": "trian"}, "corpus.split: no split 'trian' in someone/texts. Did you mean train?"),
            ({"column": "txt"}, "corpus.column: no column 'txt' in someone/texts. Did you mean text?"),
            ({"dataset_config": "en"}, "corpus.dataset_config: someone/texts: "),
        ):
            code, out, err = shell.corpus(**changes)
            told.append(err)
            assert (code, out, err.count("\n")) == (2, "", 1), err
            assert err.startswith(f"error: {message}")
    assert "secret" not in "".join(told)
    assert not (tmp_path / "corpus" / "manifest.json").exists()

    offline = {"HF_HUB_OFFLINE": "1"}
    with closing(Shell(hub, tmp_path / "home", **offline)) as shell:
        code, _, err = shell.corpus()
        assert (code, err.count("\n")) == (2, 1)
        assert "cannot be reached for someone/texts" in err
        assert "HF_HUB_OFFLINE" in err


def test_a_gated_dataset_is_read_with_the_token_of_the_environment(hub: Hub, tmp_path: Path) -> None:
    commit = hub.push("someone/gated", shards())
    hub.gated.add("someone/gated")
    with closing(Shell(hub, tmp_path, HF_TOKEN=hub.token)) as shell:
        code, out, err = shell.corpus(dataset="someone/gated")
    assert code == 0, err
    assert open_corpus(str(tmp_path / "corpus")).manifest.revision == commit
    assert hub.token not in out + err
    files = (file for file in tmp_path.rglob("*") if file.is_file())
    assert not any(hub.token.encode() in file.read_bytes() for file in files)
