"""Controls: the model's architecture with weights that were drawn, the same ones everywhere."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from penstock.common.errors import ConfigError, ModelError
from penstock.common.model.files import ModelFiles, ModelSettings, Weights, find_model
from penstock.common.model.language_model import LanguageModel
from penstock.common.model.random_weights import _Draws, random_model
from penstock.common.settings import parse
from services.lm import RESID_3

CONTROLS: list[Weights] = ["random", "random-keep-embeddings"]
TABLES = ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"]
SHIPPED = "29b7e9257da067c9"
"""First digits of the digest of the shipped model's weights, which manifests hold."""
DRAWN = {"random": "6eeb97513b8a71fa", "random-keep-embeddings": "97d8baffc4573ccf"}
"""Those of its controls with seed 0: a machine on which they differ makes another control."""


def files_of(weights: Weights, seed: int = 0) -> ModelFiles:
    return find_model(ModelSettings(weights=weights, weights_seed=seed))


def weights_of(weights: Weights, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(random_model(files_of(weights, seed)).state_dict())


@pytest.fixture(scope="module")
def drawn() -> dict[str, torch.Tensor]:
    return weights_of("random")


def test_weights_begin_as_the_architecture_begins(drawn: dict[str, torch.Tensor]) -> None:
    """GPT-2: normal 0.02, and that over √(2 layers) where a block writes into the residual stream."""
    for name, values in drawn.items():
        assert values.dtype == torch.float32
        if name.endswith("bias"):
            assert not values.any(), name
        elif ".ln_" in name:
            assert bool((values == 1).all()), name
        else:
            std = 0.02 / math.sqrt(12) if name.endswith("c_proj.weight") else 0.02
            assert float(values.std()) == pytest.approx(std, rel=0.01), name
            assert abs(float(values.mean())) < 5 * std / math.sqrt(values.numel()), name


def test_the_same_weights_come_whatever_was_drawn_before(drawn: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = weights_of("random")
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator is left alone"
    assert all(torch.equal(again[name], values) for name, values in drawn.items())
    other = weights_of("random", 1)
    assert not any(torch.equal(other[n], v) for n, v in drawn.items() if n.endswith("c_fc.weight"))


def test_embeddings_alone_are_kept(drawn: dict[str, torch.Tensor]) -> None:
    import safetensors.torch

    (file,) = files_of("trained").weight_files()
    trained = safetensors.torch.load_file(file)
    kept = weights_of("random-keep-embeddings")
    for name in TABLES[:2]:
        assert torch.equal(kept[name], trained[name].float())
    assert torch.equal(kept["lm_head.weight"], kept["transformer.wte.weight"]), "it is tied"
    for name in drawn.keys() - set(TABLES):
        assert torch.equal(kept[name], drawn[name]), "all else is as in the other control"


def test_each_has_a_name_and_a_digest_of_its_own() -> None:
    trained = files_of("trained")
    assert trained.label == "builtin:pystd-6l"
    assert trained.weights_sha256()[:16] == SHIPPED
    assert {w: files_of(w).weights_sha256()[:16] for w in CONTROLS} == DRAWN
    others = [files_of("random"), files_of("random", 1), files_of("random-keep-embeddings"), trained]
    assert len({files.weights_sha256() for files in others}) == len(others)
    assert [files.label for files in others[:2]] == [
        "builtin:pystd-6l (random, seed 0)",
        "builtin:pystd-6l (random, seed 1)",
    ]


def test_it_runs_as_the_trained_one_does() -> None:
    settings = ModelSettings(weights="random")
    model = LanguageModel(find_model(settings), settings)
    tokens = torch.arange(64)[None]
    assert model.way([RESID_3]) == "modules", "the bridge computes what the modules do"
    logits = model.logits(tokens)[0, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
    assert float(loss) == pytest.approx(math.log(4096), abs=0.3), "it knows nothing"


def test_other_weights_are_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"c.yaml: weights: no weights 'randon'\. Did you mean random"):
        parse(ModelSettings, {"weights": "randon"}, "c.yaml")
    with pytest.raises(ConfigError, match=r"weights_seed: .* greater than or equal to 0"):
        parse(ModelSettings, {"weights_seed": -1}, "c.yaml")


def test_a_model_of_unknown_code_is_refused(tmp_path: Any) -> None:
    shipped = files_of("random")
    config = (shipped.directory / "config.json").read_text().replace("GPT2LMHeadModel", "Unheard")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"model\.weights: .* names no architecture"):
        random_model(replace(shipped, directory=tmp_path))


def test_draws_that_cannot_be_repeated_are_refused() -> None:
    with pytest.raises(ModelError, match="begins with draws of"), _Draws(0):
        torch.empty(3).exponential_()
