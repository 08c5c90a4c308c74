"""Scores of features, against sums over single prompts."""

import json

import numpy as np
import pytest
import torch

from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.splicing.splice import forward
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from penstock.trainer.judging.tasks import cloze_score, feature_scores
from penstock.trainer.judging.tasks.cloze import Cloze
from penstock.trainer.judging.tasks.task_settings import FeatureScoreSettings
from services.cloze import few_prompts
from services.judged import RESIDS, identity, untrained_sae

CLOZE = Cloze(few_prompts().items[4:16])


@pytest.fixture(scope="module")
def subject(model: LanguageModel, text: Text) -> Subject:
    return Subject(model, text, [untrained_sae(RESIDS[4])], trained_context=64)


@pytest.mark.parametrize("last_tokens", [1, 6])
def test_sums_are_those_over_the_prompts_it_is_active_on(subject: Subject, last_tokens: int) -> None:
    (found,) = feature_scores.measure(subject, CLOZE, FeatureScoreSettings(last_tokens=last_tokens))[
        "dictionaries"
    ]
    scored = cloze_score.measure(subject, CLOZE, at_once=1)
    delta = np.array(scored["dictionaries"][0]["delta_ln_p"])
    changed = np.array(scored["dictionaries"][0]["right"], int) - np.array(scored["clean"]["right"], int)
    sae = subject.dictionaries[0]
    strength = np.zeros((len(delta), 256))
    for place, item in enumerate(CLOZE.items):
        tokens = torch.tensor([item.tokens])
        seen = forward(subject.model, tokens, tokens != 0, watch=[RESIDS[4]]).seen[RESIDS[4]]
        strength[place] = sae.module.encode(seen[0, 1:][-last_tokens:]).double().mean(0).numpy()
    active = strength > 0
    assert found["prompts"] == active.sum(0).tolist()
    assert found["never_active"] == int((~active.any(0)).sum()) > 0
    for feature in range(256):
        here = active[:, feature]
        figures = [found[name][feature] for name in ("score", "outcome", "mean_delta_ln_p", "attribution")]
        if not here.any():
            # missing, which is not 0
            assert figures == [None] * 4
            continue
        wanted = [
            *(np.sign(delta[here]).sum(), changed[here].sum(), delta[here].mean()),
            (strength[:, feature] * delta).sum(),
        ]
        np.testing.assert_allclose(figures, wanted, atol=2e-3)
    # the sums tell prompts apart
    assert len(set(found["score"])) > 3


def test_a_feature_active_only_earlier_is_missing(subject: Subject) -> None:
    def known(last_tokens: int) -> int:
        record = feature_scores.measure(subject, CLOZE, FeatureScoreSettings(last_tokens=last_tokens))
        return 256 - int(record["dictionaries"][0]["never_active"])

    assert known(1) < known(4) < known(64)


def test_what_is_shown(model: LanguageModel, text: Text) -> None:
    both = [untrained_sae(RESIDS[4]), identity(RESIDS[2])]
    record = feature_scores.measure(Subject(model, text, both, 64), CLOZE, FeatureScoreSettings(listed=4))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    scores, listed, *densities = feature_scores.show(record)
    sae = record["dictionaries"][0]
    # features without a score are no rows
    assert len(scores.rows) == 256 - sae["never_active"]
    assert f"{sae['never_active']} of 256 in sae" in scores.note
    assert len(listed.rows) == 8
    values = [row[4] for row in listed.rows]
    known = sorted(score for score in sae["score"] if score is not None)
    assert values == [*known[:4], *known[-4:]]
    assert densities[0].rows[0][2] == sae["density"]["never_active"]
    assert scores.svg
    assert densities[0].svg
