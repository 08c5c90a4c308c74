"""`penstock run` end to end on a small experiment, with real processes and the shipped model."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.store.dataset import open_dataset
from penstock.store.heads import newest_head
from penstock.trainer.lineage import load_history
from penstock.trainer.load import load_sae, split_run_url
from services.browser import open_page
from services.command import COMMAND, penstock, small_config, start, write_config
from services.trees import tree_digests
from services.waiting import eventually


def summary_of(workdir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((workdir / "summary.json").read_text())
    return found


def weights_of(workdir: Path) -> dict[str, str]:
    return {sae["name"]: sae["weights_sha256"] for sae in summary_of(workdir)["saes"]}


def run_url(workdir: Path) -> str:
    return f"{workdir}/runs/{summary_of(workdir)['run']}"


def test_it_leaves_everything_it_promises(small_run: Path) -> None:
    summary = summary_of(small_run)
    assert summary["status"] == "done"
    assert summary["training"]["rows"] == summary["dataset"]["rows"] >= 31_000
    wanted = "name hook_name architecture rows steps loss l0 dead_features explained_variance ce_recovered"
    for sae in summary["saes"]:
        assert set(wanted.split()) <= set(sae)
        assert sae["rows"] == summary["training"]["rows"]
    assert summary["controls"]["identity_ce_recovered"] == 1.0
    assert summary["controls"]["zero_ce_recovered"] == 0.0
    assert "<html" in (small_run / "report.html").read_text()
    dataset = open_dataset(str(small_run / "dataset"))
    assert dataset.committed() == set(range(dataset.n_chunks))
    sae = load_sae(run_url(small_run), "resid-topk")
    import torch

    rows = torch.randn(5, 192)
    assert int((sae.encode(rows) > 0).sum(1).max()) <= 16
    assert sae.decode(sae.encode(rows)).shape == rows.shape


def test_running_it_again_finds_everything_done(small_run: Path) -> None:
    before = tree_digests(small_run)
    started = time.monotonic()
    result = penstock("run", small_run.parent / "config.yaml")
    assert result.returncode == 0
    assert "everything is done already" in result.stdout
    assert time.monotonic() - started < 60
    assert tree_digests(small_run) == before


def test_the_summary_agrees_with_the_final_head(small_run: Path) -> None:
    runs, run_id = split_run_url(run_url(small_run))
    head = newest_head(runs, run_id)
    assert head is not None
    for sae in summary_of(small_run)["saes"]:
        figures = head.metrics[sae["name"]]
        assert (sae["loss"], sae["l0"]) == (figures["loss"], figures["l0"])
        assert sae["dead_features"] == figures["dead_features"]
    points = load_history(runs, run_id, head)
    assert points[-1]["rows"] == head.rows
    assert [p["rows"] for p in points] == sorted(p["rows"] for p in points)


@pytest.fixture(scope="module")
def three_producers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same experiment with three producers; two workers are killed on the way."""
    workdir = tmp_path_factory.mktemp("killed") / "work"
    file = write_config(workdir.parent / "config.yaml", small_config(workdir, producers=3))
    with subprocess.Popen([*COMMAND, "run", str(file)], stdout=subprocess.PIPE, text=True) as run:
        eventually(lambda: len(list(workdir.glob("dataset/commits/*/*.json"))) >= 2, 120)
        kill_one(f"produce {workdir}")
        eventually(lambda: len(list(workdir.glob("runs/*/heads/*.json"))) >= 3, 120)
        kill_one(f"train --drain {workdir}")
        output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    return workdir


def kill_one(command: str) -> None:
    """SIGKILL one process whose command line holds a text."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if command in line:
                os.kill(int(entry.name), signal.SIGKILL)
                return
    raise AssertionError(f"no process runs {command}")


def test_kills_and_the_number_of_producers_change_no_byte(small_run: Path, three_producers: Path) -> None:
    undisturbed = tree_digests(small_run / "dataset", leave_out=("provenance", "readers"))
    assert tree_digests(three_producers / "dataset", leave_out=("provenance", "readers")) == undisturbed
    assert tree_digests(three_producers / "corpus") == tree_digests(small_run / "corpus")
    assert weights_of(three_producers) == weights_of(small_run)
    assert summary_of(three_producers)["training"]["takeovers"] >= 1


@pytest.mark.long
def test_two_producers_make_the_same_dataset(small_run: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path / "work", producers=2, trainers=0, runs=[])
    result = penstock("run", write_config(tmp_path / "config.yaml", config))
    assert result.returncode == 0, result.stdout + result.stderr
    undisturbed = tree_digests(small_run / "dataset", leave_out=("provenance", "readers"))
    assert tree_digests(tmp_path / "work" / "dataset", leave_out=("provenance",)) == undisturbed


@pytest.mark.long
def test_streaming_and_replay_give_the_same_weights(small_run: Path, tmp_path: Path) -> None:
    """Training again on the finished dataset, which is then read as fast as it can be."""
    config = small_config(tmp_path / "work", dataset__url=str(small_run / "dataset"))
    config["corpus"]["url"] = str(small_run / "corpus")
    config["producers"] = 0
    result = penstock("run", write_config(tmp_path / "config.yaml", config))
    assert result.returncode == 0, result.stdout + result.stderr
    assert weights_of(tmp_path / "work") == weights_of(small_run)


def test_metrics_agree_with_the_summary(small_run: Path, tmp_path: Path, valkey_url: str) -> None:
    """A trainer that stays up after its run shows what the run's final head and summary say."""
    config = small_config(tmp_path / "work", dataset__url=str(small_run / "dataset"))
    config["redis"] = {"url": valkey_url, "prefix": f"metrics-{os.getpid()}"}
    file = write_config(tmp_path / "config.yaml", config)
    assert penstock("submit", file).returncode == 0
    run_id = summary_of(small_run)["run"]
    with start("train", file) as trainer:
        assert trainer.stdout is not None
        first = trainer.stdout.readline()
        port = re.search(r"port=(\d+)", first)
        assert port, first
        base = f"http://127.0.0.1:{port.group(1)}"
        rows = summary_of(small_run)["training"]["rows"]
        eventually(lambda: f'sae_train_rows_total{{run="{run_id}"}} {float(rows)}' in scrape(base), 120)
        text = scrape(base)
        assert urllib.request.urlopen(f"{base}/readyz").status == 200
        trainer.terminate()
        assert trainer.wait(30) == 0
    for sae in summary_of(small_run)["saes"]:
        labels = f'run="{run_id}",sae="{sae["name"]}"'
        assert gauge(text, f'sae_loss{{component="total",{labels}}}') == pytest.approx(sae["loss"])
        assert gauge(text, f"sae_l0{{{labels}}}") == pytest.approx(sae["l0"])
        assert gauge(text, f"sae_dead_features{{{labels}}}") == sae["dead_features"]


def scrape(base: str) -> str:
    with urllib.request.urlopen(f"{base}/metrics") as answer:
        text: str = answer.read().decode()
    return text


def gauge(text: str, name: str) -> float:
    line = next(line for line in text.splitlines() if line.startswith(name + " "))
    return float(line.split()[-1])


def test_other_readers_see_what_the_model_computed(small_run: Path) -> None:
    """zarr-python and TensorStore read the arrays; the model computes them anew from the stored
    tokens, sequences and positions."""
    import tensorstore
    import torch
    import zarr

    from penstock.common.model.files import ModelSettings, find_model
    from penstock.common.model.language_model import LanguageModel
    from penstock.store.corpus import open_corpus

    dataset = open_dataset(str(small_run / "dataset"))
    corpus = open_corpus(str(small_run / "corpus"))
    group: Any = zarr.open_group(str(small_run / "dataset" / "activations.zarr"), mode="r")
    sequence = np.asarray(group["sequence"][:])
    position, tokens = np.asarray(group["position"][:]), np.asarray(group["tokens"][:])
    used = np.flatnonzero(sequence >= 0)
    assert len(used) == dataset.manifest.total_rows
    stored_tokens = corpus.tokens(0, int(sequence.max()) + 1)
    assert (stored_tokens[sequence[used], position[used]] == tokens[used]).all()

    settings = ModelSettings()
    model = LanguageModel(find_model(settings), settings)
    for hook in dataset.manifest.hooks:
        path = str(small_run / "dataset" / "activations.zarr" / "acts" / hook.name)
        by_zarr = group[f"acts/{hook.name}"][:]
        opened: Any = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}})
        by_tensorstore: Any = opened.result().read().result()
        assert by_zarr.dtype.name == by_tensorstore.dtype.name == "bfloat16"
        bits = by_zarr.view(np.uint16)
        assert (bits == by_tensorstore.view(np.uint16)).all()
        for first in (0, 48):  # two forward passes as the producer made them
            captured = model.activations(
                torch.from_numpy(stored_tokens[first : first + 16]).long(), [hook.name]
            )
            computed = captured[hook.name].view(torch.int16).numpy().view(np.uint16)
            rows = used[(sequence[used] >= first) & (sequence[used] < first + 16)]
            assert len(rows) > 1000
            assert (bits[rows] == computed[sequence[rows] - first, position[rows]]).all()


def test_verify_inspect_and_status(small_run: Path, tmp_path: Path) -> None:
    for url in (small_run / "dataset", small_run / "corpus", run_url(small_run)):
        result = penstock("verify", url)
        assert (result.returncode, "no faults" in result.stdout) == (0, True), result.stdout
    assert "blocks.1.hook_resid_post: d_in 192" in penstock("inspect", small_run / "dataset").stdout
    status = penstock("status", small_run.parent / "config.yaml")
    assert status.returncode == 0
    assert ": done, position 16 of 16" in status.stdout
    assert "redis: down" in status.stdout  # the embedded server went with the run


def test_verify_finds_a_flipped_bit(small_run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "dataset"
    shutil.copytree(small_run / "dataset", copy)
    victim = copy / "activations.zarr" / "acts" / "blocks.1.hook_resid_post" / "c" / "3" / "0"
    data = bytearray(victim.read_bytes())
    data[1000] ^= 4
    victim.write_bytes(bytes(data))
    result = penstock("verify", copy)
    assert result.returncode == 1
    assert "c/3/0 is damaged" in result.stdout
    assert "1 faults" in result.stdout


def test_rm_shows_before_it_deletes_and_refuses_what_is_needed(small_run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "dataset"
    shutil.copytree(small_run / "dataset", copy)
    # an unfinished run that reads it
    config = small_config(tmp_path / "work", dataset__url=str(copy))
    config["runs"][0]["seed"] = 5
    assert penstock("submit", write_config(tmp_path / "c.yaml", config)).returncode == 0
    refused = penstock("rm", copy, "--yes")
    assert refused.returncode == 2
    assert "has not ended" in refused.stderr
    (run_directory,) = (tmp_path / "work" / "runs").iterdir()
    assert "is cancelled at position 0" in penstock("cancel", run_directory).stdout
    assert "would delete dataset" in penstock("rm", copy).stdout
    assert (copy / "manifest.json").exists()
    assert penstock("rm", copy, "--yes").returncode == 0
    assert not list(copy.rglob("*.json"))


@pytest.mark.services
def test_the_report_opens_in_a_browser_without_complaint(small_run: Path, tmp_path: Path) -> None:
    dom, complaints = open_page(small_run / "report.html", tmp_path / "profile")
    assert complaints == []
    assert "resid-topk" in dom
