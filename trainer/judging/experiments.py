"""The experiments that `penstock evaluate` makes, in the order in which the page shows them.

Another one is an entry of `EXPERIMENTS`: what is measured for it, and how that becomes figures.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from penstock.common.errors import UserError, nearest
from penstock.common.model.files import LoadedTokenizer
from penstock.store.joined import JoinedDataset
from penstock.trainer.judging.features import contexts
from penstock.trainer.judging.sequences import (
    overview,
    positions,
    positions_figures,
    propagation,
    propagation_figures,
)
from penstock.trainer.judging.settings import JudgingSettings
from penstock.trainer.judging.shown import Shown
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.tasks import ablation, cloze_figures, cloze_score, feature_scores
from penstock.trainer.judging.tasks.cloze import Cloze, load_cloze

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
class Measurement:
    """What is measured, and what its record depends on besides text, model and dictionaries.

    Attributes:
        name: below which parts of it are kept.
        measure: gives a record of JSON values.
        settings: fields of `JudgingSettings`.
        reads: anything else.
        apart: dictionaries are measured and kept one by one; the record is {dictionary: record}.
    """

    name: str
    measure: Callable[[Case, Progress], Record]
    settings: Sequence[str] = ()
    reads: Callable[[Case], Any] = lambda case: None
    apart: bool = False


@dataclass(frozen=True)
class Experiment:
    """One question and its answer.

    Attributes:
        name: as `--only` takes it and the record is called.
        about: what it asks, a sentence for the page.
        show: makes figures of the record; it measures nothing.
        answer: makes the record of what was measured.
    """

    name: str
    title: str
    about: str
    measurement: Measurement
    show: Callable[[Record], list[Shown]]
    answer: Callable[[Record], Record] = lambda measured: measured


_POSITIONS = Measurement("positions", lambda case, progress: positions.measure(case.subject, progress))

EXPERIMENTS = (
    Experiment(
        "overview",
        "In place of the activations",
        "Each dictionary's reconstruction replaces the activations of its hook point, all others stay.",
        _POSITIONS,
        overview.show,
        overview.of_positions,
    ),
    Experiment(
        "positions",
        "By position",
        "The same at every position of a sequence, also behind those that the dictionaries were trained on.",
        _POSITIONS,
        positions_figures.show,
    ),
    Experiment(
        "propagation",
        "Error propagation",
        "What a dictionary in place leaves for those behind it, on the same tokens.",
        Measurement("propagation", lambda case, progress: propagation.measure(case.subject, progress)),
        propagation_figures.show,
    ),
    Experiment(
        "cloze",
        "Tasks",
        "Prompts whose next word is known, answered with each dictionary in place.",
        Measurement(
            "cloze",
            lambda case, progress: cloze_score.measure(case.subject, case.cloze, progress),
            ("cloze",),
            Case.prompts_digest,
        ),
        cloze_figures.show,
    ),
    Experiment(
        "feature_scores",
        "Features and answers",
        "Whether answers become likelier or less likely on prompts that a feature is active on.",
        Measurement(
            "feature_scores",
            lambda case, progress: feature_scores.measure(
                case.subject, case.cloze, case.settings.feature_scores, progress
            ),
            ("cloze", "feature_scores"),
            Case.prompts_digest,
        ),
        feature_scores.show,
    ),
    Experiment(
        "ablation",
        "Features taken out",
        "What answers lose or gain when one feature alone is taken out and the dictionary's error is kept.",
        Measurement(
            "ablation",
            lambda case, progress: ablation.measure(
                case.subject, case.cloze, case.settings.ablation, case.decode, progress
            ),
            ("cloze", "ablation"),
            Case.prompts_digest,
        ),
        ablation.show,
    ),
    Experiment(
        "contexts",
        "Features in context",
        "What features are active on, and which next tokens their directions speak for and against. "
        "Unless they were asked for, they are drawn by a fixed rule from three bands of frequency.",
        Measurement(
            "contexts",
            lambda case, progress: contexts.measure(
                case.subject, case.data, case.tokenizer, case.settings.contexts, progress
            ),
            ("contexts",),
            lambda case: contexts.source_of(case.subject, case.data, case.settings.contexts),
            apart=True,
        ),
        contexts.show,
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
