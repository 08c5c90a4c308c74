"""What a run is evaluated on: held-out text, held-out toy data, or nothing, as its dataset has it."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from penstock.common.errors import ConfigError, ModelError, UserError
from penstock.common.settings import parse
from penstock.deploy.config import Config
from penstock.store.truth import Truth, load_truth

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.common.model.files import ModelFiles
    from penstock.common.model.language_model import LanguageModel
    from penstock.store.corpus import Corpus
    from penstock.store.joined import JoinedDataset
    from penstock.trainer.config import RunConfig
    from penstock.trainer.judging.splicing.live import LiveEvaluation
    from penstock.trainer.judging.splicing.text import Text
    from penstock.trainer.sae import SAE

LoadSAEs = Callable[[], "dict[str, SAE]"]
Progress = Callable[[int, int], None]


def evaluate_run(
    config: Config, run: "RunConfig", data: "JoinedDataset", load: LoadSAEs, progress: Progress
) -> dict[str, Any] | None:
    """Figures of a run's SAEs as `summarise` takes them; None if nothing is held out of its dataset.

    Args:
        load: gives the SAEs by name; they take raw activations.
        progress: called with work done and in all: sequences, or passes over them.
    """
    first = data.parts[0]
    if first.manifest.of_text:
        return _on_text(config, run, load, progress)
    truth = load_truth(first)
    return None if truth is None else _on_toy(config, run, truth, load, progress)


def _on_text(config: Config, run: "RunConfig", load: LoadSAEs, progress: Progress) -> dict[str, Any]:
    from penstock.common.model.language_model import LanguageModel
    from penstock.trainer.evaluate import evaluate, held_out_text

    corpus, files = corpus_and_model(config, run)
    text = held_out_text(corpus, config.evaluation.sequences)
    # nothing here needs to be bit-identical: use the whole machine
    model = LanguageModel(files, config.model.model_copy(update={"threads": None}))
    return evaluate(model, text, load(), progress)


def corpus_and_model(config: Config, run: "RunConfig") -> "tuple[Corpus, ModelFiles]":
    """The corpus and model of a run.

    Raises:
        ConfigError, ModelError: those of the config are others.
    """
    from penstock.common.model.files import find_model
    from penstock.store.corpus import open_corpus

    corpus = open_corpus(config.corpus.url)
    if corpus.manifest.digest not in [pin.corpus_digest for pin in run.datasets]:
        raise ConfigError(
            f"corpus.url: {config.corpus.url} is not a corpus of run {run.run_id}; its digest differs"
        )
    files = find_model(config.model)
    check_weights(files, run)
    return corpus, files


def check_weights(files: "ModelFiles", run: "RunConfig") -> None:
    """Raises ModelError: a run was trained on activations of other weights."""
    if files.weights_sha256() != run.datasets[0].weights_sha256:
        raise ModelError(
            f"model: the weights of {files.label} are not those of {run.datasets[0].source}, which run "
            f"{run.run_id} was trained on; set model.name, weights and weights_seed as its dataset has them"
        )


def live_evaluation(config: Config) -> "LiveEvaluation | None":
    """What evaluates runs while they train; None where `trainer.evaluate_every` asks for nothing.

    Raises:
        ConfigError: the config is of toy data.
    """
    if not config.trainer.evaluate_every:
        return None
    if config.toy is not None:
        raise ConfigError(
            "trainer.evaluate_every: toy data are made from no model that SAEs could be evaluated inside; "
            "leave it out"
        )
    from penstock.trainer.judging.splicing.live import LiveEvaluation

    loaded: list[LanguageModel] = []
    last: list[tuple[list[tuple[str, str]], Text]] = []

    def open_(run: "RunConfig") -> "tuple[LanguageModel, Text]":
        from penstock.common.model.language_model import LanguageModel
        from penstock.trainer.evaluate import held_out_text

        pins = [(pin.corpus_digest, pin.weights_sha256) for pin in run.datasets]
        if last and last[0][0] == pins:
            # large weights take long to read and check, and training waits
            return loaded[0], last[0][1]
        corpus, files = corpus_and_model(config, run)
        text = held_out_text(corpus, config.evaluation.live_sequences)
        if not loaded:
            # no threads: those that the run trains with are none of its business
            loaded.append(LanguageModel(files, config.model.model_copy(update={"threads": None})))
        last[:] = [(pins, text)]
        return loaded[0], text

    return LiveEvaluation(config.trainer.evaluate_every, open_)


def _on_toy(
    config: Config, run: "RunConfig", truth: Truth, load: LoadSAEs, progress: Progress
) -> dict[str, Any]:
    import torch

    from penstock.producer.toy import Toy, ToySettings
    from penstock.trainer.evaluate import evaluate_rows

    # those of the dataset, not of the config: it may be another one by now
    toy = Toy(parse(ToySettings, truth.settings, "the ground truth"))
    if toy.truth.digest != truth.digest:
        raise UserError(
            "the ground truth was made by another version of penstock: nothing can be held out of it"
        )
    n = config.evaluation.sequences

    def held_out() -> "Iterator[dict[str, Tensor]]":
        for sequence in range(n):
            rows = toy.rows(sequence, held_out=True)
            # rounded as what they were trained on
            yield {hook: torch.from_numpy(acts).bfloat16().float() for hook, acts in rows.items()}

    return evaluate_rows(load(), held_out(), lambda done: progress(done, n))
