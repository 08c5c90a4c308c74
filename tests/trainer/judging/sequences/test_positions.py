"""Metrics by position, against the same worked out row by row, and against dictionaries that are known.

A published evaluation of this kind had its activations cached after an in-place hook, a stale position index,
positions that let BOS in, two scales of squared error, and a ΔCE that was called KL. Each test of a fault
fails where the fault is brought back.
"""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.sequences import positions
from penstock.trainer.judging.sequences.positions_tables import beyond
from penstock.trainer.judging.splicing import text as text_module
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from penstock.trainer.kinds import StandardSettings
from penstock.trainer.sae import build
from services.judged import RESIDS, constant, identity, random_text, untrained_sae, untrained_transcoder
from services.judged_by_hand import Values, by_position, mean_activation, metrics

PLACE = RESIDS[3]
CONTEXT, TRAINED = 12, 5


@pytest.fixture(scope="module")
def short() -> Text:
    """Five sequences; one has an end of text in its middle, one two of them side by side."""
    tokens = random_text().tokens[:5, :CONTEXT].copy()
    tokens[1, 4] = tokens[3, 7] = tokens[3, 8] = 0
    return Text(tokens, [0])


@pytest.fixture(scope="module")
def one() -> Dictionary:
    """A ReLU SAE as it starts: how many features are active differs from row to row."""
    settings = StandardSettings(
        architecture="standard", name="sae", hook_name=PLACE, d_sae=256, l1_coefficient=0.1
    )
    built = build(192, settings)
    built.initialise(0, None)
    return Dictionary.of_sae("sae", built.eval().requires_grad_(False), torch.device("cpu"))


@pytest.fixture(scope="module")
def record(model: LanguageModel, short: Text, one: Dictionary) -> dict[str, Any]:
    """In batches of two sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "LOGIT_BYTES", 2 * 4 * CONTEXT * model.vocabulary)
        assert [len(batch.tokens) for batch in short.batches(model)] == [2, 2, 1]
        dictionaries = [one, untrained_sae(RESIDS[1], seed=2), identity(PLACE)]
        found = positions.measure(Subject(model, short, dictionaries, TRAINED))
    return dict(json.loads(json.dumps(found, allow_nan=False)))


@pytest.fixture(scope="module")
def wanted(model: LanguageModel, short: Text, one: Dictionary) -> Values:
    return metrics(model, short, one, mean_activation(model, short, PLACE))


def means(record: dict[str, Any], metric: str) -> list[float | None]:
    found: list[float | None] = record["dictionaries"][0]["metrics"][metric]["by_position"]["mean"]
    return found


def close(found: list[float | None], expected: list[float | None], rel: float = 2e-4) -> None:
    assert [value is None for value in found] == [value is None for value in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    for a, b in pairs:
        assert a == pytest.approx(b, rel=rel, abs=2e-4)


@pytest.mark.parametrize("metric", ["l0", "l1", "squared_error", "norm"])
def test_fault_activations_cached_after_the_splice(
    record: dict[str, Any], wanted: Values, metric: str
) -> None:
    """Rows are those of the clean stream: an SAE measured on its own reconstructions looks far better."""
    close(means(record, metric), by_position(wanted[metric], CONTEXT))


@pytest.mark.parametrize("metric", ["norm", "squared_error", "kl", "delta_ce"])
def test_fault_a_stale_position_index(record: dict[str, Any], wanted: Values, metric: str) -> None:
    """Position by position, behind special tokens within sequences and from one batch to the next."""
    found = means(record, metric)
    close(found, by_position(wanted[metric], CONTEXT))
    # positions do differ: one mixed up would be seen
    known = [value for value in found if value is not None]
    assert np.std(known) > 0.01 * abs(np.mean(known))
    assert record["rows"] == [0, 5, 5, 5, 4, 5, 5, 4, 4, 5, 5, 5]


def test_fault_positions_that_let_bos_in(record: dict[str, Any], model: LanguageModel, short: Text) -> None:
    """Position 0 is BOS, whose norm alone would outweigh everything, and it is nowhere."""
    assert record["rows"][0] == 0
    every = [record["ce_clean"], *record["dictionaries"][0]["metrics"].values()]
    every += [metric for arm in record["sites"][PLACE].values() for metric in arm.values()]
    for metric in every:
        assert metric["by_position"]["mean"][0] is None
        assert metric["by_position"]["mean"][1] is not None
    # whatever stands there
    moved = short.tokens.copy()
    moved[:, 0] = 7
    other = positions.measure(Subject(model, Text(moved, [0]), [constant(PLACE, torch.zeros(192))], TRAINED))
    assert other["rows"][0] == len(short)
    assert other["dictionaries"][0]["metrics"]["norm"]["by_position"]["mean"][0] is not None


def test_fault_delta_ce_called_kl(record: dict[str, Any], wanted: Values) -> None:
    close(means(record, "delta_ce"), by_position(wanted["delta_ce"], CONTEXT))
    close(means(record, "kl"), by_position(wanted["kl"], CONTEXT))
    delta, kl = (record["dictionaries"][0]["metrics"][name]["overall"]["mean"] for name in ("delta_ce", "kl"))
    assert abs(delta - kl) > 0.1
    assert delta == pytest.approx(np.mean(list(wanted["delta_ce"].values())), abs=1e-4)
    assert kl == pytest.approx(np.mean(list(wanted["kl"].values())), abs=1e-4)


def test_cross_entropies_and_what_is_recovered(record: dict[str, Any], wanted: Values) -> None:
    found = record["dictionaries"][0]["metrics"]
    total = {name: sum(values.values()) for name, values in wanted.items()}
    count = len(wanted["ce"])
    sites = record["sites"][PLACE]
    assert record["ce_clean"]["overall"]["mean"] == pytest.approx(total["clean"] / count, abs=1e-4)
    assert found["ce"]["overall"]["mean"] == pytest.approx(total["ce"] / count, abs=1e-4)
    for name in ("zero", "mean"):
        assert sites[name]["ce"]["overall"]["mean"] == pytest.approx(total[name] / count, abs=1e-4)
        recovered = (total[name] - total["ce"]) / (total[name] - total["clean"])
        assert found[f"ce_recovered_{name}"]["overall"]["mean"] == pytest.approx(recovered, rel=1e-3)
        assert sites[name][f"ce_recovered_{name}"]["overall"]["mean"] == pytest.approx(0, abs=1e-12)
    assert (
        min(value for arm in (found, *sites.values()) for value in arm["kl"]["by_position"]["mean"][1:]) > 0
    )
    # the last position predicts nothing that is known, and yet has a distribution
    assert found["ce"]["by_position"]["mean"][-1] is None
    assert found["kl"]["by_position"]["mean"][-1] is not None


def test_a_transcoder_is_measured_where_it_replaces(model: LanguageModel, short: Text) -> None:
    text = Text(short.tokens[:2], [0])
    one = untrained_transcoder("blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out")
    found = positions.measure(Subject(model, text, [one], TRAINED))["dictionaries"][0]["metrics"]
    expected = metrics(model, text, one, mean_activation(model, text, one.hook_out))
    for metric in ("l0", "l1", "squared_error", "norm", "kl", "delta_ce"):
        close(found[metric]["by_position"]["mean"], by_position(expected[metric], CONTEXT))
    unexplained = sum(expected["squared_error"].values()) / sum(expected["variance"].values())
    assert found["explained_variance"]["overall"]["mean"] == pytest.approx(1 - unexplained, rel=1e-4)


def test_explained_variance_within_and_beyond(record: dict[str, Any], wanted: Values) -> None:
    found = record["dictionaries"][0]["metrics"]["explained_variance"]

    def explained(low: int, high: int) -> float:
        kept = [at for at in wanted["variance"] if low <= at[1] < high]
        return 1 - sum(wanted["squared_error"][at] for at in kept) / sum(
            wanted["variance"][at] for at in kept
        )

    parts = ("overall", 0, CONTEXT), ("within", 0, TRAINED), ("beyond", TRAINED, CONTEXT)
    for part, low, high in parts:
        assert found[part]["mean"] == pytest.approx(explained(low, high), rel=1e-4)
    for position in range(1, CONTEXT):
        expected = explained(position, position + 1)
        assert found["by_position"]["mean"][position] == pytest.approx(expected, rel=1e-4)
    ratio = (1 - explained(TRAINED, CONTEXT)) / (1 - explained(0, TRAINED))
    assert found["unexplained_beyond_over_within"]["mean"] == pytest.approx(ratio, rel=1e-4)
    # μ itself explains nothing
    mean = record["sites"][PLACE]["mean"]
    assert mean["explained_variance"]["overall"]["mean"] == pytest.approx(0, abs=1e-6)


def test_an_identity_changes_nothing_anywhere(record: dict[str, Any]) -> None:
    found = record["dictionaries"][2]["metrics"]
    nothing = [None, *[0.0] * (CONTEXT - 1)]
    assert found["squared_error"]["by_position"]["mean"] == nothing
    assert found["kl"]["by_position"]["mean"] == nothing
    assert found["delta_ce"]["by_position"]["mean"] == [*nothing[:-1], None]
    for name in ("explained_variance", "ce_recovered_zero", "ce_recovered_mean"):
        assert found[name]["overall"]["mean"] == 1
    for place in (PLACE, RESIDS[1]):
        identity = record["controls"][place]["identity"]
        assert identity["kl"] == identity["squared_error"] == nothing
        assert identity["delta_ce"] == [*nothing[:-1], None]


@pytest.mark.parametrize("place", [*RESIDS, "blocks.1.mlp.hook_post", "blocks.2.attn.hook_out"])
def test_identities_and_zeros_at_every_layer(model: LanguageModel, short: Text, place: str) -> None:
    zero = constant(place, torch.zeros(model.widths([place])[place]))
    record = positions.measure(Subject(model, Text(short.tokens[:2], [0]), [zero], TRAINED))
    controls = record["controls"][place]
    for control in controls["identity"], controls["zero_against_ablation"]:
        for values in control.values():
            assert {value for value in values if value is not None} == {0.0}
    arms = record["dictionaries"][0]["metrics"], record["sites"][place]["zero"]
    for metric in ("ce", "kl", "delta_ce", "squared_error"):
        assert arms[0][metric] == arms[1][metric]
    assert arms[0]["ce_recovered_zero"]["overall"]["mean"] == 0
    # what zeros leave out is all there is
    norm, error = (arms[0][name]["by_position"]["mean"][1:] for name in ("norm", "squared_error"))
    assert all(e >= n**2 * (1 - 1e-6) for n, e in zip(norm, error, strict=True))


def test_densities_and_l0_belong_together(record: dict[str, Any]) -> None:
    for found in record["dictionaries"][:2]:
        density = found["density"]
        assert sum(density["counts"]) + density["never_active"] == 256
        assert found["l0"] == found["metrics"]["l0"]["overall"]["mean"]
    assert record["dictionaries"][1]["l0"] == 16


def test_the_same_inputs_give_the_same_record_and_figures(
    model: LanguageModel, short: Text, one: Dictionary, record: dict[str, Any]
) -> None:
    subject = Subject(model, short, [one], TRAINED)
    told: list[tuple[int, int]] = []
    again = positions.measure(subject, lambda done, total: told.append((done, total)))
    assert again == positions.measure(subject)
    assert positions.show(again) == positions.show(json.loads(json.dumps(again)))
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    # batches are a matter of memory alone
    whole, parts = (found["dictionaries"][0]["metrics"]["kl"]["overall"]["mean"] for found in (again, record))
    assert math.isclose(whole, parts, rel_tol=1e-5)


def test_figures_carry_all_of_their_data(record: dict[str, Any]) -> None:
    shown = {entry.name: entry for entry in positions.show(record)}
    assert all(len(row) == len(entry.columns) for entry in shown.values() for row in entry.rows)
    kl = shown["positions-kl"]
    assert kl.svg.startswith("<svg")
    assert "5 positions" in kl.note
    assert len(kl.rows) == 3 * CONTEXT
    assert [row[4] for row in kl.rows[:CONTEXT]] == means(record, "kl")
    assert all("l0" in entry.columns for name, entry in shown.items() if name.startswith("positions-b"))
    compared = {(row[0], row[3]): row for row in shown["positions-beyond"].rows}
    assert compared["identity", "kl"][-1] == "not said"
    assert "density-sae" in shown
    assert "density-identity" not in shown


def test_an_explosion_beyond_the_trained_context_is_said(record: dict[str, Any]) -> None:
    (steady,) = beyond(record)
    assert "Nothing explodes" in steady.note
    burst = json.loads(json.dumps(record))
    burst["dictionaries"][0]["metrics"]["kl"]["beyond_over_within"] = {"mean": 9.0, "error": 0.5}
    (said,) = beyond(burst)
    assert "What explodes: KL of sae." in said.note
    # within what it was trained on, there is nothing to compare
    assert not list(beyond(record | {"trained_context": CONTEXT}))
