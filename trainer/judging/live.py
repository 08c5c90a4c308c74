"""SAEs judged inside the model while they train, between two windows, on a few held-out sequences.

It is a look from outside: weights are copied, and torch is left as it was found, so that no bit of the
training depends on whether, or when, somebody looked. What goes wrong here is told and never ends a training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from penstock.common.errors import PenstockError, UserError
from penstock.common.logs import LOGGER
from penstock.common.model.language_model import LanguageModel
from penstock.trainer.config import RunConfig
from penstock.trainer.evaluate import recovered
from penstock.trainer.group import Group
from penstock.trainer.judging.dictionaries import Constant, Dictionary
from penstock.trainer.judging.measures import cross_entropy, divergence
from penstock.trainer.judging.splice import Splice, forward
from penstock.trainer.judging.subject import Subject
from penstock.trainer.judging.text import Batch, Text
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


@dataclass
class _Sums:
    cross_entropy: float = 0.0
    divergence: float = 0.0
    active: float = 0.0


@dataclass
class _Totals:
    rows: int = 0
    predictions: int = 0
    clean: float = 0.0
    zero: dict[str, float] = field(default_factory=dict)
    saes: dict[str, _Sums] = field(default_factory=dict)


def measure(subject: Subject, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """What each dictionary costs the model, in a few passes.

    Args:
        progress: called with passes done and in all.

    Returns:
        {"sequences", "saes": {name: {"l0", "ce_clean", "ce_spliced", "ce_zero", "ce_recovered",
        "delta_ce", "kl"}}}, in nats per prediction; KL is that of clean ‖ spliced.
    """
    totals = _Totals(saes={d.name: _Sums() for d in subject.dictionaries})
    places = list({d.hook_out: d for d in subject.dictionaries}.values())
    batches = list(subject.text.batches(subject.model))
    each = 1 + len(places) + len(subject.dictionaries)
    done = 0

    def passed() -> None:
        nonlocal done
        done += 1
        progress(done, each * len(batches))

    for batch in batches:
        clean = forward(subject.model, batch.tokens, batch.keep).logits
        totals.clean += _loss(clean, batch)
        totals.rows += int(batch.keep.sum())
        totals.predictions += int(batch.predicts.sum())
        passed()
        for place in places:
            nothing = place.in_place_of(Constant(torch.zeros(1)), "zero")
            logits = forward(subject.model, batch.tokens, batch.keep, [Splice(nothing)]).logits
            totals.zero[place.hook_out] = totals.zero.get(place.hook_out, 0.0) + _loss(logits, batch)
            passed()
        for dictionary in subject.dictionaries:
            _add(totals.saes[dictionary.name], subject.model, batch, dictionary, clean)
            passed()
    return {
        "sequences": len(subject.text),
        "saes": {d.name: _figures(totals, d) for d in subject.dictionaries},
    }


def _add(sums: _Sums, model: LanguageModel, batch: Batch, dictionary: Dictionary, clean: Tensor) -> None:
    def counting(acts: Tensor) -> Tensor:
        sums.active += float((acts > 0).sum())
        return acts

    logits = forward(model, batch.tokens, batch.keep, [Splice(dictionary, change=counting)]).logits
    sums.cross_entropy += _loss(logits, batch)
    apart = divergence(clean, logits)[:, :-1]
    sums.divergence += float(apart[batch.predicts.to(apart.device)].sum())


def _loss(logits: Tensor, batch: Batch) -> float:
    losses = cross_entropy(logits, batch.tokens)
    return float(losses[batch.predicts.to(losses.device)].sum())


def _figures(totals: _Totals, dictionary: Dictionary) -> dict[str, float | None]:
    sums, n = totals.saes[dictionary.name], totals.predictions
    clean, zero, spliced = totals.clean / n, totals.zero[dictionary.hook_out] / n, sums.cross_entropy / n
    return {
        "l0": sums.active / totals.rows,
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_recovered": recovered(clean, spliced, zero) if zero != clean else None,
        "delta_ce": spliced - clean,
        "kl": sums.divergence / n,
    }
