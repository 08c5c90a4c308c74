"""The experiments that `penstock evaluate` makes, in the order in which the page shows them.

Another one is a line in `EXPERIMENTS`: how it is measured, and how its record becomes figures.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from penstock.common.errors import UserError, nearest
from penstock.common.model.files import LoadedTokenizer
from penstock.store.joined import JoinedDataset
from penstock.trainer.judging import (
    ablation,
    cloze_figures,
    cloze_score,
    contexts,
    feature_scores,
    overview,
    positions,
    positions_figures,
    propagation,
    propagation_figures,
)
from penstock.trainer.judging.cloze import Cloze, load_cloze
from penstock.trainer.judging.settings import JudgingSettings
from penstock.trainer.judging.shown import Shown
from penstock.trainer.judging.subject import Subject

Record = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Case:
    """A subject with what else experiments may ask for.

    Attributes:
        data: what the dictionaries were trained on.
    """

    subject: Subject
    settings: JudgingSettings
    tokenizer: LoadedTokenizer
    data: JoinedDataset

    @cached_property
    def cloze(self) -> Cloze:
        """The prompts that settings ask for, beginning as sequences of the training text do."""
        bos = self.data.parts[0].manifest.corpus.bos == "prepend"
        return load_cloze(self.settings.cloze, self.tokenizer, self.subject.model.context, bos=bos)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens' text, special ones included."""
        return str(self.tokenizer.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def prompts_digest(self) -> str:
        """SHA-256 of the prompts' tokens and answers: they depend on files, too."""
        told = [(item.task, item.tokens, item.answer_token) for item in self.cloze.items]
        return hashlib.sha256(repr(told).encode()).hexdigest()


@dataclass(frozen=True)
class Experiment:
    """One question and its answer.

    Attributes:
        name: as `--only` takes it and the record is called.
        about: what it asks, a sentence for the page.
        measure: gives a record of JSON values.
        show: makes figures of the record; it measures nothing.
        settings: the fields of `JudgingSettings` that the record depends on, besides the text.
        apart: dictionaries are measured and kept one by one; the record is {dictionary: record}.
        reads: what the record depends on besides settings, text, model and dictionaries.
    """

    name: str
    title: str
    about: str
    measure: Callable[[Case, Progress], Record]
    show: Callable[[Record], list[Shown]]
    settings: Sequence[str] = ()
    apart: bool = False
    reads: Callable[[Case], Any] = lambda case: None


EXPERIMENTS = (
    Experiment(
        "overview",
        "In place of the activations",
        "Each dictionary's reconstruction replaces the activations of its hook point, all others stay.",
        lambda case, progress: overview.measure(case.subject, progress),
        overview.show,
    ),
    Experiment(
        "positions",
        "By position",
        "The same at every position of a sequence, also behind those that the dictionaries were trained on.",
        lambda case, progress: positions.measure(case.subject, progress),
        positions_figures.show,
    ),
    Experiment(
        "propagation",
        "Error propagation",
        "What a dictionary in place leaves for those behind it, on the same tokens.",
        lambda case, progress: propagation.measure(case.subject, progress),
        propagation_figures.show,
    ),
    Experiment(
        "cloze",
        "Tasks",
        "Prompts whose next word is known, answered with each dictionary in place.",
        lambda case, progress: cloze_score.measure(case.subject, case.cloze, progress),
        cloze_figures.show,
        settings=("cloze",),
        reads=Case.prompts_digest,
    ),
    Experiment(
        "feature_scores",
        "Features and answers",
        "Whether answers become likelier or less likely on prompts that a feature is active on.",
        lambda case, progress: feature_scores.measure(
            case.subject, case.cloze, case.settings.feature_scores, progress
        ),
        feature_scores.show,
        settings=("cloze", "feature_scores"),
        reads=Case.prompts_digest,
    ),
    Experiment(
        "ablation",
        "Features taken out",
        "What answers lose or gain when one feature alone is taken out and the dictionary's error is kept.",
        lambda case, progress: ablation.measure(
            case.subject, case.cloze, case.settings.ablation, case.decode, progress
        ),
        ablation.show,
        settings=("cloze", "ablation"),
        reads=Case.prompts_digest,
    ),
    Experiment(
        "contexts",
        "Features in context",
        "What features are active on, and which next tokens their directions speak for and against. "
        "Unless they were asked for, they are drawn by a fixed rule from three bands of frequency.",
        lambda case, progress: contexts.measure(
            case.subject, case.data, case.tokenizer, case.settings.contexts, progress
        ),
        contexts.show,
        settings=("contexts",),
        apart=True,
        reads=lambda case: contexts.source_of(case.subject, case.data, case.settings.contexts),
    ),
)


def chosen(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names, in the table's order; all of them without names.

    Raises:
        UserError: there is none of a name.
    """
    known = [one.name for one in EXPERIMENTS]
    for name in names:
        if name not in known:
            raise UserError(
                f"--only: there is no experiment {name!r}.{nearest(name, known)} "
                f"There are {', '.join(known)}."
            )
    return [one for one in EXPERIMENTS if not names or one.name in names]
