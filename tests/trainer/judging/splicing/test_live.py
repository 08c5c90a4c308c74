"""SAEs evaluated while they train: the training does not notice, and nothing that goes wrong ends it."""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.common.errors import UserError
from penstock.common.logs import LOGGER
from penstock.common.metrics import REGISTRY
from penstock.common.model.language_model import LanguageModel
from penstock.store.dataset import Dataset
from penstock.trainer.config import RunConfig
from penstock.trainer.gauges import RunGauges
from penstock.trainer.group import Group
from penstock.trainer.judging.splicing.costs import measure
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.live import LiveEvaluation
from penstock.trainer.judging.splicing.splice import Splice, forward
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from penstock.trainer.lineage import take_over
from penstock.trainer.load import load_saes
from services.judged import RESIDS, constant, identity, untrained_sae
from services.runs import Bench, digests
from services.synthetic import MLP, RESID, make_manifest, write_dataset

Opened = tuple[LanguageModel, Text]
SAES = ("topk", "l1")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """As wide as the shipped model, six windows of it."""
    manifest = make_manifest(hooks={RESID: 192, MLP: 768})
    return write_dataset(tmp_path_factory.mktemp("wide") / "dataset", manifest)


@pytest.fixture(scope="module")
def short(model: LanguageModel) -> Opened:
    tokens = torch.randint(1, 4096, (2, 16), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 0
    return model, Text(tokens.int().numpy(), [0])


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is warned of."""
    said: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                said.append(record.getMessage())

    handler = Noting()
    LOGGER.addHandler(handler)
    yield said
    LOGGER.removeHandler(handler)


@pytest.fixture(scope="module")
def alone(wide: Dataset, client: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights and optimizer states of a run at which nobody looks."""
    from penstock.store.objects import open_store
    from services.valkey import fresh_prefix

    bench = Bench(open_store(str(tmp_path_factory.mktemp("alone"))), client, fresh_prefix())
    config = bench.submit(wide)
    bench.work()
    return digests(bench.head(config))


NAMES = (f"looked-at-{n}" for n in itertools.count())
"""Of runs: what the one before published must not be taken for this one's."""


def train(bench: Bench, dataset: Dataset, open_: Callable[[RunConfig], Opened], every: int = 1) -> RunConfig:
    """A run with somebody looking, done to its end."""
    config = bench.submit(dataset, name=next(NAMES))
    bench.live = LiveEvaluation(every, open_)
    bench.work()
    assert bench.head(config).status == "done"
    return config


def gauge(name: str, config: RunConfig, sae: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"run": config.run_id, "sae": sae})


def test_what_is_published_is_what_the_committed_weights_are_worth(
    bench: Bench, wide: Dataset, short: Opened, alone: dict[str, str]
) -> None:
    opened: list[str] = []

    def open_(config: RunConfig) -> Opened:
        # what a library might do when it is imported or called
        torch.rand(3)
        torch.set_grad_enabled(False)
        torch.set_num_threads(2)
        opened.append(config.run_id)
        return short

    state = torch.get_rng_state()
    config = train(bench, wide, open_)
    assert digests(bench.head(config)) == alone, "not a bit of the training is another one"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == 1
    assert len(opened) == 3, "after each head"
    model, text = short
    saes = load_saes(bench.runs, config, bench.head(config))
    judged = [Dictionary.of_sae(name, sae, model.device) for name, sae in saes.items()]
    record = measure(Subject(model, text, judged, 16), lambda done, total: None)
    for name in SAES:
        figures = record["saes"][name]
        assert gauge("sae_ce_recovered", config, name) == figures["ce_recovered"]
        assert gauge("sae_kl", config, name) == figures["kl"] > 0


@pytest.mark.parametrize(("every", "times"), [(1, 3), (1100, 2), (10**6, 0)])
def test_it_looks_after_so_many_rows(bench: Bench, wide: Dataset, every: int, times: int) -> None:
    """Heads are about 1,200 rows apart."""
    looked: list[int] = []

    def open_(config: RunConfig) -> Opened:
        looked.append(1)
        raise RuntimeError("no")

    train(bench, wide, open_, every)
    assert len(looked) == times


def test_what_fails_is_a_line_and_ends_nothing(
    bench: Bench, wide: Dataset, alone: dict[str, str], warnings: list[str]
) -> None:
    def open_(config: RunConfig) -> Opened:
        raise RuntimeError("out of\nmemory")

    config = train(bench, wide, open_)
    assert digests(bench.head(config)) == alone
    assert warnings == [f"run {config.run_id} could not be evaluated: RuntimeError: out of memory"] * 3
    assert gauge("sae_kl", config, "topk") is None


def test_what_cannot_succeed_is_tried_once(bench: Bench, wide: Dataset, warnings: list[str]) -> None:
    def open_(config: RunConfig) -> Opened:
        raise UserError("another model")

    config = train(bench, wide, open_)
    assert warnings == [f"run {config.run_id} is not evaluated while it trains: another model"]


def test_a_run_that_was_lost_publishes_nothing(
    bench: Bench, wide: Dataset, short: Opened, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker takes the run over while its SAEs are being looked at."""
    config = bench.submit(wide, name=next(NAMES))
    published: list[int] = []
    monkeypatch.setattr(RunGauges, "inside_model", lambda *_: published.append(bench.head(config).n))
    taken: list[int] = []

    def open_(found: RunConfig) -> Opened:
        if not taken:
            lineage = take_over(bench.runs, found.run_id, bench.head(found).environment)
            assert lineage is not None
            taken.append(lineage.takeover.n)
        return short

    bench.live = LiveEvaluation(1, open_)
    bench.work()
    assert bench.head(config).status == "done"
    assert [line for line in warnings if "its evaluation is discarded" in line]
    assert published, "later ones are"
    assert min(published) > taken[0]


def test_who_is_told_to_stop_does_not_finish_looking(
    bench: Bench, wide: Dataset, short: Opened, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    published: list[str] = []
    monkeypatch.setattr(RunGauges, "inside_model", lambda gauges, run, figures: published.append(run))

    def open_(config: RunConfig) -> Opened:
        stop.set()
        return short

    config = bench.submit(wide, name=next(NAMES))
    bench.live = LiveEvaluation(1, open_)
    bench.work(stop)
    assert stop.is_set()
    assert not bench.ended(config)
    assert warnings == []
    assert published == []


def test_figures_of_dictionaries_whose_effect_is_known(model: LanguageModel, text: Text) -> None:
    place = RESIDS[2]
    sae = untrained_sae(place)
    zero = constant(place, torch.zeros(192))
    judged = [identity(place), zero, sae, identity(RESIDS[4]).in_place_of(sae.module, "later")]
    found = measure(Subject(model, text, judged, 48), lambda done, total: None)["saes"]
    same, nothing = found["identity"], found["constant"]
    assert same["kl"] == 0.0
    assert same["delta_ce"] == 0.0
    assert same["ce_recovered"] == 1.0
    assert nothing["ce_recovered"] == 0.0
    assert nothing["ce_spliced"] == nothing["ce_zero"]
    assert found["later"]["ce_zero"] != nothing["ce_zero"], "each hook point has its own"
    assert found["sae"]["l0"] == 16.0
    assert found["sae"]["kl"] > 0


def test_figures_equal_direct_computation(model: LanguageModel, text: Text) -> None:
    sae = untrained_sae(RESIDS[3])
    found = measure(Subject(model, text, [sae], 48), lambda done, total: None)["saes"]["sae"]
    (batch,) = text.batches(model)
    kept = batch.predicts
    p, q = (
        torch.log_softmax(forward(model, batch.tokens, batch.keep, splices).logits.double(), -1)
        for splices in ([], [Splice(sae)])
    )
    wanted = batch.tokens[:, 1:, None]
    clean, spliced = (float(-log[:, :-1].gather(-1, wanted)[..., 0][kept].mean()) for log in (p, q))
    assert found["ce_clean"] == pytest.approx(clean, abs=1e-9)
    assert found["delta_ce"] == pytest.approx(spliced - clean, abs=1e-9)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1)[batch.keep].mean()), abs=1e-9)


def test_a_group_is_due_by_rows(wide: Dataset, bench: Bench) -> None:
    config = bench.submit(wide)
    group = Group(config, torch.device("cpu"))
    live = LiveEvaluation(100, lambda run: pytest.fail("not asked for"))
    live.begin(config)
    group.rows = 99
    assert not live.due(group)
    group.rows = 100
    assert live.due(group)


def test_the_model_is_loaded_once_and_only_when_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: LanguageModel
) -> None:
    """As `penstock train` sets it up, from a config; a run of another corpus is refused in one line."""
    from penstock.common.model import language_model
    from penstock.deploy.config import Config
    from penstock.deploy.evaluation import live_evaluation
    from penstock.producer.corpus import CorpusSettings, ensure_corpus
    from services.lm import shipped_tokenizer, write_text

    made: list[Any] = []

    def load(files: Any, settings: Any) -> LanguageModel:
        made.append(settings.threads)
        return model

    monkeypatch.setattr(language_model, "LanguageModel", load)
    corpus = {
        "url": str(tmp_path / "corpus"),
        "text": "files",
        "files": [write_text(tmp_path / "text", documents=60)],
        "context": 16,
    }
    built = ensure_corpus(CorpusSettings(**corpus), shipped_tokenizer(), lambda done, wanted: None)  # type: ignore[arg-type]
    told = {"corpus": corpus, "dataset": {"hooks": [RESID]}, "trainer": {"evaluate_every": 1}}
    live = live_evaluation(Config.model_validate(told | {"evaluation": {"live_sequences": 3}}))
    assert live is not None
    assert made == []
    pin = {"corpus_digest": built.manifest.digest, "weights_sha256": model.files.weights_sha256()}
    run = _run_of(**pin)
    assert len(live._open(run)[1]) == 3
    assert live._open(run)[0] is model
    assert made == [None], "threads are left as the training has them"
    with monkeypatch.context() as patched:
        patched.setattr(type(model.files), "weights_sha256", lambda files: pytest.fail("checked again"))
        assert len(live._open(run)[1]) == 3
    with pytest.raises(UserError, match="is not a corpus of run"):
        live._open(_run_of(**pin | {"corpus_digest": "other"}))
    with pytest.raises(UserError, match=r"the weights of builtin:pystd-6l are not those of toy"):
        live._open(_run_of(**pin | {"weights_sha256": "other"}))
    assert live_evaluation(Config.model_validate({"dataset": {"hooks": [RESID]}})) is None


def _run_of(**pin: str) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(run_id="run", datasets=[SimpleNamespace(source="toy", **pin)])
