"""The experiments that `penstock evaluate` makes, in the order in which the page shows them.

Another one is a line in `EXPERIMENTS`: how it is measured, and how its record becomes figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.common.errors import UserError, nearest
from penstock.common.model.files import LoadedTokenizer
from penstock.store.joined import JoinedDataset
from penstock.trainer.judging import contexts, overview
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
        reads=lambda case: contexts.source_of(case.data, case.settings.contexts),
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
