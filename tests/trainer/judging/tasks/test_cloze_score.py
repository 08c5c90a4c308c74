"""Cloze scores, against single prompts scored by hand."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from penstock.common.errors import UserError
from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.splicing.splice import Splice, forward
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from penstock.trainer.judging.tasks import cloze_figures, cloze_score
from penstock.trainer.judging.tasks.cloze import Cloze
from penstock.trainer.judging.tasks.cloze_score import CLASSES, spearman
from services.cloze import few_prompts
from services.judged import RESIDS, constant, identity, untrained_sae

CLOZE = few_prompts()


@pytest.fixture(scope="module")
def subject(model: LanguageModel, text: Text) -> Subject:
    three = [untrained_sae(RESIDS[1]), identity(RESIDS[3]), constant(RESIDS[4], torch.zeros(192))]
    return Subject(model, text, three, trained_context=24)


@pytest.fixture(scope="module")
def record(subject: Subject) -> dict[str, Any]:
    found = cloze_score.measure(subject, CLOZE)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_the_four_classes_sum_to_the_number_of_prompts(record: dict[str, Any]) -> None:
    clean = record["clean"]
    assert record["prompts"] == len(CLOZE.items) == 20
    # there is something to break: otherwise two of the classes could only be empty
    assert 0 < sum(clean["right"]) < 20
    for one in record["dictionaries"]:
        sizes = one["classes"]
        assert sum(sizes[name] for name in CLASSES) == 20
        assert sizes["right_right"] + sizes["right_wrong"] == sum(clean["right"])
        assert sizes["right_right"] + sizes["wrong_right"] == sum(one["right"])
        for task, of in one["by_task"].items():
            assert sum(of["classes"].values()) == clean["by_task"][task]["prompts"] == 10
        assert one["accuracy"] == sum(one["right"]) / 20


def test_an_identity_changes_no_answer(record: dict[str, Any]) -> None:
    one = record["dictionaries"][1]
    assert one["delta_ln_p"] == [0.0] * 20
    assert one["right"] == record["clean"]["right"]
    assert one["classes"]["right_wrong"] == one["classes"]["wrong_right"] == 0
    assert one["values"]["mse_last"] == [0.0] * 20
    assert one["l0"] == 0


def test_every_figure_is_that_of_the_prompt_alone(subject: Subject, record: dict[str, Any]) -> None:
    sae = subject.dictionaries[0]
    for place, item in list(enumerate(CLOZE.items))[::6]:
        tokens = torch.tensor([item.tokens])
        keep = tokens != 0
        clean = forward(subject.model, tokens, keep, watch=[RESIDS[1]])
        spliced = forward(subject.model, tokens, keep, [Splice(sae)])
        before, after = (one.logits[0, -1].log_softmax(-1) for one in (clean, spliced))
        ours = record["dictionaries"][0]
        assert record["clean"]["ln_p"][place] == pytest.approx(float(before[item.answer_token]), abs=1e-4)
        assert ours["ln_p"][place] == pytest.approx(float(after[item.answer_token]), abs=1e-4)
        assert ours["right"][place] == (int(after.argmax()) == item.answer_token)
        wanted = float(after[item.answer_token] - before[item.answer_token])
        assert ours["delta_ln_p"][place] == pytest.approx(wanted, abs=2e-4)
        x = clean.seen[RESIDS[1]][keep]
        acts = sae.module.encode(x)
        squares = (x - sae.module.reconstruct(x, acts)).square().sum(-1)
        for name, values in (("mse", squares), ("l0", (acts > 0).sum(-1).float()), ("norm", x.norm(dim=-1))):
            assert ours["values"][f"{name}_last"][place] == pytest.approx(float(values[-1]), rel=1e-4)
            assert ours["values"][f"{name}_mean"][place] == pytest.approx(float(values.mean()), rel=1e-4)


@pytest.mark.parametrize("at_once", [3])
def test_results_do_not_depend_on_the_batches(subject: Subject, record: dict[str, Any], at_once: int) -> None:
    lengths = {len(item.tokens) for item in CLOZE.items}
    assert len(lengths) > 3
    other = cloze_score.measure(subject, CLOZE, at_once=at_once)
    for ours, theirs in zip(record["dictionaries"], other["dictionaries"], strict=True):
        np.testing.assert_allclose(ours["ln_p"], theirs["ln_p"], atol=1e-4)
        assert ours["classes"] == theirs["classes"]
        for name, values in ours["values"].items():
            np.testing.assert_allclose(values, theirs["values"][name], rtol=1e-4)


def test_a_result_does_not_depend_on_what_is_padded_with(subject: Subject, record: dict[str, Any]) -> None:
    """Longer prompts beside a short one give it more padding, and nothing else."""
    shortest = min(CLOZE.items, key=lambda item: len(item.tokens))
    longest = max(CLOZE.items, key=lambda item: len(item.tokens))
    pair = cloze_score.measure(subject, Cloze([shortest, longest]))
    place = CLOZE.items.index(shortest)
    for ours, theirs in zip(pair["dictionaries"], record["dictionaries"], strict=True):
        assert ours["ln_p"][0] == pytest.approx(theirs["ln_p"][place], abs=1e-4)
        assert ours["values"]["norm_mean"][0] == pytest.approx(theirs["values"]["norm_mean"][place], rel=1e-4)


def test_prompts_beyond_the_training_context_are_counted(record: dict[str, Any]) -> None:
    wanted = sum(len(item.tokens) > 24 for item in CLOZE.items)
    assert 0 < record["beyond_trained_context"] == wanted < 20


def test_without_prompts_there_is_nothing_to_measure() -> None:
    with pytest.raises(UserError, match="there are no prompts"):
        Cloze([])


def test_rank_correlation() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1.0)
    assert spearman(x, -(x**3)) == pytest.approx(-1.0)
    # ties share their mean rank: ranks 1.5, 1.5, 3 against 1, 2, 3
    assert spearman(np.array([0.0, 0.0, 5.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(math.sqrt(0.75))
    assert spearman(np.array([0.0, 0.0, 0.0]), x[:3]) is None
    assert spearman(np.array([1.0, np.nan, 2.0, np.nan]), x) is None


def test_what_is_shown(record: dict[str, Any]) -> None:
    shown = cloze_figures.show(record)
    assert [one.name for one in shown] == [
        *("cloze_accuracy", "cloze_by_task", "cloze_classes", "cloze_delta", "cloze_ln_p"),
        *("cloze_delta_by_mse", "cloze_delta_by_l0", "cloze_delta_by_norm", "cloze_spearman"),
    ]
    for one in shown:
        assert all(len(row) == len(one.columns) for row in one.rows), one.name
        assert bool(one.svg) == (one.name not in ("cloze_by_task", "cloze_spearman")), one.name
        assert "#a1000" not in one.svg
        assert "#a2000" not in one.svg
    by_name = {one.name: one for one in shown}
    beyond = record["beyond_trained_context"]
    assert f"{beyond} of the prompts are longer than the 24 tokens" in by_name["cloze_accuracy"].note
    # every prompt is in the data
    assert len(by_name["cloze_delta"].rows) == 3 * 20
    assert len(by_name["cloze_ln_p"].rows) == 20
    assert [one.svg for one in cloze_figures.show(record)] == [one.svg for one in shown]
