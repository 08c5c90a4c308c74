"""Exports: the files that each library wants, and that they compute what we compute."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from interop.__main__ import CANNOT
from penstock.common.errors import UserError
from penstock.store.dataset import Dataset
from penstock.trainer.exchange import origin, write
from penstock.trainer.exchange.write import FORMATS, export_run, export_sae
from penstock.trainer.kinds.foreign import Foreign
from penstock.trainer.load import load_sae, load_saelens
from penstock.trainer.sae import SAE, build
from services.dictionaries import KINDS, SCALE, B, D, K, S, rows, settings_of, trained
from services.runs import Bench, topk
from services.trees import tree_digests

ORIGIN = origin.Origin(
    "a", "blocks.1.hook_out", "run-1", "model", context=128, bos=True, drop_special=True, corpus="text"
)

AS_SAELENS = {kind: kind for kind in KINDS if (kind, "saelens") not in CANNOT and kind != "transcoder"} | {
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
}
"""Kind -> what SAELens calls it. Transcoders have tests of their own."""

Shapes = dict[str, tuple[torch.dtype, list[int]]]
F32 = torch.float32


def shapes(tensors: dict[str, Tensor]) -> Shapes:
    return {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}


def export(sae: SAE, directory: Path, format: str) -> dict[str, Tensor]:
    """The tensors of an export."""
    export_sae(sae, directory, format, ORIGIN)
    if format == "dictionary-learning":
        loaded: dict[str, Tensor] = torch.load(directory / "ae.pt", weights_only=True)
        return loaded
    (file,) = directory.glob("*.safetensors")
    tensors: dict[str, Tensor] = safetensors.torch.load_file(file)
    return tensors


@pytest.mark.parametrize("kind", sorted(AS_SAELENS))
class TestSaelens:
    def test_tensors_are_those_that_its_strict_loading_wants(self, kind: str, tmp_path: Path) -> None:
        vectors = {"gated": ["b_gate", "b_mag", "r_mag"]}.get(kind, ["b_enc"])
        vectors += ["threshold"] if AS_SAELENS[kind] == "jumprelu" else []
        assert shapes(export(trained(kind), tmp_path / "x", "saelens")) == {
            "W_enc": (F32, [D, S]),
            "W_dec": (F32, [S, D]),
            "b_dec": (F32, [D]),
        } | {name: (F32, [S]) for name in vectors}

    def test_the_config_says_that_rows_are_taken_as_they_are(self, kind: str, tmp_path: Path) -> None:
        export(trained(kind), tmp_path / "x", "saelens")
        config = json.loads((tmp_path / "x" / "cfg.json").read_text())
        metadata = config.pop("metadata")
        assert config == {
            "architecture": AS_SAELENS[kind],
            "d_in": D,
            "d_sae": S,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
        } | ({"k": K, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {})
        assert metadata["sae_lens_version"].startswith("6.")
        assert (metadata["model_name"], metadata["hook_name"]) == ("model", "blocks.1.hook_out")
        assert (metadata["context_size"], metadata["prepend_bos"]) == (128, True)
        assert metadata["dataset_path"] == "text"
        assert metadata["penstock"]["run_id"] == "run-1"

    def test_read_back_it_computes_the_same_bits(self, kind: str, tmp_path: Path) -> None:
        sae, x = trained(kind), rows()
        export(sae, tmp_path / "x", "saelens")
        again = load_saelens(tmp_path / "x")
        acts = sae.encode(x)
        assert (acts > 0).any()
        assert torch.equal(again.encode(x), acts)
        assert torch.equal(again.decode(acts), sae.decode(acts))
        assert again.settings.name == "a"
        assert again.settings.hook_name == "blocks.1.hook_out"

    def test_the_scale_is_folded(self, kind: str, tmp_path: Path) -> None:
        """Against the module on scaled rows, where nothing is folded."""
        sae = trained(kind)
        told = export(sae, tmp_path / "x", "saelens")
        norms = told["W_dec"].norm(dim=1)
        torch.testing.assert_close(norms, torch.full([S], 1 / SCALE))
        unfolded = build(D, settings_of(AS_SAELENS[kind]))
        scaled = {
            "W_enc": told["W_enc"] / SCALE,
            "W_dec": 7 * told["W_dec"],
            "b_dec": told["b_dec"] * SCALE,
        }
        unfolded.load_state_dict(told | scaled)
        torch.testing.assert_close(unfolded(rows() * SCALE) / SCALE, sae(rows()), rtol=1e-5, atol=1e-5)

    def test_attention_heads_are_said_to_be_side_by_side(self, kind: str, tmp_path: Path) -> None:
        heads = origin.Origin("a", "blocks.0.attn.hook_z")
        export_sae(trained(kind), tmp_path / "x", "saelens", heads)
        assert '"reshape_activations": "hook_z"' in (tmp_path / "x" / "cfg.json").read_text()


class TestDictionaryLearning:
    def test_topk(self, tmp_path: Path) -> None:
        sae, x = trained("topk"), rows()
        told = export(sae, tmp_path / "x", "dictionary-learning")
        assert shapes(told) == {
            "encoder.weight": (F32, [S, D]),
            "encoder.bias": (F32, [S]),
            "decoder.weight": (F32, [D, S]),
            "b_dec": (F32, [D]),
            "k": (torch.int32, []),
            "threshold": (F32, []),
        }
        acts = torch.nn.functional.linear(
            x - told["b_dec"], told["encoder.weight"], told["encoder.bias"]
        ).relu()
        kept = acts.topk(int(told["k"]), dim=1)
        acts = torch.zeros_like(acts).scatter(1, kept.indices, kept.values)
        torch.testing.assert_close(acts, sae.encode(x), rtol=1e-5, atol=1e-5)
        again = acts @ told["decoder.weight"].T + told["b_dec"]
        torch.testing.assert_close(again, sae(x), rtol=1e-5, atol=1e-5)
        trainer = json.loads((tmp_path / "x" / "config.json").read_text())["trainer"]
        assert (trainer["dict_class"], trainer["k"], trainer["layer"]) == ("AutoEncoderTopK", K, 1)

    def test_standard(self, tmp_path: Path) -> None:
        sae, x = trained("standard"), rows()
        told = export(sae, tmp_path / "x", "dictionary-learning")
        assert shapes(told) == {
            "encoder.weight": (F32, [S, D]),
            "encoder.bias": (F32, [S]),
            "decoder.weight": (F32, [D, S]),
            "decoder.bias": (F32, [D]),
        }
        acts = torch.nn.functional.linear(x, told["encoder.weight"], told["encoder.bias"]).relu()
        torch.testing.assert_close(acts, sae.encode(x), rtol=1e-5, atol=1e-5)
        again = torch.nn.functional.linear(acts, told["decoder.weight"], told["decoder.bias"])
        torch.testing.assert_close(again, sae(x), rtol=1e-5, atol=1e-5)
        trainer = json.loads((tmp_path / "x" / "config.json").read_text())["trainer"]
        assert trainer["dict_class"] == "AutoEncoderNew"

    def test_gated(self, tmp_path: Path) -> None:
        sae, x = trained("gated"), rows()
        told = export(sae, tmp_path / "x", "dictionary-learning")
        assert shapes(told) == {
            "encoder.weight": (F32, [S, D]),
            "gate_bias": (F32, [S]),
            "mag_bias": (F32, [S]),
            "r_mag": (F32, [S]),
            "decoder.weight": (F32, [D, S]),
            "decoder_bias": (F32, [D]),
        }
        product = (x - told["decoder_bias"]) @ told["encoder.weight"].T
        acts = (told["r_mag"].exp() * product + told["mag_bias"]).relu()
        acts = acts * (product + told["gate_bias"] > 0)
        assert 0 < (acts > 0).sum() < acts.numel()
        torch.testing.assert_close(acts, sae.encode(x), rtol=1e-5, atol=1e-5)
        again = acts @ told["decoder.weight"].T + told["decoder_bias"]
        torch.testing.assert_close(again, sae(x), rtol=1e-5, atol=1e-5)
        trainer = json.loads((tmp_path / "x" / "config.json").read_text())["trainer"]
        assert trainer["dict_class"] == "GatedAutoEncoder"

    def test_jumprelu(self, tmp_path: Path) -> None:
        sae, x = trained("jumprelu"), rows()
        told = export(sae, tmp_path / "x", "dictionary-learning")
        assert shapes(told) == {
            "W_enc": (F32, [D, S]),
            "b_enc": (F32, [S]),
            "W_dec": (F32, [S, D]),
            "b_dec": (F32, [D]),
            "threshold": (F32, [S]),
        }
        pre = x @ told["W_enc"] + told["b_enc"]
        acts = (pre * (pre > told["threshold"])).relu()
        assert ((pre > 0) & (acts == 0)).any()
        torch.testing.assert_close(acts, sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(acts @ told["W_dec"] + told["b_dec"], sae(x), rtol=1e-5, atol=1e-5)
        trainer = json.loads((tmp_path / "x" / "config.json").read_text())["trainer"]
        assert trainer["dict_class"] == "JumpReluAutoEncoder"

    def test_matryoshka(self, tmp_path: Path) -> None:
        sae, x = trained("matryoshka"), rows()
        told = export(sae, tmp_path / "x", "dictionary-learning")
        groups = told.pop("group_sizes")
        assert groups.tolist() == [1, 3, 5, 10, 21]
        assert shapes(told) == {
            "W_enc": (F32, [D, S]),
            "b_enc": (F32, [S]),
            "W_dec": (F32, [S, D]),
            "b_dec": (F32, [D]),
            "k": (torch.int32, []),
            "threshold": (F32, []),
        }
        acts = ((x - told["b_dec"]) @ told["W_enc"] + told["b_enc"]).relu()
        acts = acts * (acts > told["threshold"])
        torch.testing.assert_close(acts, sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(acts @ told["W_dec"] + told["b_dec"], sae(x), rtol=1e-5, atol=1e-5)
        trainer = json.loads((tmp_path / "x" / "config.json").read_text())["trainer"]
        assert (trainer["dict_class"], trainer["k"]) == ("MatryoshkaBatchTopKSAE", K)

    def test_batchtopk(self, tmp_path: Path) -> None:
        sae, x = trained("batchtopk"), rows()
        told = export(sae, tmp_path / "x", "dictionary-learning")
        assert shapes(told) == {
            "encoder.weight": (F32, [S, D]),
            "encoder.bias": (F32, [S]),
            "decoder.weight": (F32, [D, S]),
            "b_dec": (F32, [D]),
            "k": (torch.int32, []),
            "threshold": (F32, []),
        }
        acts = torch.nn.functional.linear(
            x - told["b_dec"], told["encoder.weight"], told["encoder.bias"]
        ).relu()
        acts = acts * (acts > told["threshold"])
        torch.testing.assert_close(acts, sae.encode(x), rtol=1e-5, atol=1e-5)
        trainer = json.loads((tmp_path / "x" / "config.json").read_text())["trainer"]
        assert (trainer["dict_class"], trainer["k"]) == ("BatchTopKSAE", K)


@pytest.mark.parametrize(("kind", "k"), [("topk", K), ("standard", S)])
def test_sparsify(kind: str, k: int, tmp_path: Path) -> None:
    sae, x = trained(kind), rows()
    told = export(sae, tmp_path / "x", "sparsify")
    assert shapes(told) == {
        "encoder.weight": (F32, [S, D]),
        "encoder.bias": (F32, [S]),
        "W_dec": (F32, [S, D]),
        "b_dec": (F32, [D]),
    }
    config = json.loads((tmp_path / "x" / "cfg.json").read_text())
    assert config == {
        "activation": "topk",
        "d_in": D,
        "num_latents": S,
        "k": k,
        "normalize_decoder": False,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
    }
    pre = torch.nn.functional.linear(x - told["b_dec"], told["encoder.weight"], told["encoder.bias"]).relu()
    kept = pre.topk(config["k"], dim=1)
    acts = torch.zeros_like(pre).scatter(1, kept.indices, kept.values)
    torch.testing.assert_close(acts, sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(acts @ told["W_dec"] + told["b_dec"], sae(x), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "x" / "origin.json").read_text())["run_id"] == "run-1"


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_dictionary_gives_the_same_bytes(kind: str, format: str, tmp_path: Path) -> None:
    if (kind, format) in CANNOT:
        with pytest.raises(UserError, match=f"has no dictionary that computes what a {kind} one does"):
            export(trained(kind), tmp_path / "one", format)
        return
    for name in ("one", "two"):
        export(trained(kind), tmp_path / name, format)
    assert tree_digests(tmp_path / "one") == tree_digests(tmp_path / "two")


class TestRefusals:
    @pytest.mark.parametrize("format", sorted(FORMATS))
    def test_what_is_there_stays(self, format: str, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        with pytest.raises(UserError, match="x is there already"):
            export_sae(trained("topk"), tmp_path / "x", format)
        assert list((tmp_path / "x").iterdir()) == []

    def test_a_module_that_takes_scaled_rows(self, tmp_path: Path) -> None:
        sae = build(D, settings_of("topk"))
        sae.initialise(0, None)
        with pytest.raises(UserError, match="a-topk: takes scaled rows"):
            export_sae(sae, tmp_path / "x", "saelens")
        assert list(tmp_path.iterdir()) == []

    def test_an_unknown_format_names_those_there_are(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="'onnx'; there are saelens, dictionary-learning, sparsify"):
            export_sae(trained("topk"), tmp_path / "x", "onnx")

    def test_a_kind_that_a_format_does_not_have(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sae = trained("standard")
        for format, method in zip(
            FORMATS, ("to_saelens", "to_dictionary_learning", "to_sparsify"), strict=True
        ):
            monkeypatch.setattr(type(sae), method, getattr(SAE, method))
            with pytest.raises(UserError, match=r"SAE a: .* has no dictionary .* a standard one"):
                export_sae(sae, tmp_path / "x", format, ORIGIN)
        assert list(tmp_path.iterdir()) == []

    def test_a_directory_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot be written"):
            export_sae(trained("topk"), tmp_path / "file" / "x", "saelens")

    def test_an_export_that_breaks_off_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(path: Path, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="x cannot be written: No space left"):
            export_sae(trained("topk"), tmp_path / "x", "saelens")
        assert list(tmp_path.iterdir()) == []


class TestARun:
    @pytest.fixture
    def run_url(self, bench: Bench, dataset: Dataset) -> str:
        config = bench.submit(dataset)
        bench.work()
        return f"{bench.runs.url}/{config.run_id}"

    @pytest.mark.parametrize("format", sorted(FORMATS))
    def test_every_sae_gets_a_directory(self, run_url: str, format: str, tmp_path: Path) -> None:
        written = list(export_run(run_url, format, tmp_path / "deep" / "out"))
        assert written == [tmp_path / "deep" / "out" / name for name in ("topk", "l1")]
        assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == ["l1", "topk"]

    def test_it_is_what_load_sae_gives(self, run_url: str, dataset: Dataset, tmp_path: Path) -> None:
        list(export_run(run_url, "saelens", tmp_path / "out"))
        for name in ("topk", "l1"):
            sae, again = load_sae(run_url, name), load_saelens(tmp_path / "out" / name)
            chunk = dataset.read_chunk(0, [sae.settings.hook_name]).acts[sae.settings.hook_name]
            x = torch.from_numpy(chunk.astype("float32"))
            assert (sae.encode(x) > 0).any()
            assert torch.equal(again.encode(x), sae.encode(x))
            assert torch.equal(again(x), sae(x))
            assert (again.settings.name, again.settings.hook_name) == (name, sae.settings.hook_name)

    def test_the_metadata_comes_from_the_dataset(self, run_url: str, tmp_path: Path) -> None:
        list(export_run(run_url, "saelens", tmp_path / "out", ["topk"]))
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["topk"]
        metadata = json.loads((tmp_path / "out" / "topk" / "cfg.json").read_text())["metadata"]
        assert (metadata["model_name"], metadata["dataset_path"]) == ("synthetic", "synthetic")
        assert (metadata["context_size"], metadata["prepend_bos"]) == (21, False)
        assert metadata["exclude_special_tokens"] is True
        assert metadata["penstock"]["model_weights_sha256"] == "w" * 64

    def test_without_its_dataset_a_run_can_still_be_exported(
        self, run_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def gone(config: object) -> None:
            raise UserError("gone")

        monkeypatch.setattr(write, "open_pinned", gone)
        list(export_run(run_url, "saelens", tmp_path / "out", ["topk"]))
        metadata = json.loads((tmp_path / "out" / "topk" / "cfg.json").read_text())["metadata"]
        assert (metadata["model_name"], metadata["context_size"]) == ("synthetic", None)

    def test_one_directory_in_the_way_and_nothing_is_written(self, run_url: str, tmp_path: Path) -> None:
        (tmp_path / "l1").mkdir()
        with pytest.raises(UserError, match="l1 is there already"):
            list(export_run(run_url, "saelens", tmp_path))
        assert [p.name for p in tmp_path.iterdir() if p.name != "runs"] == ["l1"]

    def test_an_sae_that_the_run_does_not_have(self, run_url: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no SAE 'topq'\. Did you mean topk"):
            list(export_run(run_url, "saelens", tmp_path, ["topq"]))

    def test_a_run_without_a_checkpoint(self, bench: Bench, dataset: Dataset, tmp_path: Path) -> None:
        config = bench.submit(dataset, saes=[topk(seed=9)])
        with pytest.raises(UserError, match="no checkpoint yet"):
            list(export_run(f"{bench.runs.url}/{config.run_id}", "saelens", tmp_path))


def test_what_is_exported_shares_no_memory_with_the_module() -> None:
    sae = trained("standard")
    told: Foreign = sae.to_saelens()
    told.tensors["W_enc"].zero_()
    assert sae.W_enc.any()
    assert sae.encode(rows()).shape == (B, S)
