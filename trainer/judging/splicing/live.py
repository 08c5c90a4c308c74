"""SAEs judged inside the model while they train, between two windows, on a few held-out sequences.

It is a look from outside: weights are copied, and torch is left as it was found, so that no bit of the
training depends on whether, or when, somebody looked. What goes wrong here is told and never ends a training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from penstock.common.errors import PenstockError, UserError
from penstock.common.logs import LOGGER
from penstock.common.model.language_model import LanguageModel
from penstock.trainer.config import RunConfig
from penstock.trainer.group import Group
from penstock.trainer.judging.splicing.costs import measure
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from penstock.trainer.load import inference_sae

Figures = dict[str, dict[str, float]]
"""SAE -> figure -> value."""

Open = Callable[[RunConfig], tuple[LanguageModel, Text]]
"""The model and held-out text of a run. Raises UserError where a run has none here."""


class _Abandoned(Exception):
    """Whoever asked does not want to know any more."""


class LiveEvaluation:
    """Evaluates the SAEs of one run after another, each time that enough rows were trained on.

    Args:
        every: rows between two evaluations of a run.
        open_: called when there is something to evaluate, and not before.
    """

    def __init__(self, every: int, open_: Open) -> None:
        self._every = every
        self._open = open_
        self._run: str | None = None
        self._rows = 0
        self._hopeless: set[str] = set()

    def begin(self, config: RunConfig) -> None:
        """A run is taken up: what another worker saw of it is not known here."""
        self._run, self._rows = config.run_id, 0

    def due(self, group: Group) -> bool:
        return group.rows - self._rows >= self._every and self._run not in self._hopeless

    def figures(self, group: Group, going: Callable[[], bool]) -> Figures | None:
        """`ce_recovered`, `kl` and `l0` of each SAE as it is now; None, and a warning, if it cannot be told.

        Args:
            going: called now and then; if it says no, there is nothing to be told.
        """
        self._rows = group.rows
        run = group.config.run_id

        def progress(done: int, total: int) -> None:
            if not going():
                raise _Abandoned

        try:
            with _as_it_was(group.device):
                progress(0, 1)
                model, text = self._open(group.config)
                progress(0, 1)
                saes = {
                    name: inference_sae(group.config, name, member.weights())
                    for name, member in group.members.items()
                }
                dictionaries = [Dictionary.of_sae(n, sae, model.device) for n, sae in saes.items()]
                record = measure(Subject(model, text, dictionaries, text.context), progress)
        except _Abandoned:
            return None
        except UserError as error:
            self._hopeless.add(run)
            LOGGER.warning("run %s is not evaluated while it trains: %s", run, error)
            return None
        except Exception as error:
            told = str(error) if isinstance(error, PenstockError) else f"{type(error).__name__}: {error}"
            LOGGER.warning("run %s could not be evaluated: %s", run, " ".join(told.split())[:300])
            return None
        found: Figures = record["saes"]
        return found


@contextmanager
def _as_it_was(device: torch.device) -> Iterator[None]:
    """Leave torch as it is: what is drawn next, threads, and whether gradients are recorded."""
    threads, gradients, default = (
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(default)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
