"""The text that a run's dictionaries are judged on, and how far it is from what they were trained on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.common.errors import ConfigError, UserError
from penstock.common.logs import LOGGER
from penstock.deploy.config import Config, EvaluationSettings
from penstock.store.corpus import HELD_OUT, Corpus, open_corpus
from penstock.store.manifest import Manifest

if TYPE_CHECKING:
    from penstock.common.model.files import LoadedTokenizer
    from penstock.common.model.language_model import LanguageModel
    from penstock.trainer.judging.splicing.text import Text


@dataclass(frozen=True)
class JudgedText:
    """Held-out sequences, and the corpus that they are from."""

    text: "Text"
    corpus: Corpus

    def about(self) -> dict[str, Any]:
        """What identifies it, as JSON."""
        digest = hashlib.sha256(np.ascontiguousarray(self.text.tokens, "<i4").tobytes())
        digest.update(str(self.text.special_ids).encode())
        return {
            "description": self.corpus.manifest.description,
            "corpus_digest": self.corpus.manifest.digest,
            "sequences": len(self.text),
            "context": self.text.context,
            "sha256": digest.hexdigest(),
        }


def judged_text(
    config: Config,
    settings: EvaluationSettings,
    trained_context: int,
    tokenizer: "LoadedTokenizer",
    out: str,
) -> JudgedText:
    """Held-out sequences of the config's corpus or, at another context, of the same text packed anew.

    Documents that are held out are so by their names, whatever the context: none of them was trained on.

    Args:
        out: where the corpus of another context is kept.

    Raises:
        UserError: nothing is held out.
        ObjectMissing: there is no corpus.
    """
    from penstock.trainer.judging.splicing.text import Text

    corpus = open_corpus(config.corpus.url)
    wanted = settings.context or trained_context
    if corpus.manifest.context != wanted:
        corpus = _packed_anew(config, settings.judged_sequences, corpus, wanted, tokenizer, out)
    n = min(settings.judged_sequences, corpus.manifest.n_held_out)
    if n == 0:
        raise UserError(
            f"evaluation: the corpus holds out less than one sequence of {wanted} tokens; add text to it"
        )
    if n < settings.judged_sequences:
        LOGGER.warning(
            "evaluation.judged_sequences: %d were asked for and only %d of %d tokens are held out; these are "
            "judged",
            *(settings.judged_sequences, n, wanted),
        )
    return JudgedText(Text(corpus.tokens(0, n, HELD_OUT), corpus.manifest.special_ids), corpus)


def _packed_anew(
    config: Config,
    sequences: int,
    corpus: Corpus,
    context: int,
    tokenizer: "LoadedTokenizer",
    out: str,
) -> Corpus:
    from penstock.producer.corpus import ensure_corpus

    tokens = sequences * context
    changed = config.corpus.model_copy(
        update={
            "context": context,
            # as little as a corpus can have; nothing reads it
            "max_tokens": context,
            "max_held_out_tokens": tokens,
            # a branch may have moved on since
            "revision": corpus.manifest.revision or config.corpus.revision,
        }
    )
    told = changed.model_dump_json(exclude={"url"})
    name = f"corpus-{context}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    changed = changed.model_copy(update={"url": f"{out}/{name}"})
    # it tells how many training tokens there are, of which next to none are wanted
    return ensure_corpus(changed, tokenizer, lambda done, wanted: None)


def check_context(context: int, model: "LanguageModel") -> None:
    """Raises ConfigError if the model cannot take sequences of that length."""
    if context > model.context:
        raise ConfigError(
            f"evaluation.context: {context} tokens are more than {model.files.name} takes; it takes "
            f"{model.context} at most"
        )


def departures(
    manifests: Sequence[Manifest], judged: JudgedText, model: "LanguageModel", trained_context: int
) -> list[str]:
    """One line for each way in which an evaluation leaves what the datasets' manifests declare."""
    corpus, context = judged.corpus.manifest, judged.text.context
    found = []
    if context > trained_context:
        found.append(
            f"context: {context} tokens are judged, the dictionaries were trained on {trained_context}; no "
            f"position from {trained_context} on was in training"
        )
    if context == trained_context and corpus.digest not in [m.corpus.digest for m in manifests]:
        found.append("corpus: its digest is not that of the corpus that the dictionaries were trained on")

    def compare(what: str, here: object, there: Sequence[object]) -> None:
        if here not in there:
            known = " or ".join(dict.fromkeys(map(str, there)))
            found.append(f"{what}: {here} here, {known} in training")

    pins = [m.corpus for m in manifests]
    compare("text", corpus.description, [pin.description for pin in pins])
    compare("BOS", corpus.bos, [pin.bos for pin in pins])
    compare("special tokens", corpus.special_ids, [pin.special_ids for pin in pins])
    compare("tokenizer", corpus.tokenizer_sha256[:12], [pin.tokenizer_sha256[:12] for pin in pins])
    compare(
        "held-out rule (some of this text may have been trained on)",
        corpus.held_out_rule,
        [pin.held_out_rule for pin in pins],
    )
    numerics = [m.numerics for m in manifests]
    compare(
        "model dtype",
        str(model.dtype).removeprefix("torch."),
        [numeric.compute_dtype for numeric in numerics],
    )
    # passes with something replaced go through the bridge, whose attention is the plain one
    compare("attention", "eager", [numeric.attention for numeric in numerics])
    return found
