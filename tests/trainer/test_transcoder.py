"""Transcoders: two hook points, two scales, evaluation at the output, and other libraries' files."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from penstock.common.errors import ConfigError, UserError
from penstock.store.dataset import Dataset
from penstock.store.joined import JoinedDataset
from penstock.trainer.config import resolve_run
from penstock.trainer.exchange.write import export_run, export_sae
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.load import load_sae, load_saelens
from penstock.trainer.sae import SAE, build
from penstock.trainer.step import SAETraining
from services.dictionaries import settings_of
from services.runs import Bench, run_settings
from services.synthetic import MLP, RESID

D, D_OUT, S, B = 8, 5, 30, 60
START = Schedule(0, 100)
TOPK: dict[str, Any] = {"k": 3, "l1_coefficient": None}


def transcoder(d_out: int = D_OUT, **changes: Any) -> SAE:
    """Takes raw rows, every parameter away from its start."""
    sae = build(D, settings_of("transcoder", **({"d_sae": S} | changes)), d_out)
    sae.initialise(0, torch.linspace(-1, 2, d_out))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    sae.fold_scale(0.4, 2.5)
    return sae.eval().requires_grad_(False)


def rows(width: int = D, seed: int = 2, n: int = B) -> Tensor:
    return 2 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", [{}, TOPK], ids=["relu", "topk"])
def test_it_computes_the_formula(kind: dict[str, Any], skip: bool) -> None:
    sae, x = transcoder(skip=skip, **kind), rows()
    pre = x @ sae.W_enc + sae.b_enc
    kept = pre.topk(3, dim=1)
    topk = torch.zeros_like(pre).scatter(1, kept.indices, kept.values)
    acts = (topk if kind else pre).clamp(min=0)
    torch.testing.assert_close(sae.encode(x), acts)
    expected = acts @ sae.W_dec + sae.b_dec
    if skip:
        expected = expected + x @ sae.get_parameter("W_skip")
    torch.testing.assert_close(sae(x), expected)
    assert sae(x).shape == (B, D_OUT)


def test_the_penalty_and_the_auxiliary_loss() -> None:
    x, y = rows(), rows(D_OUT)
    relu = build(D, settings_of("transcoder", d_sae=S, l1_coefficient=0.5, l1_warmup_steps=10), D_OUT)
    relu.initialise(0, None)
    result = relu.training_pass(x, y, Schedule(4, 100), torch.ones(S, dtype=torch.bool))
    l1 = relu.encode(x).sum(dim=1).mean()
    torch.testing.assert_close(result.loss, (y - relu(x)).square().sum(dim=1).mean() + 0.25 * l1)
    topk = build(D, settings_of("transcoder", d_sae=S, aux_k=4, **TOPK), D_OUT)
    topk.initialise(0, None)
    dead = torch.arange(S) < 10
    result = topk.training_pass(x, y, START, dead)
    pre = (x @ topk.W_enc + topk.b_enc)[:, :10]
    strongest = pre.topk(4, dim=1)
    acts = torch.zeros_like(pre).scatter(1, strongest.indices, strongest.values.clamp(min=0))
    error = y - topk(x) - acts @ topk.directions()[:10]
    torch.testing.assert_close(result.components["aux"], error.square().sum(dim=1).mean())


def test_both_hook_points_have_their_own_scale_and_the_bias_is_the_outputs() -> None:
    training = SAETraining(D, settings_of("transcoder", d_sae=S), torch.device("cpu"), D_OUT)
    x, y = 7 * rows().bfloat16(), 0.1 * rows(D_OUT).bfloat16()
    training.initialise(x, targets=y)
    assert float((x.double() * training.scale).square().sum(dim=1).mean()) == pytest.approx(D)
    assert float((y.double() * training.scale_out).square().sum(dim=1).mean()) == pytest.approx(D_OUT)
    bias = training.sae.b_dec.detach()
    torch.testing.assert_close(bias, (y.double().mean(dim=0) * training.scale_out).float())


def test_data_may_be_where_its_encoder_starts() -> None:
    settings = settings_of("transcoder", d_sae=S, initialisation="data")
    training = SAETraining(D, settings, torch.device("cpu"), D_OUT)
    x = rows().bfloat16()
    training.initialise(x, targets=rows(D_OUT).bfloat16())
    centred = x.float() - x.float().mean(dim=0)
    units = torch.nn.functional.normalize(centred, dim=1)
    encoder = torch.nn.functional.normalize(training.sae.W_enc.detach(), dim=0)
    cosines = encoder.T @ units.T
    assert float(cosines.amax(dim=1).min()) > 0.999


def offset_pairs(n: int) -> tuple[Tensor, Tensor]:
    """Inputs whose mean has most of their squared norm, and something to learn from what differs."""
    x = rows(n=n)
    y = x.relu() @ torch.randn(D, D_OUT, generator=torch.Generator().manual_seed(5))
    return (x + 4).bfloat16(), y.bfloat16()


@pytest.mark.parametrize("skip", [False, True])
def test_what_inputs_have_in_common_does_not_kill_features(skip: bool) -> None:
    settings = settings_of("transcoder", d_sae=S, skip=skip, lr=1e-2, lr_warmup_steps=5, **TOPK)
    training = SAETraining(D, settings, torch.device("cpu"), D_OUT)
    x, y = offset_pairs(50 * B)
    training.initialise(x, targets=y)
    for step in range(50):
        batch = slice(step * B, (step + 1) * B)
        training.step(x[batch], Schedule(step, 50), y[batch])
    scaled = x.float() * training.scale
    expected = training.sae(scaled).detach()
    sae = training.sae
    sae.fold_scale(training.scale, training.scale_out)
    assert not sae.get_buffer("x_mean").any()
    torch.testing.assert_close(sae(x.float()) * training.scale_out, expected, rtol=1e-4, atol=1e-4)
    # as they are, inputs leave 7 of 30 alive
    assert int((sae.encode(x.float()) > 0).any(dim=0).sum()) > S / 2


def test_a_bias_that_does_not_exist_stays_away() -> None:
    settings = settings_of("transcoder", d_sae=S, skip=True, decoder_bias="none", **TOPK)
    training = SAETraining(D, settings, torch.device("cpu"), D_OUT)
    x, y = offset_pairs(B)
    training.initialise(x, targets=y)
    training.step(x, START, y)
    assert training.sae.get_parameter("W_skip").any()
    training.sae.fold_scale(training.scale, training.scale_out)
    assert not training.sae.b_dec.any()


def test_checkpoints_without_a_mean_are_read() -> None:
    sae, x = transcoder(), rows()
    earlier = {name: tensor for name, tensor in sae.state_dict().items() if name != "x_mean"}
    again = build(D, sae.settings, D_OUT)
    again.load_state_dict(earlier)
    again.folded_scale = sae.folded_scale
    assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize(
    "changes", [{}, {"k": 4, "l1_coefficient": 0.1}, {"k": 0}], ids=["neither", "both", "zero"]
)
def test_sparsity_comes_one_way(changes: dict[str, Any]) -> None:
    given = {"l1_coefficient": None} | changes
    with pytest.raises(ValidationError, match=r"either k|greater than or equal to 1"):
        settings_of("transcoder", **given)


def of_run(**changes: Any) -> dict[str, Any]:
    told = settings_of("transcoder", name="tc", hook_name=RESID, hook_out=MLP, d_sae=S, **changes)
    return told.model_dump(mode="json", exclude_unset=True)


def test_a_run_reads_both_hook_points(bench: Bench, dataset: Dataset, tmp_path: Path) -> None:
    config = bench.submit(dataset, saes=[of_run(skip=True)])
    assert config.hooks == [RESID, MLP]
    bench.work()
    url = f"{bench.runs.url}/{config.run_id}"
    assert bench.head(config).status == "done"
    sae = load_sae(url, "tc")
    assert (sae.d_in, sae.d_out) == (8, 16)
    list(export_run(url, "saelens", tmp_path / "out"))
    metadata = json.loads((tmp_path / "out" / "tc" / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["hook_name_out"]) == (RESID, MLP)


def test_a_dataset_without_the_output_is_refused(dataset: Dataset) -> None:
    settings = run_settings(saes=[of_run() | {"hook_out": "blocks.9.hook_out"}])
    with pytest.raises(UserError, match=r"hook 'blocks\.9\.hook_out' is not in this dataset"):
        resolve_run(settings, JoinedDataset([dataset]))


class TestSaelens:
    @pytest.mark.parametrize("skip", [False, True])
    def test_export(self, skip: bool, tmp_path: Path) -> None:
        sae, x = transcoder(skip=skip), rows()
        export_sae(sae, tmp_path / "x", "saelens")
        told = safetensors.torch.load_file(tmp_path / "x" / "sae_weights.safetensors")
        config = json.loads((tmp_path / "x" / "cfg.json").read_text())
        assert config["architecture"] == ("skip_transcoder" if skip else "transcoder")
        assert (config["apply_b_dec_to_input"], config["d_out"]) == (False, D_OUT)
        assert set(told) == {"W_enc", "b_enc", "W_dec", "b_dec"} | ({"W_skip"} if skip else set())
        again = (x @ told["W_enc"] + told["b_enc"]).relu() @ told["W_dec"] + told["b_dec"]
        if skip:
            assert told["W_skip"].shape == (D_OUT, D)
            again = again + x @ told["W_skip"].T
        torch.testing.assert_close(again, sae(x))

    @pytest.mark.parametrize("skip", [False, True])
    def test_import_is_the_way_back(self, skip: bool, tmp_path: Path) -> None:
        sae, x = transcoder(skip=skip), rows()
        export_sae(sae, tmp_path / "x", "saelens")
        again = load_saelens(tmp_path / "x")
        assert again.settings.hooks == sae.settings.hooks
        assert torch.equal(again(x), sae(x))
        export_sae(again, tmp_path / "y", "saelens")
        for name in ("cfg.json", "sae_weights.safetensors"):
            assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()

    @pytest.mark.parametrize("skip", [False, True])
    def test_training_starts_from_exactly_that_function(self, skip: bool, tmp_path: Path) -> None:
        source = transcoder(skip=skip)
        with torch.no_grad():
            source.W_dec.mul_(torch.linspace(0.2, 3, S)[:, None])
        export_sae(source, tmp_path / "x", "saelens")
        x, y = rows().bfloat16(), 9 * rows(D_OUT).bfloat16()
        training = SAETraining(D, settings_of("transcoder", d_sae=S, skip=skip), torch.device("cpu"), D_OUT)
        training.initialise(x, load_saelens(tmp_path / "x").normalise_decoder(), y)
        assert abs(training.scale / training.scale_out - 1) > 0.1
        expected = source(x.float())
        started = training.sae(x.float() * training.scale) / training.scale_out
        assert (started - expected).abs().max() < 1e-5 * expected.abs().max()
        torch.testing.assert_close(training.sae.W_dec.detach().norm(dim=1), torch.ones(S))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"skip": True}, "has skip False, but the SAE True"),
            ({"k": 2, "l1_coefficient": None}, "has k None, but the SAE 2"),
            ({"hook_out": RESID}, "has d_out 16, but the SAE 8"),
        ],
        ids=str,
    )
    def test_one_that_does_not_fit(
        self, changes: dict[str, Any], words: str, dataset: Dataset, tmp_path: Path
    ) -> None:
        export_sae(transcoder(16), tmp_path / "x", "saelens")
        resolve_run(run_settings(saes=[of_run(init_from=str(tmp_path / "x"))]), JoinedDataset([dataset]))
        sae = of_run(init_from=str(tmp_path / "x")) | changes
        with pytest.raises(ConfigError, match=words):
            resolve_run(run_settings(saes=[sae]), JoinedDataset([dataset]))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input: true does not go with transcoder"),
            ({"d_out": 4}, r"W_dec has shape \[30, 5\], but its cfg.json says \[30, 4\]|b_dec has shape"),
            ({"d_out": None}, "d_out is missing"),
        ],
        ids=str,
    )
    def test_what_cannot_be_imported(self, change: dict[str, Any], words: str, tmp_path: Path) -> None:
        export_sae(transcoder(), tmp_path / "x", "saelens")
        config = json.loads((tmp_path / "x" / "cfg.json").read_text()) | change
        (tmp_path / "x" / "cfg.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=words):
            load_saelens(tmp_path / "x")

    def test_topk_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="SAELens has no dictionary that computes what a TopK transcoder"):
            export_sae(transcoder(**TOPK), tmp_path / "x", "saelens")


class TestSparsify:
    @pytest.mark.parametrize("skip", [False, True])
    @pytest.mark.parametrize(("kind", "k"), [({}, S), (TOPK, 3)], ids=["relu", "topk"])
    def test_export(self, kind: dict[str, Any], k: int, skip: bool, tmp_path: Path) -> None:
        sae, x = transcoder(D, skip=skip, **kind), rows()
        export_sae(sae, tmp_path / "x", "sparsify")
        told = safetensors.torch.load_file(tmp_path / "x" / "sae.safetensors")
        config = json.loads((tmp_path / "x" / "cfg.json").read_text())
        assert (config["transcode"], config["skip_connection"], config["k"]) == (True, skip, k)
        pre = torch.nn.functional.linear(x, told["encoder.weight"], told["encoder.bias"]).relu()
        kept = pre.topk(k, dim=1)
        again = torch.zeros_like(pre).scatter(1, kept.indices, kept.values) @ told["W_dec"] + told["b_dec"]
        if skip:
            again = again + x @ told["W_skip"].T
        torch.testing.assert_close(again, sae(x), rtol=1e-5, atol=1e-4)

    def test_other_widths_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"sparsify has no .* a transcoder between hook points of differ"):
            export_sae(transcoder(**TOPK), tmp_path / "x", "sparsify")


def test_dictionary_learning_has_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dictionary_learning has no dictionary"):
        export_sae(transcoder(), tmp_path / "x", "dictionary-learning")
