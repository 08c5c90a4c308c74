"""The overview, against dictionaries whose figures are known and sums done by hand."""

import json
from typing import Any

import pytest
import torch

from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.sequences import overview, positions
from penstock.trainer.judging.splicing.measures import cross_entropy, divergence
from penstock.trainer.judging.splicing.splice import Splice, forward
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from services.judged import RESIDS, constant, identity, untrained_sae

MLP = "blocks.2.mlp.hook_post"


@pytest.fixture(scope="module")
def subject(model: LanguageModel, text: Text) -> Subject:
    return Subject(model, text, [untrained_sae(RESIDS[3]), identity(MLP)], 48)


@pytest.fixture(scope="module")
def record(subject: Subject) -> dict[str, Any]:
    found = overview.of_positions(positions.measure(subject))
    again: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    return again


def test_figures_are_those_done_by_hand(subject: Subject, record: dict[str, Any]) -> None:
    text, sae = subject.text, subject.dictionaries[0]
    tokens = torch.from_numpy(text.tokens).long()
    keep = tokens != 0
    clean = forward(subject.model, tokens, keep, watch=[RESIDS[3]])
    spliced = forward(subject.model, tokens, keep, [Splice(sae)]).logits
    x = clean.seen[RESIDS[3]][keep]
    acts = sae.module.encode(x)
    residual = (x - sae.module.reconstruct(x, acts)).double().square().sum(1)
    spread = (x.double() - x.double().mean(0)).square().sum(1)
    counts = keep[:, :-1]
    base, there = (float(cross_entropy(logits, tokens)[counts].mean()) for logits in (clean.logits, spliced))
    kl = float(divergence(clean.logits, spliced)[keep].mean())
    found = record["dictionaries"]["sae"]
    wanted = {
        "l0": float((acts > 0).sum(1).double().mean()),
        "squared_error": float(residual.mean()),
        "explained_variance": float(1 - residual.sum() / spread.sum()),
        "ce_clean": base,
        "ce_spliced": there,
        "delta_ce": there - base,
        "kl": kl,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    recovered = (found["ce_zero"] - there) / (found["ce_zero"] - base)
    assert found["ce_recovered"] == pytest.approx(recovered, rel=1e-5)
    assert found["kl"] != pytest.approx(found["delta_ce"], rel=1e-3)
    assert record["predictions"] == int(counts.sum())


def test_an_identity_costs_nothing_and_zeros_recover_nothing(
    record: dict[str, Any],
) -> None:
    assert record["controls"].keys() == {RESIDS[3], MLP}
    for found in record["controls"].values():
        assert found["identity"] == {"squared_error": 0.0, "delta_ce": 0.0, "kl": 0.0}
        assert found["zero_against_ablation"] == {"ce": 0.0, "kl": 0.0}
    placed = record["dictionaries"]["identity"]
    wanted = {"squared_error": 0.0, "delta_ce": 0.0, "kl": 0.0, "ce_recovered": 1.0, "l0": None}
    assert {name: placed[name] for name in wanted} == wanted


def test_zeros_in_the_place_of_an_sae_recover_nothing(model: LanguageModel, text: Text) -> None:
    zeros = constant(RESIDS[2], torch.zeros(192))
    found = overview.of_positions(positions.measure(Subject(model, text, [zeros], 48)))
    placed = found["dictionaries"]["constant"]
    assert placed["ce_recovered"] == 0.0
    assert placed["ce_spliced"] == placed["ce_zero"]
    assert placed["kl"] > 0


def test_every_row_shown_carries_its_l0(record: dict[str, Any]) -> None:
    table, recovered, variance, controls = overview.show(record)
    assert table.columns[:3] == ["Dictionary", "Hook point", "L0"]
    for shown in (table, recovered, variance, controls):
        assert all(len(row) == len(shown.columns) for row in shown.rows)
    assert recovered.rows[0][:2] == ["sae", 16.0]
    assert str(recovered.svg).startswith("<svg")
    assert not table.svg
    # what has no features has no place over L0
    assert [row[0] for row in variance.rows] == ["sae"]
    assert overview.show(record) == overview.show(record)
