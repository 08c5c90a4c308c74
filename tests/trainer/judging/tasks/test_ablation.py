"""Features taken out one at a time: planted ones, and against hooks placed by hand."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from penstock.trainer.judging.tasks import ablation, prompts
from penstock.trainer.judging.tasks.ablation import candidates, spread
from penstock.trainer.judging.tasks.cloze import Cloze
from penstock.trainer.judging.tasks.task_settings import AblationSettings
from penstock.trainer.sae import SAE
from services.cloze import few_prompts
from services.judged import RESIDS, identity, untrained_sae
from services.lm import shipped_tokenizer

PLANTED = 200
SAME_ANSWER = Cloze([item for item in few_prompts().items if item.task == "self"][:5])
SETTINGS = AblationSettings(candidates=12, listed=4, contexts=2, before=3, after=2)


def decode(tokens: Any) -> str:
    return str(shipped_tokenizer().tokenizer.decode(list(tokens)))


def planted(model: LanguageModel, sign: float) -> Dictionary:
    """An SAE of which one feature is active everywhere and speaks for or against the prompts' answer."""
    one = untrained_sae(RESIDS[5])
    sae = one.module
    assert isinstance(sae, SAE)
    unembedding = model._bridge.original_model.get_output_embeddings().weight
    towards: Tensor = unembedding.detach().float()[SAME_ANSWER.items[0].answer_token]
    towards = towards - towards.mean()
    with torch.no_grad():
        sae.W_enc[:, PLANTED] = 0.0
        sae.b_enc[PLANTED] = 40.0
        sae.W_dec[PLANTED] = sign * towards / towards.norm()
    return one


def ablate(model: LanguageModel, text: Text, one: Dictionary, settings: AblationSettings) -> dict[str, Any]:
    record = ablation.measure(Subject(model, text, [one], 64), SAME_ANSWER, settings, decode)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    found: dict[str, Any] = record["dictionaries"][0]
    return found


@pytest.mark.parametrize(
    ("sign", "kind", "other"), [(-1.0, "harmful", "helpful"), (1.0, "helpful", "harmful")]
)
def test_a_planted_feature_ranks_first(
    model: LanguageModel, text: Text, sign: float, kind: str, other: str
) -> None:
    found = ablate(model, text, planted(model, sign), SETTINGS)
    assert len(found["effects"]) == 12
    assert found[kind][0]["feature"] == PLANTED
    assert PLANTED not in [entry["feature"] for entry in found[other]]
    effects = {entry["feature"]: entry for entry in found["effects"]}
    mine = effects.pop(PLANTED)
    # taking it out raises ln p where it was harmful
    assert -sign * mine["mean_effect"] > 2 * max(abs(entry["mean_effect"]) for entry in effects.values())
    assert mine["prompts"] == len(SAME_ANSWER.items)
    assert mine["raised" if sign < 0 else "lowered"] == len(SAME_ANSWER.items)
    assert found["rounding"] < 1e-3


def test_an_effect_is_that_of_the_direction_taken_out_by_hand(model: LanguageModel, text: Text) -> None:
    one = untrained_sae(RESIDS[3])
    found = ablate(model, text, one, SETTINGS)
    sae = one.module
    assert isinstance(sae, SAE)
    for entry in found["effects"][0], found["effects"][-1]:
        effects, active = [], 0
        for item in SAME_ANSWER.items:
            tokens = torch.tensor([item.tokens])
            rows = tokens[0] != 0
            fired = 0

            def remove(acts: Tensor, rows: Tensor = rows, feature: int = entry["feature"]) -> Tensor:
                nonlocal fired
                result = acts.clone()
                strength = sae.encode(acts[0, rows])[:, feature]
                fired = int((strength > 0).sum())
                result[0, rows] -= strength[:, None] * sae.W_dec[feature]
                return result

            after = model.logits(tokens, {RESIDS[3]: remove})[0, -1].log_softmax(-1)[item.answer_token]
            before = model.logits(tokens)[0, -1].log_softmax(-1)[item.answer_token]
            effects.append(float(after - before))
            active += fired > 0
        assert entry["prompts"] == active
        assert entry["mean_effect"] == pytest.approx(sum(effects) / len(effects), abs=2e-4)
        assert entry["mean_effect_active"] == pytest.approx(sum(effects) / active, abs=4e-4)


def test_effects_do_not_depend_on_the_batches(
    model: LanguageModel, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = untrained_sae(RESIDS[3])
    few = AblationSettings(candidates=4)
    wanted = ablate(model, text, one, few)
    monkeypatch.setattr(prompts, "LOGIT_BYTES", 4 * 4096 * 50)
    found = ablate(model, text, one, few)
    for ours, theirs in zip(found["effects"], wanted["effects"], strict=True):
        assert ours["feature"] == theirs["feature"]
        assert ours["mean_effect"] == pytest.approx(theirs["mean_effect"], abs=1e-4)


def test_strongest_contexts_are_text_around_the_active_token(model: LanguageModel, text: Text) -> None:
    found = ablate(model, text, untrained_sae(RESIDS[3]), SETTINGS)
    texts = [item.prompt for item in SAME_ANSWER.items]
    listed = [*found["harmful"], *found["helpful"]]
    assert listed
    for entry in listed:
        strengths = [context["activation"] for context in entry["contexts"]]
        assert strengths == sorted(strengths, reverse=True)
        assert strengths[-1] > 0
        for context in entry["contexts"]:
            assert context["token"]
            shown = context["before"] + context["token"] + context["after"]
            assert any(shown in prompt for prompt in texts)


def test_signs_of_the_lists_and_what_is_shown(model: LanguageModel, text: Text) -> None:
    record = ablation.measure(
        *(Subject(model, text, [untrained_sae(RESIDS[3])], 64), SAME_ANSWER, SETTINGS, decode)
    )
    (found,) = record["dictionaries"]
    effects = {entry["feature"]: entry["mean_effect"] for entry in found["effects"]}
    assert list(effects.values()) == sorted(effects.values(), reverse=True)
    harmful, helpful = ([entry["feature"] for entry in found[kind]] for kind in ("harmful", "helpful"))
    assert all(effects[feature] > 0 for feature in harmful)
    assert all(effects[feature] < 0 for feature in helpful)
    assert helpful == list(reversed(effects))[: len(helpful)]
    shown = ablation.show(record)
    assert [one.name for one in shown] == ["ablation", "ablation_harmful", "ablation_helpful"]
    assert shown[0].svg
    assert len(shown[0].rows) == 12
    for one in shown:
        assert all(len(row) == len(one.columns) for row in one.rows)
    assert "«" in str(shown[1].rows[0][4])


def test_a_dictionary_without_features_has_no_effects(model: LanguageModel, text: Text) -> None:
    found = ablate(model, text, identity(RESIDS[3]), SETTINGS)
    assert found["effects"] == found["harmful"] == found["helpful"] == []


def test_candidates_have_the_largest_attribution() -> None:
    assert candidates([0.1, None, -3.0, 0.0, 3.0, 2.0], 3) == [2, 4, 5]
    assert candidates([0.1, None, -3.0, 0.0], None) == [2, 0, 3]


def test_prompts_are_spread_over_tasks() -> None:
    items = few_prompts().items
    chosen = spread(items, 7)
    assert [item.task for item in chosen] == ["self", "assign"] * 3 + ["self"]
    assert len(set(chosen)) == 7
    assert set(spread(items, 100)) == set(items)
