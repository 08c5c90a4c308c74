"""Error propagation, against hooks placed by hand."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.sequences import positions, propagation
from penstock.trainer.judging.sequences.propagation_figures import short_labels
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from services.judged import RESIDS, identity, random_text, untrained_sae, untrained_transcoder
from services.judged_by_hand import metrics, replaced, seen

MLP = "blocks.2.hook_mlp_out"


@pytest.fixture(scope="module")
def short() -> Text:
    tokens = random_text().tokens[:3, :10].copy()
    tokens[1, 4] = 0
    return Text(tokens, [0])


@pytest.fixture(scope="module")
def dictionaries() -> list[Dictionary]:
    """Not in the order of the layers; two at one place."""
    early, late = untrained_sae(RESIDS[1], seed=1), untrained_sae(RESIDS[4], seed=4)
    return [
        replace(late, name="late"),
        replace(early, name="early"),
        replace(untrained_transcoder("blocks.2.ln2.hook_normalized", MLP), name="coder"),
        replace(untrained_sae(RESIDS[4], seed=5), name="late-other"),
    ]


@pytest.fixture(scope="module")
def record(model: LanguageModel, short: Text, dictionaries: list[Dictionary]) -> dict[str, Any]:
    found = propagation.measure(Subject(model, short, dictionaries, 8))
    return dict(json.loads(json.dumps(found, allow_nan=False)))


def cell(record: dict[str, Any], spliced: str, measured: str) -> dict[str, Any] | None:
    found = [one for one in record["cells"] if (one["spliced"], one["measured"]) == (spliced, measured)]
    assert len(found) <= 1
    return found[0] if found else None


def test_layers_are_in_the_order_of_a_pass(record: dict[str, Any]) -> None:
    assert [one["name"] for one in record["dictionaries"]] == ["early", "coder", "late", "late-other"]
    there = {(one["spliced"], one["measured"]) for one in record["cells"]}
    early = {("early", name) for name in ("early", "coder", "late", "late-other")}
    # a transcoder reads what stands before the place that it replaces
    coder = {("coder", "late"), ("coder", "late-other")}
    late = {(a, b) for a in ("late", "late-other") for b in ("late", "late-other")}
    assert there == early | coder | late


def test_against_hooks_by_hand(
    model: LanguageModel, short: Text, dictionaries: list[Dictionary], record: dict[str, Any]
) -> None:
    """The same prompts in both arms, and nothing in the clean one that a splice has touched."""
    late, early, *_ = dictionaries
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in ("squared_error", "l0", "norm")}
    moved = size = 0.0
    rows = 0
    for number in range(len(short)):
        tokens = torch.from_numpy(short.tokens[number]).long()
        special = tokens == 0
        there = seen(model, tokens, late.hook_name, {early.hook_out: replaced(early, special)})
        clean = seen(model, tokens, late.hook_name, {})
        for arm, x in enumerate((clean[~special], there[~special])):
            acts = late.module.encode(x)
            error = (x - late.module.reconstruct(x, acts)).double().square().sum()
            sums["squared_error"][arm] += error
            sums["l0"][arm] += (acts > 0).sum()
            sums["norm"][arm] += x.double().norm(dim=1).sum()
        moved += float((there - clean)[~special].double().square().sum())
        size += float(clean[~special].double().square().sum())
        rows += int((~special).sum())
    found = cell(record, "early", "late")
    assert found is not None
    assert found["relative"]["stream_error"]["mean"] == pytest.approx(moved / size, rel=1e-4)
    clean_figures = next(one for one in record["dictionaries"] if one["name"] == "late")["clean"]
    for name, (before, after) in ((name, total.tolist()) for name, total in sums.items()):
        assert found["relative"][name]["mean"] == pytest.approx(after / before, rel=1e-4)
        assert found["values"][name]["mean"] == pytest.approx(after / rows, rel=1e-4)
        assert clean_figures[name]["mean"] == pytest.approx(before / rows, rel=1e-4)


def test_where_it_is_spliced_what_leaves_is_measured(
    model: LanguageModel, short: Text, dictionaries: list[Dictionary], record: dict[str, Any]
) -> None:
    late, _, _, other = dictionaries
    total = torch.zeros(3, dtype=torch.float64)
    for number in range(len(short)):
        tokens = torch.from_numpy(short.tokens[number]).long()
        x = seen(model, tokens, late.hook_name, {})[tokens != 0]
        left = late.module.reconstruct(x, late.module.encode(x))

        def error(rows: Tensor) -> Tensor:
            return (rows - other.module.reconstruct(rows, other.module.encode(rows))).double().square().sum()

        total += torch.stack([(left - x).double().square().sum(), error(left), error(x)])
    found = cell(record, "late", "late-other")
    assert found is not None
    assert found["relative"]["squared_error"]["mean"] == pytest.approx(float(total[1] / total[2]), rel=1e-4)
    clean = cell(record, "late", "late")
    assert clean is not None
    assert clean["relative"]["stream_error"] == found["relative"]["stream_error"]


def test_fault_two_scales_of_squared_error(
    model: LanguageModel, short: Text, dictionaries: list[Dictionary], record: dict[str, Any]
) -> None:
    """One scale here, by position and by hand: the sum over dimensions, in the units of the activations."""
    late = dictionaries[0]
    by_position = positions.measure(Subject(model, short, [late], 8))
    one = next(one for one in record["dictionaries"] if one["name"] == "late")
    values = metrics(model, short, late, torch.zeros(192, dtype=torch.float64))["squared_error"].values()
    expected = sum(values) / len(values)
    assert expected > 192
    assert one["clean"]["squared_error"]["mean"] == pytest.approx(expected, rel=1e-4)
    there = by_position["dictionaries"][0]["metrics"]["squared_error"]["overall"]["mean"]
    assert there == pytest.approx(expected, rel=1e-4)
    identical = cell(propagation.measure(Subject(model, short, [late], 8)), "late", "late")
    assert identical is not None
    assert record["squared_error"] == by_position["squared_error"]
    assert cell(record, "late", "late") == identical | {"row": 2, "column": 2}


def test_behind_identities_nothing_has_moved(model: LanguageModel, short: Text) -> None:
    saes = [
        replace(untrained_sae(place, seed=layer), name=f"sae{layer}") for layer, place in enumerate(RESIDS)
    ]
    same = [replace(identity(place), name=f"same{layer}") for layer, place in enumerate(RESIDS)]
    record = propagation.measure(Subject(model, short, [*saes, *same], 8))
    behind = [one for one in record["cells"] if one["spliced"].startswith("same")]
    # each layer's, and all behind it, of both sorts
    assert len(behind) == 2 * (6 + 5 + 4 + 3 + 2 + 1)
    for one in behind:
        relative = one["relative"]
        assert relative["stream_error"]["mean"] == 0
        assert relative["norm"]["mean"] == 1
        if one["measured"].startswith("sae"):
            assert relative["squared_error"]["mean"] == relative["l0"]["mean"] == 1
        else:
            # an error of nothing cannot be compared
            assert relative["squared_error"]["mean"] is None
    assert record["controls"] == dict.fromkeys(RESIDS, 0.0)


def test_figures_carry_all_of_their_data(record: dict[str, Any]) -> None:
    shown = {entry.name: entry for entry in propagation.show(record)}
    assert all(len(row) == len(entry.columns) for entry in shown.values() for row in entry.rows)
    for quantity in ("stream_error", "squared_error", "l0", "norm"):
        entry = shown[f"propagation-{quantity}"]
        assert entry.svg.startswith("<svg")
        assert len(entry.rows) == len(record["cells"])
        assert "2 is coder" in entry.note
    assert len(shown["propagation-controls"].rows) == 3


def test_labels_are_short_and_different() -> None:
    assert short_labels(RESIDS[:3]) == ["0", "1", "2"]
    assert short_labels([RESIDS[1], MLP, MLP, RESIDS[5]]) == ["1", "2a", "2b", "5"]
    assert short_labels(["hook_embed", RESIDS[0]]) == ["embed", "0"]
    assert len(set(short_labels([RESIDS[0]] * 60))) == 60
