"""Features in context, against every row encoded at once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.common.errors import ConfigError
from penstock.common.model.language_model import LanguageModel
from penstock.store.joined import JoinedDataset
from penstock.trainer.judging.features import contexts
from penstock.trainer.judging.features.contexts import SPECIAL, source_of, token_text
from penstock.trainer.judging.settings import ContextSettings
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from services.judged import RESIDS, untrained_sae
from services.lm import shipped_tokenizer
from services.synthetic import CONTEXT, make_manifest, write_dataset

HOOK = RESIDS[3]
ROWS = [190, 197, 204, 210, 201]
SETTINGS = ContextSettings(of_each=2, examples=4, before=3, after=2, tokens=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> JoinedDataset:
    manifest = make_manifest(ROWS, hooks={HOOK: 192})
    return JoinedDataset([write_dataset(tmp_path_factory.mktemp("rows") / "dataset", manifest)])


@pytest.fixture(scope="module")
def subject(model: LanguageModel, text: Text) -> Subject:
    return Subject(model, text, [untrained_sae(HOOK)], 48)


def measured(subject: Subject, data: JoinedDataset, settings: ContextSettings = SETTINGS) -> dict[str, Any]:
    found = contexts.measure(subject, data, shipped_tokenizer(), settings, lambda done, total: None)
    record: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))["sae"]
    return record


@pytest.fixture(scope="module")
def record(subject: Subject, data: JoinedDataset) -> dict[str, Any]:
    return measured(subject, data)


@pytest.fixture(scope="module")
def encoded(subject: Subject, data: JoinedDataset) -> dict[tuple[int, int], torch.Tensor]:
    """(sequence, position) -> feature activations, of all rows."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for number in range(len(ROWS)):
        chunk = data.read_chunk(number, [HOOK])
        rows = torch.from_numpy(chunk.acts[HOOK].astype(np.float32))
        acts = subject.dictionaries[0].module.encode(rows)
        places = zip(chunk.sequence.tolist(), chunk.position.tolist(), strict=True)
        found |= dict(zip(places, acts, strict=True))
    return found


def token_at(sequence: int, position: int) -> int:
    """As the synthetic source has them."""
    return 1 + (sequence % 10 * CONTEXT + position) % 50


def test_activity_is_that_of_all_rows(
    record: dict[str, Any], encoded: dict[tuple[int, int], torch.Tensor]
) -> None:
    acts = torch.stack(list(encoded.values()))
    assert record["source"] == {"what": "stored rows", "chunks": 5, "of_chunks": 5, "rows": sum(ROWS)}
    assert record["l0"] == pytest.approx(float((acts > 0).sum(1).double().mean()))
    assert record["never_active"] == int(((acts > 0).sum(0) == 0).sum())
    assert len(record["features"]) == 6
    for feature in record["features"]:
        column = acts[:, feature["feature"]]
        live = column[column > 0]
        assert feature["fired"] == len(live) == sum(feature["histogram"]["counts"])
        assert feature["histogram"]["zero"] == sum(ROWS) - len(live)
        assert feature["share"] == len(live) / sum(ROWS)
        assert feature["mean_active"] == pytest.approx(float(live.double().mean()), rel=1e-5)
        assert feature["max"] == pytest.approx(float(live.max()), rel=1e-5)


def test_the_strongest_tokens_stand_in_their_context(
    record: dict[str, Any], encoded: dict[tuple[int, int], torch.Tensor]
) -> None:
    for feature in record["features"]:
        number, examples = feature["feature"], feature["examples"]
        ranked = sorted((float(acts[number]) for acts in encoded.values()), reverse=True)
        strongest = [value for value in ranked[:4] if value > 0]
        assert [e["activation"] for e in examples] == pytest.approx(strongest, rel=1e-4)
        for example in examples:
            sequence, position, at = example["sequence"], example["position"], example["at"]
            assert at == min(3, position)
            places = range(position - at, position - at + len(example["tokens"]))
            assert len(places) <= 6
            assert example["tokens"] == [token_at(sequence, place) for place in places]
            around = [max(0.0, float(encoded[sequence, place][number])) for place in places]
            assert example["activations"] == pytest.approx(around, rel=1e-4, abs=1e-5)
            assert example["activations"][at] == pytest.approx(example["activation"], rel=1e-4)
            assert example["texts"][at] == token_text(shipped_tokenizer(), example["tokens"][at])


def test_directions_promote_what_the_model_says(record: dict[str, Any], subject: Subject) -> None:
    one = subject.dictionaries[0]
    for feature in record["features"]:
        direction = one.module.W_dec[feature["feature"]][None]  # type: ignore[attr-defined]
        logits = subject.model.direct_logits(direction, HOOK)
        assert logits is not None
        for name, values in (("promotes", logits[0]), ("suppresses", -logits[0])):
            assert [t["token"] for t in feature[name]] == values.topk(5).indices.tolist()
        # the values themselves: an untrained SAE's rows have unit norm, so no scale stands between them
        assert feature["promotes"][0]["logit"] == pytest.approx(float(logits.max()), rel=1e-4)


def test_only_so_many_chunks_are_read(subject: Subject, data: JoinedDataset) -> None:
    few = SETTINGS.model_copy(update={"max_chunks": 2})
    assert source_of(subject, data, few)["chunks"] == [0, 2]
    found = measured(subject, data, few)
    assert found["source"]["rows"] == ROWS[0] + ROWS[2]
    sequences = {e["sequence"] // 10 for f in found["features"] for e in f["examples"]}
    assert sequences <= {0, 2}


def test_without_stored_rows_the_held_out_text_is_run(subject: Subject, tmp_path: Path) -> None:
    window = JoinedDataset(
        [write_dataset(tmp_path, make_manifest([20], {HOOK: 192}, retention="window"), [])]
    )
    found = measured(subject, window)
    text = subject.text
    assert found["source"] == {"what": "held-out text", "sequences": 6, "rows": int((text.tokens != 0).sum())}
    examples = [e for f in found["features"] for e in f["examples"]]
    for example in examples:
        first = example["position"] - example["at"]
        there = text.tokens[example["sequence"], first : first + len(example["tokens"])].tolist()
        # rows of special tokens have no activation, but their place is kept
        assert example["tokens"] == [token or None for token in there]
        for token, shown, activation in zip(
            example["tokens"], example["texts"], example["activations"], strict=True
        ):
            assert (token is None) == (activation is None) == (shown == SPECIAL)
    assert any(None in example["tokens"] for example in examples)


def test_features_can_be_asked_for(subject: Subject, data: JoinedDataset) -> None:
    asked = ContextSettings(features={"sae": [200, 3, 200]})
    found = measured(subject, data, asked)
    assert [(f["feature"], f["band"]) for f in found["features"]] == [(200, "asked for"), (3, "asked for")]
    with pytest.raises(ConfigError, match=r"sae has no feature 256; it has 0 to 255"):
        measured(subject, data, ContextSettings(features={"sae": [256]}))


def test_what_is_shown_holds_every_example(record: dict[str, Any]) -> None:
    shown = contexts.show({"sae": record})
    assert [one.name for one in shown] == ["contexts-sae", "contexts_features-sae", "contexts_histograms-sae"]
    assert len(shown[0].rows) == sum(len(f["examples"]) for f in record["features"])
    for one in shown:
        assert all(len(row) == len(one.columns) for row in one.rows)
    first = record["features"][0]["examples"][0]
    assert "".join(str(part) for part in shown[0].rows[0][-3:]) == "".join(first["texts"])
    assert "L0 16" in shown[0].note
    assert str(shown[0].svg).count("<article") == len(record["features"])
