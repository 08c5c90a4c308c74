"""`penstock evaluate` on a finished run: what it leaves, that it resumes, and what it refuses."""

import csv
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.common.errors import ConfigError, ModelError, UserError
from penstock.common.model import language_model
from penstock.common.model.files import ModelFiles
from penstock.deploy.config import Config, load_config
from penstock.deploy.counting import Counting
from penstock.deploy.judge import Judged, judge
from penstock.deploy.judged_text import judged_text
from penstock.deploy.processes import build_corpus
from penstock.store.corpus import HELD_OUT, TRAIN, Corpus, corpus_arrays, open_corpus
from penstock.store.dataset import open_dataset
from penstock.trainer.judging import experiments
from services.browser import open_page
from services.command import called, penstock, start
from services.lm import shipped_model, shipped_tokenizer
from services.waiting import eventually

Counts = dict[str, int]


class Killed(BaseException):
    """Ends an evaluation in the middle of what it is doing."""


@pytest.fixture(scope="module")
def config(small_run: Path) -> Config:
    changed = load_config(str(small_run.parent / "config.yaml"))
    contexts = changed.evaluation.contexts.model_copy(update={"max_chunks": 3, "of_each": 1, "examples": 2})
    ablation = changed.evaluation.ablation.model_copy(update={"candidates": 2, "prompts": 2})
    few = {
        "judged_sequences": 4,
        "contexts": contexts,
        "cloze": changed.evaluation.cloze.model_copy(update={"per_task": 2}),
        "ablation": ablation,
    }
    settings = changed.evaluation.model_copy(update=few)
    return changed.model_copy(update={"evaluation": settings})


@pytest.fixture(scope="module")
def run_url(small_run: Path) -> str:
    return f"{small_run}/runs/{json.loads((small_run / 'summary.json').read_text())['run']}"


@pytest.fixture
def evaluate(
    config: Config, run_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Judged]:
    """An evaluation in this process, whose language model is loaded once for all of them."""
    monkeypatch.setattr(language_model, "LanguageModel", lambda files, settings: shipped_model())

    def call(*only: str, out: str | None = None, config: Config = config, **changes: Any) -> Judged:
        counting = Counting(lambda line: None)
        return judge(config, run_url, out or str(tmp_path / "out"), only, changes, counting)

    return call


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """How often what two experiments are answered by was measured, by what was judged."""
    found: Counts = {}

    def counted(one: experiments.Measurement) -> experiments.Measurement:
        def measure(case: experiments.Case, progress: experiments.Progress) -> experiments.Record:
            key = "/".join([one.name, *(d.name for d in case.subject.dictionaries)])
            found[key] = found.get(key, 0) + 1
            if found.get("killed at") == sum(v for k, v in found.items() if k != "killed at"):
                raise Killed
            return one.measure(case, progress)

        return replace(one, measure=measure)

    # one that measures all dictionaries at once, and one that takes each by itself
    two = [one for one in experiments.EXPERIMENTS if one.name in ("overview", "contexts")]
    counting = [replace(one, measurement=counted(one.measurement)) for one in two]
    monkeypatch.setattr(experiments, "EXPERIMENTS", counting)
    return found


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return found


def without_environment(out: Path) -> str:
    found = read(out)
    del found["environment"]
    return json.dumps(found)


def documents_of(corpus: Corpus, split: str) -> set[str]:
    """Names of the documents whose tokens are in a split."""
    names = corpus.documents()
    spec = next(s for s in corpus_arrays(corpus.manifest) if s.path == f"{split}/document")
    blocks = [corpus.block(spec, i) for i in range(len(corpus.manifest.blocks[spec.path]))]
    numbers = np.unique(np.concatenate(blocks)[: corpus.n_sequences(split)])
    return {names[number] for number in numbers if number >= 0}


SAES = ("resid-topk", "mlp-l1")
BASE = ("positions/resid-topk/mlp-l1", "contexts/resid-topk", "contexts/mlp-l1")
"""What is measured, in order."""


def test_it_leaves_a_page_a_record_and_every_figures_data(
    evaluate: Callable[..., Judged], tmp_path: Path
) -> None:
    done = evaluate()
    out = tmp_path / "out"
    found = read(out)
    assert found == done.evaluation
    assert list(found["experiments"]) == [one.name for one in experiments.EXPERIMENTS]
    assert found["warnings"] == []
    assert found["subject"]["text"]["context"] == found["subject"]["trained_context"] == 128
    overview = found["experiments"]["overview"]
    assert overview["dictionaries"].keys() == set(SAES) == found["subject"]["dictionaries"].keys()
    for one in overview["dictionaries"].values():
        assert one["kl"] >= 0
        assert one["delta_ce"] == pytest.approx(one["ce_spliced"] - one["ce_clean"])
    for control in overview["controls"].values():
        assert set(control["identity"].values()) == set(control["zero_against_ablation"].values()) == {0}
    stored = found["experiments"]["contexts"]["resid-topk"]["source"]
    assert (stored["what"], stored["chunks"]) == ("stored rows", 3)
    page = (out / "evaluation.html").read_text()
    assert "resid-topk" in page
    # columns have headings, not the names of fields; every table of dictionaries has their L0
    for head in re.findall(r"<thead>(.*?)</thead>", page):
        names = re.findall(r"<th[^>]*>([^<]*)</th>", head)
        assert not [name for name in names if re.search("[a-z]_[a-z]", name)]
        assert "L0" in names or "Dictionary" not in names
    with (out / "overview.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["Dictionary"] for row in rows] == list(SAES)
    assert float(rows[0]["KL"]) == overview["dictionaries"]["resid-topk"]["kl"]
    assert (out / "contexts_histograms-mlp-l1.csv").exists()
    assert [line.split(":")[0] for line in done.lines()[:2]] == list(SAES)


@pytest.mark.services
def test_a_browser_opens_every_figure_without_complaint(
    evaluate: Callable[..., Judged], tmp_path: Path
) -> None:
    evaluate(context=192)
    dom, complaints = open_page(tmp_path / "out" / "evaluation.html", tmp_path / "profile")
    assert complaints == []
    assert dom.count('<svg viewBox="0 0 380') > 20
    assert "Beyond the trained context" in dom


def test_examples_are_text_of_the_corpus(
    evaluate: Callable[..., Judged], config: Config, small_run: Path
) -> None:
    """What stands around a stored row is what the corpus has there."""
    found = evaluate("contexts").evaluation["experiments"]["contexts"]["resid-topk"]
    corpus = open_corpus(config.corpus.url)
    first = open_dataset(str(small_run / "dataset")).manifest.corpus.first_sequence
    for example in (e for feature in found["features"] for e in feature["examples"]):
        number = example["sequence"]
        there = corpus.tokens(number, number + 1)[0]
        start_ = example["position"] - example["at"]
        wanted = there[start_ : start_ + len(example["tokens"])].tolist()
        special = corpus.manifest.special_ids
        assert example["tokens"] == [None if token in special else token for token in wanted]
    assert first == 0


def test_killed_in_the_middle_it_goes_on_where_it_was(
    evaluate: Callable[..., Judged], counts: Counts, tmp_path: Path
) -> None:
    counts["killed at"] = 3
    with pytest.raises(Killed):
        evaluate()
    assert not (tmp_path / "out" / "evaluation.json").exists()
    del counts["killed at"]
    evaluate()
    assert counts == {BASE[0]: 1, BASE[1]: 1, BASE[2]: 2}
    first = without_environment(tmp_path / "out")
    evaluate()
    assert counts == {BASE[0]: 1, BASE[1]: 1, BASE[2]: 2}
    assert without_environment(tmp_path / "out") == first
    # from nothing, the same again
    evaluate(out=str(tmp_path / "anew"))
    assert without_environment(tmp_path / "anew") == first
    for name in ("overview.csv", "contexts-resid-topk.csv"):
        assert (tmp_path / "anew" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_what_changed_is_measured_again(
    evaluate: Callable[..., Judged], counts: Counts, config: Config, tmp_path: Path
) -> None:
    evaluate("overview")
    assert list(counts) == [BASE[0]]
    contexts = config.evaluation.contexts.model_copy(update={"seed": 7})
    evaluate(contexts=contexts)
    assert counts == dict.fromkeys(BASE, 1)
    evaluate()  # the seed concerns features in context alone
    assert counts == {BASE[0]: 1, BASE[1]: 2, BASE[2]: 2}
    evaluate("overview", judged_sequences=5)
    assert counts[BASE[0]] == 2
    assert read(tmp_path / "out")["subject"]["text"]["sequences"] == 5


def test_a_longer_context_is_packed_anew_and_warned_of(
    evaluate: Callable[..., Judged],
    counts: Counts,
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        found = evaluate("overview", context=256).evaluation
    text = found["subject"]["text"]
    assert (text["context"], text["sequences"]) == (256, 4)
    assert found["warnings"] == [
        "context: 256 tokens are judged, the dictionaries were trained on 128; no position from 128 on was "
        "in training"
    ]
    assert found["warnings"][0] in caplog.text
    assert found["warnings"][0] in (tmp_path / "out" / "evaluation.html").read_text()
    (packed,) = (tmp_path / "out").glob("corpus-256-*")
    longer, own = open_corpus(str(packed)), open_corpus(config.corpus.url)
    assert longer.manifest.held_out_rule == own.manifest.held_out_rule
    judged, trained = documents_of(longer, HELD_OUT), documents_of(own, TRAIN)
    assert judged
    assert trained
    assert not judged & trained
    # the same call again packs nothing and measures nothing
    evaluate("overview", context=256)
    assert counts == {BASE[0]: 1}


def test_fewer_sequences_than_asked_for_are_said(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config.evaluation.model_copy(update={"judged_sequences": 100_000})
    with caplog.at_level(logging.WARNING):
        found = judged_text(config, settings, 128, shipped_tokenizer(), str(tmp_path))
    there = open_corpus(config.corpus.url).manifest.n_held_out
    assert len(found.text) == there
    assert f"100000 were asked for and only {there} of 128 tokens are held out" in caplog.text
    caplog.clear()
    few = config.evaluation.model_copy(update={"judged_sequences": there})
    judged_text(config, few, 128, shipped_tokenizer(), str(tmp_path))
    assert not caplog.text


def test_another_text_is_warned_of(config: Config, evaluate: Callable[..., Judged], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(200):
        (folder / f"file{number}.txt").write_text(f"This is text number {number}. " * 60)
    corpus = config.corpus.model_copy(
        update={
            "text": "files",
            "files": [f"{folder}/*.txt"],
            "url": str(tmp_path / "other"),
            "bos": "none",
        }
    )
    other = config.model_copy(update={"corpus": corpus})
    build_corpus(other, lambda done, wanted: None)
    found = evaluate("overview", config=other).evaluation
    told = [line.split(":")[0] for line in found["warnings"]]
    assert told == ["corpus", "text", "BOS"]


def test_what_does_not_fit_is_refused(
    evaluate: Callable[..., Judged], config: Config, run_url: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no experiment 'overviw'\. Did you mean overview\?"):
        evaluate("overviw")
    with pytest.raises(
        ConfigError, match=r"evaluation\.context: 512 tokens are more than .* takes; it takes 256"
    ):
        evaluate("overview", context=512)
    asked = config.evaluation.contexts.model_copy(update={"features": {"resid-tpk": [1]}})
    with pytest.raises(ConfigError, match=r"no SAE 'resid-tpk'\. Did you mean resid-topk\?"):
        evaluate(contexts=asked)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_what_cannot_be_had_is_told_before_anything_is_measured(
    evaluate: Callable[..., Judged], config: Config, tmp_path: Path
) -> None:
    asked = config.evaluation.contexts.model_copy(update={"features": {"resid-topk": [1 << 20]}})
    with pytest.raises(ConfigError, match=r"contexts\.features: resid-topk has no feature 1048576"):
        evaluate("overview", "contexts", contexts=asked)
    cloze = config.evaluation.cloze.model_copy(update={"sources": [f"lambada:{tmp_path}/none.txt"]})
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        evaluate("overview", "cloze", cloze=cloze)
    assert not (tmp_path / "out" / "parts").exists()


def test_another_model_is_refused(
    evaluate: Callable[..., Judged], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelFiles, "weights_sha256", lambda files: "0" * 64)
    with pytest.raises(ModelError, match=r"model: the weights of .* are not those of"):
        evaluate()


def test_the_command_says_one_line(small_run: Path, run_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("evaluate", str(small_run.parent / "config.yaml"), run_url, "--only", "contxts") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --only: there is no experiment 'contxts'. Did you mean contexts?")


def test_progress_tells_the_rate_and_the_time_left() -> None:
    now, lines = [0.0], list[str]()
    counting = Counting(lines.append, lambda: now[0])
    counting.begin("overview")
    for step in range(1, 41):
        now[0] = step
        counting(step, 80)
    assert lines[0] == "overview"
    assert lines[1:3] == [
        "overview: 10 of 80, 1/s, 70 s left",
        "overview: 20 of 80, 1/s, 60 s left",
    ]
    assert len(lines) == 5


def test_packing_tells_no_rate_that_is_none(
    evaluate: Callable[..., Judged], config: Config, run_url: str, tmp_path: Path
) -> None:
    """Packing counts training tokens, of which it wants next to none: that is no share of the work."""
    now, lines = [0.0], list[str]()

    def clock() -> float:
        now[0] += 60
        return now[0]

    few = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"context": 64})})
    judge(few, run_url, str(tmp_path / "out"), ["overview"], {}, Counting(lines.append, clock))
    assert [line for line in lines if line.startswith("packing")] == ["packing the text"]


@pytest.mark.long
def test_a_killed_process_goes_on_where_it_was(small_run: Path, run_url: str, tmp_path: Path) -> None:
    few = ("--only", "overview", "--only", "propagation", "--sequences", "4")
    arguments = ("evaluate", small_run.parent / "config.yaml", run_url, *few, "--out", tmp_path / "out")
    kept = tmp_path / "out" / "parts" / "positions.json"
    with start(*arguments) as process:
        try:
            eventually(kept.exists, 120)
        finally:
            process.kill()
    before = kept.stat().st_mtime_ns
    result = penstock(*arguments)
    assert result.returncode == 0, result.stderr
    assert kept.stat().st_mtime_ns == before
    assert "resid-topk: L0 16.0, CE recovered" in result.stdout
    other = penstock(*arguments[:-1], tmp_path / "anew")
    assert other.returncode == 0, other.stderr
    assert without_environment(tmp_path / "out") == without_environment(tmp_path / "anew")
