"""What dictionaries cost, against dictionaries whose score is known and against direct computation."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from penstock.common.model.files import ModelSettings, find_model
from penstock.producer.corpus import CorpusSettings, ensure_corpus
from penstock.store.corpus import HELD_OUT, Corpus
from penstock.trainer.evaluate import held_out_text
from penstock.trainer.judging.splicing import text as text_module
from penstock.trainer.judging.splicing.costs import measure, recovered
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.splice import forward
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.kinds import SAESettings, TopKSettings, TranscoderSettings
from penstock.trainer.kinds.base import Schedule, StepResult
from penstock.trainer.sae import SAE, build
from services.lm import MLP_2, RESID_3, shipped_model, shipped_tokenizer, write_text

SEQUENCES = 5


class Known(SAE):
    """2·D features: the positive and the negative part of every coordinate, times a factor."""

    def __init__(self, d_in: int, factor: float) -> None:
        super().__init__(d_in, SAESettings(architecture="known", name="a", hook_name="h", d_sae=2 * d_in))
        self.factor = factor

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), (-x).relu()], dim=1) * self.factor

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts[:, : self.d_in] - feature_acts[:, self.d_in :]

    def training_pass(self, x: Tensor, target: Tensor, schedule: Schedule, dead: Tensor | None) -> StepResult:
        raise NotImplementedError


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
    settings = TopKSettings(name="t", architecture="topk", hook_name=RESID_3, d_sae=300, k=8)
    sae = build(192, settings)
    sae.initialise(0, None)
    sae.fold_scale(0.4)
    return sae.eval().requires_grad_(False)


def judged(corpus: Corpus, *dictionaries: Dictionary) -> dict[str, Any]:
    """Two sequences at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "LOGIT_BYTES", 2 * 4 * 32 * shipped_model().vocabulary)
        subject = Subject(shipped_model(), held_out_text(corpus, SEQUENCES), list(dictionaries), 32)
        return measure(subject)


@pytest.fixture(scope="module")
def result(corpus: Corpus, topk: SAE) -> dict[str, Any]:
    return judged(
        corpus,
        Dictionary("identity", RESID_3, RESID_3, Known(192, 1.0)),
        Dictionary("zero", RESID_3, RESID_3, Known(192, 0.0)),
        Dictionary("half", MLP_2, MLP_2, Known(768, 0.5)),
        Dictionary("topk", RESID_3, RESID_3, topk),
    )


def held_out(corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Token ids of the sequences used, and where they are not special."""
    tokens = torch.from_numpy(corpus.tokens(0, SEQUENCES, HELD_OUT)).long()
    special = torch.tensor(shipped_tokenizer().special_ids)
    return tokens, ~torch.isin(tokens, special)


def kept_rows(corpus: Corpus, hook: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    tokens, keep = held_out(corpus)
    return forward(shipped_model(), tokens, keep, watch=[hook]).seen[hook][keep].double().numpy()


def test_an_identity_recovers_everything(result: dict[str, Any]) -> None:
    figures = result["saes"]["identity"]
    assert figures["ce_recovered"] == pytest.approx(1.0, abs=1e-6)
    assert figures["ce_spliced"] == pytest.approx(figures["ce_clean"], abs=1e-6)
    assert figures["explained_variance"] == 1.0
    assert figures["squared_error"] == 0.0
    assert result["controls"]["identity_ce_recovered"] == pytest.approx(1.0, abs=1e-6)


def test_zeros_recover_nothing(result: dict[str, Any]) -> None:
    figures = result["saes"]["zero"]
    assert figures["ce_recovered"] == pytest.approx(0.0, abs=1e-6)
    assert figures["ce_spliced"] == pytest.approx(figures["ce_zero"], abs=1e-6)
    assert figures["ce_zero"] > figures["ce_clean"] + 0.5
    assert figures["explained_variance"] < 0.05
    assert figures["l0"] == 0
    assert figures["dead_features"] == figures["density"]["never_active"] == 2 * 192
    assert sum(figures["density"]["counts"]) == 0
    assert result["controls"]["zero_ce_recovered"] == pytest.approx(0.0, abs=1e-6)


def test_each_hook_point_has_its_own_zero(result: dict[str, Any]) -> None:
    half, zero = result["saes"]["half"], result["saes"]["zero"]
    assert half["ce_zero"] != zero["ce_zero"]
    assert half["ce_clean"] == zero["ce_clean"]
    assert half["ce_recovered"] == pytest.approx(
        recovered(half["ce_clean"], half["ce_spliced"], half["ce_zero"])
    )


MLP_OUT = "blocks.2.mlp.hook_out"


@pytest.fixture(scope="module")
def projection() -> SAE:
    """The model's own map from an MLP's activations to its output, as a transcoder's skip connection."""
    (file,) = find_model(ModelSettings()).weight_files()
    weights = safetensors.torch.load_file(file)
    name = next(key for key in weights if key.endswith("h.2.mlp.c_proj.weight"))
    settings = TranscoderSettings(
        name="t", architecture="transcoder", hook_name=MLP_2, hook_out=MLP_OUT, d_sae=4, k=1, skip=True
    )
    sae = build(768, settings, 192)
    sae.initialise(0, None)
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
        sae.get_parameter("W_skip").copy_(weights[name].float())
        sae.b_dec.copy_(weights[name.replace("weight", "bias")].float())
    sae.fold_scale(1.0, 1.0)
    return sae.eval().requires_grad_(False)


def test_a_transcoder_is_evaluated_at_its_output(corpus: Corpus, projection: SAE) -> None:
    """One that computes what the model computes recovers everything; one that gives zeros, nothing."""
    nothing = Known(768, 0.0)
    nothing.decode = lambda feature_acts: torch.zeros(len(feature_acts), 192)  # type: ignore[method-assign]
    result = judged(
        corpus,
        Dictionary("whole", MLP_2, MLP_OUT, projection),
        Dictionary("nothing", MLP_2, MLP_OUT, nothing),
    )
    whole, zero = result["saes"]["whole"], result["saes"]["nothing"]
    assert whole["explained_variance"] == pytest.approx(1.0, abs=5e-5)
    assert whole["ce_recovered"] == pytest.approx(1.0, abs=1e-3)
    assert whole["squared_error"] < 1e-4 * zero["squared_error"]
    assert zero["ce_recovered"] == pytest.approx(0.0, abs=1e-6)
    x = kept_rows(corpus, MLP_OUT)
    residual, total = float((x**2).sum()), float(((x - x.mean(axis=0)) ** 2).sum())
    assert zero["explained_variance"] == pytest.approx(1 - residual / total, abs=1e-6)
    alone = judged(corpus, Dictionary("zero", MLP_OUT, MLP_OUT, Known(192, 0.0)))
    assert zero["ce_zero"] == pytest.approx(alone["saes"]["zero"]["ce_zero"], abs=1e-4)
    assert result["controls"]["identity_ce_recovered"] == pytest.approx(1.0, abs=1e-6)


def test_the_clean_cross_entropy_is_the_models_own(result: dict[str, Any], corpus: Corpus) -> None:
    tokens, keep = held_out(corpus)
    logits = shipped_model().logits(tokens).double()
    log_p = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    losses = [
        -float(log_p[s, p, tokens[s, p + 1]])
        for s in range(SEQUENCES)
        for p in range(tokens.shape[1] - 1)
        if keep[s, p]
    ]
    assert result["saes"]["topk"]["ce_clean"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert result["sequences"] == SEQUENCES


@pytest.mark.parametrize(("name", "hook"), [("topk", RESID_3), ("half", MLP_2)])
def test_figures_equal_direct_computation(
    result: dict[str, Any], corpus: Corpus, topk: SAE, name: str, hook: str
) -> None:
    figures = result["saes"][name]
    x = kept_rows(corpus, hook)
    sae = topk if name == "topk" else Known(768, 0.5)
    acts = sae.encode(torch.from_numpy(x).float())
    residual = float(((x - sae.decode(acts).double().numpy()) ** 2).sum())
    total = float(((x - x.mean(axis=0)) ** 2).sum())
    assert figures["rows"] == len(x)
    assert figures["explained_variance"] == pytest.approx(1 - residual / total, abs=1e-6)
    assert figures["squared_error"] == pytest.approx(residual / len(x), rel=1e-5)
    fired = (acts > 0).sum(dim=0).numpy()
    assert figures["l0"] == pytest.approx(fired.sum() / len(x))
    assert figures["dead_features"] == int((fired == 0).sum())
    counts = figures["density"]["counts"]
    assert sum(counts) + figures["density"]["never_active"] == sae.d_sae
    edges = np.array(figures["density"]["log10_edges"])
    share = np.log10(fired[fired > 0] / len(x))
    expected = [
        int(((share >= low) & ((share < high) | (high == edges[-1]))).sum()) for low, high in pairwise(edges)
    ]
    assert counts == expected


def test_rows_of_special_tokens_are_left_alone(
    corpus: Corpus, topk: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shipped_model()
    tokens, keep = held_out(corpus)
    assert not keep[:, 0].any(), "every sequence begins with BOS"
    given = torch.randn(*tokens.shape, 192, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    logits = model.logits

    def noting(ids: Tensor, splice: Any = None) -> Tensor:
        for function in (splice or {}).values():
            seen.append(function(given))
        return logits(ids, splice)

    monkeypatch.setattr(model, "logits", noting)
    dictionary = Dictionary("topk", RESID_3, RESID_3, topk)
    measure(Subject(model, held_out_text(corpus, SEQUENCES), [dictionary], 32))
    assert len(seen) >= 2
    for replaced in seen:
        assert torch.equal(replaced[~keep], given[~keep])
    changed = [not torch.equal(replaced[keep], given[keep]) for replaced in seen]
    assert sum(changed) == len(seen) - 2, "all but the clean pass and the identity replace the other rows"
    expected = topk(given.flatten(0, 1)).view_as(given)[keep]
    assert any(torch.allclose(replaced[keep], expected) for replaced in seen)


def test_the_batch_size_does_not_matter(result: dict[str, Any], corpus: Corpus, topk: SAE) -> None:
    dictionary = Dictionary("topk", RESID_3, RESID_3, topk)
    again = measure(Subject(shipped_model(), held_out_text(corpus, SEQUENCES), [dictionary], 32))
    for name in ("explained_variance", "ce_clean", "ce_zero", "ce_recovered", "kl", "l0", "squared_error"):
        assert again["saes"]["topk"][name] == pytest.approx(result["saes"]["topk"][name], abs=1e-4)


def test_recovered_is_the_share_of_the_gap_that_is_closed() -> None:
    assert recovered(3.0, 3.5, 8.0) == pytest.approx(0.9)
    assert recovered(3.0, 3.0, 3.0) is None


def test_the_divergence_is_that_of_the_distributions(
    result: dict[str, Any], corpus: Corpus, topk: SAE
) -> None:
    tokens, keep = held_out(corpus)

    def spliced(acts: Tensor) -> Tensor:
        return torch.where(keep[..., None], topk(acts.flatten(0, 1)).view_as(acts), acts)

    p, q = (
        torch.log_softmax(logits[keep].double(), -1)
        for logits in (
            shipped_model().logits(tokens),
            shipped_model().logits(tokens, {RESID_3: spliced}),
        )
    )
    figures = result["saes"]["topk"]
    assert figures["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert figures["delta_ce"] == figures["ce_spliced"] - figures["ce_clean"]
    assert figures["kl"] != pytest.approx(figures["delta_ce"], rel=1e-3), "they are not the same figure"
    assert result["saes"]["identity"]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert result["saes"]["zero"]["kl"] > 0.5
