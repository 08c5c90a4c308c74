"""Importing SAELens dictionaries: for evaluation, and as what a run starts from."""

import hashlib
import json
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from penstock.common.errors import ConfigError, DamagedObject, UserError
from penstock.deploy.heal import faults
from penstock.store.dataset import Dataset
from penstock.store.joined import JoinedDataset
from penstock.store.objects import open_store
from penstock.trainer.config import resolve_run, submit_run
from penstock.trainer.exchange.write import export_sae
from penstock.trainer.initial import starting_points
from penstock.trainer.load import load_sae, load_saelens
from penstock.trainer.sae import SAE
from penstock.trainer.step import SAETraining
from penstock.trainer.verify import remake_checkpoint
from services.dictionaries import IMPORTED, D, K, S, rows, settings_of, write_saelens
from services.runs import Bench, digests, run_settings, standard, topk
from services.synthetic import MLP, RESID
from services.training import Killed, interrupted


def encoded(fields: dict[str, Any], tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Feature activations as SAELens computes them."""
    x = x - tensors["b_dec"] if fields.get("apply_b_dec_to_input", True) else x
    if fields["architecture"] == "gated":
        gate = x @ tensors["W_enc"] + tensors["b_gate"]
        return (gate > 0) * (x @ (tensors["W_enc"] * tensors["r_mag"].exp()) + tensors["b_mag"]).relu()
    pre = x @ tensors["W_enc"] + tensors["b_enc"]
    if fields["architecture"] == "jumprelu":
        return pre.relu() * (pre > tensors["threshold"])
    if fields["architecture"] != "topk":
        return pre.relu()
    if fields.get("rescale_acts_by_decoder_norm"):
        pre = pre * tensors["W_dec"].norm(dim=1)
    kept = pre.topk(K, dim=1)
    return torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())


def decoded(fields: dict[str, Any], tensors: dict[str, Tensor], acts: Tensor) -> Tensor:
    if fields.get("rescale_acts_by_decoder_norm"):
        acts = acts / tensors["W_dec"].norm(dim=1)
    return acts @ tensors["W_dec"] + tensors["b_dec"]


class TestLoading:
    @pytest.mark.parametrize(
        "fields",
        [
            {"architecture": "standard"},
            {"architecture": "topk"},
            {"architecture": "topk", "rescale_acts_by_decoder_norm": True},
            {"architecture": "standard", "apply_b_dec_to_input": False},
            {"architecture": "topk", "apply_b_dec_to_input": False},
            {"architecture": "gated"},
            {"architecture": "gated", "apply_b_dec_to_input": False},
            {"architecture": "jumprelu"},
            {"architecture": "jumprelu", "apply_b_dec_to_input": False},
        ],
        ids=str,
    )
    def test_it_computes_what_saelens_computes(self, fields: dict[str, Any], tmp_path: Path) -> None:
        tensors = write_saelens(tmp_path / "x", fields["architecture"], fields)
        sae, x = load_saelens(tmp_path / "x"), rows()
        acts = encoded(fields, tensors, x)
        assert 0 < (acts > 0).sum() < acts.numel()
        torch.testing.assert_close(sae.encode(x), acts, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(x), decoded(fields, tensors, acts), rtol=1e-5, atol=1e-4)
        assert not any(parameter.requires_grad for parameter in sae.parameters())

    @pytest.mark.parametrize("kind", IMPORTED)
    def test_plain_files_keep_their_bits(self, kind: str, tmp_path: Path) -> None:
        tensors = write_saelens(tmp_path / "x", kind)
        state = load_saelens(tmp_path / "x").state_dict()
        # what transcoders subtract from rows in training only
        assert not state.pop("x_mean", torch.zeros(1)).any()
        assert state.keys() == tensors.keys()
        assert all(torch.equal(state[name], tensors[name]) for name in tensors)

    @pytest.mark.parametrize("fields", [{}, {"apply_b_dec_to_input": False}], ids=str)
    @pytest.mark.parametrize("rescale", [False, True])
    @pytest.mark.parametrize("kind", IMPORTED)
    def test_import_export_import_is_the_identity(
        self, kind: str, rescale: bool, fields: dict[str, Any], tmp_path: Path
    ) -> None:
        told = fields | ({"rescale_acts_by_decoder_norm": rescale} if kind == "topk" else {})
        write_saelens(tmp_path / "theirs", kind, told)
        once = load_saelens(tmp_path / "theirs")
        export_sae(once, tmp_path / "ours", "saelens")
        twice = load_saelens(tmp_path / "ours")
        assert_same_bits(once, twice)
        export_sae(twice, tmp_path / "again", "saelens")
        for name in ("cfg.json", "sae_weights.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()

    def test_half_precision_is_read_exactly(self, tmp_path: Path) -> None:
        half = {name: tensor.bfloat16() for name, tensor in write_saelens(tmp_path / "x", "topk").items()}
        write_saelens(tmp_path / "x", "topk", {"dtype": "bfloat16"}, half)
        state = load_saelens(tmp_path / "x").state_dict()
        assert all(torch.equal(state[name], half[name].float()) for name in half)

    def test_it_is_named_after_its_directory(self, tmp_path: Path) -> None:
        write_saelens(tmp_path / "layer 7/…", "topk")
        shutil.copytree(tmp_path / "layer 7/…", tmp_path / "layer 8")
        assert load_saelens(tmp_path / "layer 7/…").settings.name == "imported"
        assert load_saelens(tmp_path / "layer 8").settings.name == "layer-8"


def assert_same_bits(one: SAE, other: SAE) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(one(rows()), other(rows()))


def plant(directory: Path, fault: str) -> None:
    """Something wrong with a dictionary."""
    weights = directory / "sae_weights.safetensors"
    config = json.loads((directory / "cfg.json").read_text())
    tensors = safetensors.torch.load(weights.read_bytes())
    changed: dict[str, Callable[[], object]] = {
        "wrong shape": lambda: tensors.update(b_enc=torch.zeros(S + 1)),
        "transposed": lambda: tensors.update(W_enc=tensors["W_enc"].T.contiguous()),
        "extra tensor": lambda: tensors.update(log_sparsity=torch.zeros(S)),
        "missing tensor": lambda: tensors.pop("b_dec"),
        "float64": lambda: tensors.update(b_dec=tensors["b_dec"].double()),
        "not finite": lambda: tensors["W_enc"][2, 3].fill_(float("nan")),
        "unknown architecture": lambda: config.update(architecture="toppk"),
        "not folded": lambda: config.update(normalize_activations="expected_average_only_in"),
        "reshaped": lambda: config.update(reshape_activations="folded"),
        "double": lambda: config.update(dtype="float64"),
        "no k": lambda: config.pop("k"),
        "k of text": lambda: config.update(k="five"),
        "k too large": lambda: config.update(k=S + 1),
        "d_in of nothing": lambda: config.update(d_in=0),
        "old": lambda: config["metadata"].update(sae_lens_version="5.10.2"),
        "no metadata": lambda: config.pop("metadata"),
        "zero row": lambda: (
            config.update(rescale_acts_by_decoder_norm=True),
            tensors["W_dec"][7].zero_(),
        ),
    }
    if fault in changed:
        changed[fault]()
        safetensors.torch.save_file(tensors, weights)
        (directory / "cfg.json").write_text(json.dumps(config))
    elif fault == "not JSON":
        (directory / "cfg.json").write_text("{")
    elif fault == "pickle":
        torch.save(tensors, weights)
    elif fault == "old pickle":
        weights.write_bytes(pickle.dumps({"W_enc": [1.0]}))
    elif fault == "pickle beside":
        weights.rename(directory / "sae.pt")
    elif fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "no config":
        (directory / "cfg.json").unlink()
    else:
        shutil.rmtree(directory)


FAULTS = {
    "wrong shape": ("sae_weights.safetensors: b_enc has shape [41], but its cfg.json says [40]",),
    "transposed": ("W_enc has shape [40, 12]", "says [12, 40]"),
    "extra tensor": ("holds log_sparsity", "does not have"),
    "missing tensor": ("b_dec is missing",),
    "float64": ("b_dec is torch.float64",),
    "not finite": ("W_enc", "not finite"),
    "unknown architecture": ("'toppk' cannot be imported", "Did you mean topk?"),
    "not folded": ("normalize_activations is expected_average_only_in", "fold"),
    "reshaped": ("reshape_activations folded",),
    "double": ("dtype float64",),
    "no k": ("cfg.json", "k: input should be a valid integer, not None"),
    "k of text": ("k: input should be a valid integer, not 'five'",),
    "k too large": ("k is 41, more than its d_sae of 40",),
    "d_in of nothing": ("d_in: input should be greater than 0",),
    "old": ("not of SAELens 6", "5.10.2"),
    "no metadata": ("not of SAELens 6",),
    "zero row": ("feature 7 has a decoder row of norm 0",),
    "not JSON": ("cfg.json", "not valid"),
    "pickle": ("is a pickle, which is never read",),
    "old pickle": ("is a pickle, which is never read",),
    "pickle beside": ("no sae_weights.safetensors; sae.pt is a pickle",),
    "cut": ("is not a safetensors file",),
    "no config": ("no cfg.json",),
    "no directory": ("no such directory",),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_imported_gives_one_line(fault: str, tmp_path: Path) -> None:
    directory = tmp_path / "x"
    write_saelens(directory, "topk")
    plant(directory, fault)
    with pytest.raises(UserError) as caught:
        load_saelens(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(directory))
    for words in FAULTS[fault]:
        assert words in message


class TestStartingFrom:
    """One SAE in training that starts from an imported dictionary."""

    def start(self, directory: Path, x: Tensor, kind: str, **changes: Any) -> SAETraining:
        """Just before its first step."""
        settings = settings_of(kind, init_from=str(directory), **changes)
        training = SAETraining(D, settings, torch.device("cpu"))
        loaded = load_saelens(directory).normalise_decoder()
        training.initialise(x.bfloat16(), loaded)
        return training

    @pytest.mark.parametrize(
        ("kind", "fields"),
        [("standard", {}), ("topk", {"rescale_acts_by_decoder_norm": True}), ("gated", {}), ("jumprelu", {})],
        ids=["standard", "topk", "gated", "jumprelu"],
    )
    def test_the_first_step_starts_from_exactly_that_function(
        self, kind: str, fields: dict[str, Any], tmp_path: Path
    ) -> None:
        """Whatever the norms of its decoder rows are."""
        write_saelens(tmp_path / "x", kind, fields)
        x = rows()
        training = self.start(tmp_path / "x", x, kind)
        assert abs(training.scale - 1) > 0.1
        expected = load_saelens(tmp_path / "x")(x)
        started = training.sae(x * training.scale) / training.scale
        assert (started - expected).abs().max() < 1e-6 * expected.abs().max()
        torch.testing.assert_close(training.sae.W_dec.norm(dim=1), torch.ones(S))

    @pytest.mark.parametrize("kind", IMPORTED)
    def test_ours_comes_back_as_it_was(self, kind: str, tmp_path: Path) -> None:
        """An export taken up again on the same rows has the weights it had."""
        x = rows()
        training = SAETraining(D, settings_of(kind), torch.device("cpu"))
        training.initialise(x.bfloat16())
        with torch.no_grad():
            training.sae.W_enc.add_(0.1)
            for name in training.sae.encoder_vectors:
                training.sae.get_parameter(name).sub_(0.2)
        before = {name: p.detach().clone() for name, p in training.sae.named_parameters()}
        training.sae.fold_scale(training.scale)
        export_sae(training.sae, tmp_path / "x", "saelens")
        again = self.start(tmp_path / "x", x, kind).sae
        for name, parameter in again.named_parameters():
            torch.testing.assert_close(parameter, before[name], rtol=1e-6, atol=1e-6)

    def test_a_topk_dictionary_with_rows_of_many_lengths_cannot_be_trained_on(self, tmp_path: Path) -> None:
        write_saelens(tmp_path / "x", "topk")
        with pytest.raises(ValueError, match=r"norms of 0\.\d+ to .*rescale_acts_by_decoder_norm is false"):
            load_saelens(tmp_path / "x").normalise_decoder()


def exported(directory: Path, hook_name: str = RESID, seed: int = 0, **changes: Any) -> str:
    """A dictionary that `services.runs.topk` can start from; returns its directory."""
    write_saelens(
        directory,
        "topk",
        {"k": 2, "rescale_acts_by_decoder_norm": True} | changes,
        {"b_enc": torch.randn(64, generator=torch.Generator().manual_seed(seed))},
        d_in=8,
        d_sae=64,
    )
    return str(directory)


class TestRunIdentity:
    def test_it_does_not_depend_on_where_the_weights_lie(self, dataset: Dataset, tmp_path: Path) -> None:
        here, there = exported(tmp_path / "here"), exported(tmp_path / "there")
        assert resolve_run(run_settings(saes=[topk(init_from=here)]), JoinedDataset([dataset])).run_id == (
            resolve_run(run_settings(saes=[topk(init_from=there)]), JoinedDataset([dataset])).run_id
        )

    def test_it_depends_on_what_they_are(self, dataset: Dataset, tmp_path: Path) -> None:
        directory = tmp_path / "x"
        ids = {resolve_run(run_settings(saes=[topk()]), JoinedDataset([dataset])).run_id}
        variants: list[tuple[int, dict[str, Any]]] = [(0, {}), (1, {}), (0, {"apply_b_dec_to_input": False})]
        for seed, changes in variants:
            settings = run_settings(saes=[topk(init_from=exported(directory, seed=seed, **changes))])
            ids.add(resolve_run(settings, JoinedDataset([dataset])).run_id)
        assert len(ids) == 4

    def test_metadata_does_not_count(self, dataset: Dataset, tmp_path: Path) -> None:
        one, two = exported(tmp_path / "one"), exported(tmp_path / "two")
        config = json.loads((tmp_path / "two" / "cfg.json").read_text())
        config |= {"metadata": {"sae_lens_version": "6.1.0"}, "device": "cuda"}
        (tmp_path / "two" / "cfg.json").write_text(json.dumps(config))
        ids = {
            resolve_run(run_settings(saes=[topk(init_from=path)]), JoinedDataset([dataset])).run_id
            for path in (one, two)
        }
        assert len(ids) == 1

    def test_the_config_pins_the_weights(self, dataset: Dataset, tmp_path: Path) -> None:
        path = exported(tmp_path / "x")
        pin = resolve_run(run_settings(saes=[topk(init_from=path)]), JoinedDataset([dataset])).initial["topk"]
        data = (tmp_path / "x" / "sae_weights.safetensors").read_bytes()
        assert (pin.sha256, pin.size) == (hashlib.sha256(data).hexdigest(), len(data))
        assert pin.fields["k"] == 2


class TestRefusals:
    @pytest.mark.parametrize(
        ("sae", "words"),
        [
            (topk(d_sae=65), "has d_sae 64, but the SAE 65"),
            (topk(hook_name=MLP), "has d_in 8, but the SAE 16"),
            (topk(k=3), "has k 2, but the SAE 3"),
            (topk(decoder_bias="none"), "has a b_dec, but decoder_bias is none"),
            (standard(name="topk", hook_name=RESID, d_sae=64), "has architecture topk, but the SAE standard"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_dictionary_that_does_not_fit(
        self, sae: dict[str, Any], words: str, dataset: Dataset, tmp_path: Path
    ) -> None:
        settings = run_settings(saes=[sae | {"init_from": exported(tmp_path / "x")}])
        with pytest.raises(ConfigError, match=re.escape(words)) as caught:
            resolve_run(settings, JoinedDataset([dataset]))
        assert str(caught.value).startswith("saes: topk: init_from: ")

    def test_one_that_cannot_be_trained_on(self, dataset: Dataset, tmp_path: Path) -> None:
        path = exported(tmp_path / "x", rescale_acts_by_decoder_norm=False)
        with pytest.raises(ConfigError, match="cannot be trained on: its decoder rows have norms"):
            resolve_run(run_settings(saes=[topk(init_from=path)]), JoinedDataset([dataset]))

    def test_one_that_is_not_there(self, dataset: Dataset, tmp_path: Path) -> None:
        runs = open_store(str(tmp_path / "runs"))
        with pytest.raises(ConfigError, match=r"saes: topk: init_from: .*nowhere: no such directory"):
            submit_run(
                runs, JoinedDataset([dataset]), run_settings(saes=[topk(init_from=str(tmp_path / "nowhere"))])
            )
        assert list(runs.list("")) == []


class TestRuns:
    def submit(self, bench: Bench, dataset: Dataset, directory: Path) -> Any:
        config = bench.submit(dataset, saes=[topk(init_from=exported(directory)), standard()])
        shutil.rmtree(directory)  # a worker elsewhere does not have it either
        return config

    def test_training_starts_from_the_runs_own_copy(
        self, bench: Bench, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The very first step sees the imported function; random weights are far from it."""
        expected = load_saelens(exported(tmp_path / "same"))
        config = self.submit(bench, dataset, tmp_path / "x")
        seen: list[tuple[Tensor, Tensor]] = []
        step = SAETraining.step

        def spying(training: SAETraining, x: Tensor, *rest: Any) -> None:
            if training.settings.name == "topk" and not seen:
                raw = x.float()
                seen.append((raw, training.sae(raw * training.scale).detach() / training.scale))
            step(training, x, *rest)

        monkeypatch.setattr(SAETraining, "step", spying)
        bench.work()
        assert bench.head(config).status == "done"
        torch.testing.assert_close(seen[0][1], expected(seen[0][0]), rtol=1e-4, atol=1e-4)
        after = load_sae(f"{bench.runs.url}/{config.run_id}", "topk")
        assert not torch.equal(after.W_enc, expected.W_enc)

    @pytest.mark.parametrize("after", [3, 20])
    def test_a_killed_run_carries_on_to_the_same_bits(
        self, bench: Bench, dataset: Dataset, after: int, tmp_path: Path
    ) -> None:
        config = self.submit(bench, dataset, tmp_path / "x")
        with interrupted("killed in a step", after, threading.Event()), pytest.raises(Killed):
            bench.work()
        bench.work()
        undisturbed = Bench(
            open_store(str(tmp_path / "undisturbed")), bench.client, bench.redis.prefix + "-u"
        )
        assert self.submit(undisturbed, dataset, tmp_path / "x").run_id == config.run_id
        undisturbed.work()
        assert digests(bench.head(config)) == digests(undisturbed.head(config))

    def test_a_lost_checkpoint_is_made_again(self, bench: Bench, dataset: Dataset, tmp_path: Path) -> None:
        config = self.submit(bench, dataset, tmp_path / "x")
        bench.work()
        head = bench.head(config)
        for key, _ in list(bench.runs.list(f"{config.run_id}/checkpoints/")):
            bench.runs.delete(key)
        remake_checkpoint(bench.place(), config.run_id, head)
        assert load_sae(f"{bench.runs.url}/{config.run_id}", "topk").encode(torch.ones(1, 8)).shape == (1, 64)

    @pytest.mark.parametrize("lost", ["safetensors", "copy"])
    @pytest.mark.parametrize("damage", [b"", b"other"])
    def test_one_damaged_copy_is_restored_from_the_other(
        self, bench: Bench, dataset: Dataset, lost: str, damage: bytes, tmp_path: Path
    ) -> None:
        config = self.submit(bench, dataset, tmp_path / "x")
        bench.work()
        url, key = f"{bench.runs.url}/{config.run_id}", f"{config.run_id}/initial/topk.{lost}"
        assert list(faults(url)[1]) == []
        whole = bench.runs.get(key)
        bench.runs.delete(key)
        if damage:
            bench.runs.put(key, whole[:-1] + bytes([whole[-1] ^ 1]))
        (fault,) = faults(url)[1]
        assert f"initial/topk.{lost}" in fault.problem
        assert fault.restore is not None
        fault.restore()
        assert bench.runs.get(key) == whole
        assert list(faults(url)[1]) == []

    def test_a_damaged_copy_is_not_trained_on(self, bench: Bench, dataset: Dataset, tmp_path: Path) -> None:
        config = self.submit(bench, dataset, tmp_path / "x")
        key = f"{config.run_id}/initial/topk.safetensors"
        data = bench.runs.get(key)
        bench.runs.put(key, data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(DamagedObject, match=r"initial/topk\.safetensors is damaged"):
            bench.work()
        assert not bench.head(config).checkpoint

    def test_with_both_copies_gone_nothing_can_help(
        self, bench: Bench, dataset: Dataset, tmp_path: Path
    ) -> None:
        config = self.submit(bench, dataset, tmp_path / "x")
        for end in ("safetensors", "copy"):
            bench.runs.delete(f"{config.run_id}/initial/topk.{end}")
        found = list(faults(f"{bench.runs.url}/{config.run_id}")[1])
        assert len(found) == 2
        assert all(fault.restore is None and "cannot help" in fault.remedy for fault in found)


def test_starting_points_are_made_only_for_what_is_pinned() -> None:
    assert starting_points([settings_of("topk")], {}, {}, {}) == {}
