"""The evaluation that ends a run: `judging.costs` on held-out text, or sums over held-out rows."""

from typing import Any

import pytest
import torch

from penstock.common.errors import UserError
from penstock.producer.corpus import CorpusSettings, ensure_corpus
from penstock.store.corpus import HELD_OUT, Corpus
from penstock.trainer.evaluate import evaluate, evaluate_rows, held_out_text
from penstock.trainer.kinds import TopKSettings
from penstock.trainer.sae import SAE, build
from services.lm import RESID_3, shipped_model, shipped_tokenizer, write_text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("evaluated")
    settings = CorpusSettings(
        url=str(directory / "corpus"),
        text="files",
        files=[write_text(directory / "text", documents=60)],
        context=32,
    )
    return ensure_corpus(settings, shipped_tokenizer(), lambda done, wanted: None)


@pytest.fixture(scope="module")
def topk() -> SAE:
    sae = build(192, TopKSettings(name="t", architecture="topk", hook_name=RESID_3, d_sae=300, k=8))
    sae.initialise(0, None)
    sae.fold_scale(0.4)
    return sae.eval().requires_grad_(False)


def test_the_loss_is_in_the_units_of_training(corpus: Corpus, topk: SAE) -> None:
    told: list[tuple[int, int]] = []
    text = held_out_text(corpus, 2)
    result = evaluate(shipped_model(), text, {"t": topk}, lambda done, all_: told.append((done, all_)))
    figures = result["saes"]["t"]
    assert result["sequences"] == 2
    assert figures["loss"] == pytest.approx(figures["squared_error"] * 0.4**2)
    assert told[-1] == (6, 6), "clean, with zeros, with the SAE"


def test_rows_are_worth_what_text_is(corpus: Corpus, topk: SAE) -> None:
    """The same rows, once from the model and once given: all that does not need the model is the same."""
    text = held_out_text(corpus, 3)
    tokens = torch.from_numpy(text.tokens).long()
    keep = ~torch.isin(tokens, torch.tensor(text.special_ids))
    rows: list[torch.Tensor] = []
    for sequence, kept in zip(tokens, keep, strict=True):

        def noting(acts: torch.Tensor, kept: torch.Tensor = kept) -> torch.Tensor:
            rows.append(acts[0][kept].float())
            return acts

        shipped_model().logits(sequence[None], {RESID_3: noting})
    calls: list[int] = []
    alone = evaluate_rows({"t": topk}, ({RESID_3: one} for one in rows), calls.append)
    inside = evaluate(shipped_model(), text, {"t": topk})
    assert calls == [1, 2, 3]
    without: dict[str, Any] = alone["saes"]["t"]
    assert without.keys() == inside["saes"]["t"].keys()
    for name, value in without.items():
        if name in ("ce_clean", "ce_spliced", "ce_zero", "ce_recovered", "delta_ce", "kl"):
            assert value is None
        elif name != "density":
            assert value == pytest.approx(inside["saes"]["t"][name], rel=1e-4)
    assert alone["controls"] == {}


def test_no_more_sequences_than_there_are(corpus: Corpus) -> None:
    n = corpus.manifest.n_held_out
    text = held_out_text(corpus, 10_000)
    assert len(text) == n
    assert (text.tokens[-1] == corpus.tokens(n - 1, n, HELD_OUT)[0]).all()


def test_a_corpus_that_holds_nothing_out_is_refused(corpus: Corpus) -> None:
    nothing = Corpus(corpus.store, corpus.manifest.model_copy(update={"n_held_out": 0}))
    with pytest.raises(UserError, match="no held-out sequences"):
        held_out_text(nothing, 5)
