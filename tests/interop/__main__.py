"""`make interop`: exports checked in the libraries they are for, and imports of what SAELens itself wrote.

    python -m interop WORKDIR PEERS_PYTHON

Trains a small run of every kind of SAE on real activations with the ordinary commands, exports it in every
format, and starts `peers.py` in the other environment, which loads each export with the library's public
loader. Then it imports what SAELens saved there, and what it made of our own exports.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

from penstock.store.dataset import open_dataset
from penstock.trainer.config import load_run_config
from penstock.trainer.exchange.write import FORMATS
from penstock.trainer.load import load_sae, load_saelens, split_run_url
from penstock.trainer.sae import SAE

HERE = Path(__file__).parent
ROWS = 4096
"""Real activations that every dictionary is compared on."""
TOLERANCE = 1e-5
"""Largest difference, relative to the largest value of what is compared."""


def main(workdir: Path, peers_python: str) -> int:
    """Returns the exit code."""
    began = time.monotonic()
    shutil.rmtree(workdir, ignore_errors=True)
    penstock("run", str(HERE / "config.yaml"), "--workdir", str(workdir))
    (run_url,) = map(str, (workdir / "runs").iterdir())
    for format in FORMATS:
        penstock("export", run_url, "--format", format, "--out", str(workdir / "exports" / format))
    names = write_references(run_url, workdir)
    print(f"trained and exported in {time.monotonic() - began:.0f} s", flush=True)

    environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1", "HF_HUB_OFFLINE": "1"}
    command = [peers_python, str(HERE / "peers.py"), str(workdir), *names]
    code = subprocess.run(command, env=environment, check=False).returncode

    wrong = list(check_imports(workdir)) + list(check_round_trips(workdir, names))
    for line in wrong:
        print(line)
    print(f"whole: {time.monotonic() - began:.0f} s")
    return code or (1 if wrong else 0)


def penstock(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "penstock.deploy.cli", *arguments], check=True)


def write_references(run_url: str, workdir: Path) -> list[str]:
    """What our own modules give, for each SAE of the run; returns their names."""
    runs, run_id = split_run_url(run_url)
    saes = load_run_config(runs, run_id).settings.saes
    hooks = sorted({settings.hook_name for settings in saes})
    batch = next(iter(open_dataset(str(workdir / "dataset")).batches(hooks, batch_rows=ROWS)))
    for settings in saes:
        rows = batch[settings.hook_name].float()
        save_reference(workdir / "references" / settings.name, load_sae(run_url, settings.name), rows)
    return [settings.name for settings in saes]


def save_reference(path: Path, sae: SAE, rows: torch.Tensor) -> None:
    path.parent.mkdir(exist_ok=True)
    acts = sae.encode(rows)
    told = {"rows": rows, "feature_acts": acts, "reconstruction": sae.decode(acts)}
    safetensors.torch.save_file(told, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps({"architecture": sae.architecture}))


def check_imports(workdir: Path) -> Iterator[str]:
    """Dictionaries that SAELens made and saved itself: what it gives and what we give must be the same."""
    for directory in sorted((workdir / "saelens-made").iterdir()):
        told = safetensors.torch.load_file(directory / "outputs.safetensors")
        sae = load_saelens(directory)
        acts = sae.encode(told["rows"])
        pairs = [
            ("feature activations", acts, told["feature_acts"]),
            ("reconstructions", sae.decode(acts), told["reconstruction"]),
        ]
        for what, mine, theirs in pairs:
            difference = float((mine - theirs).abs().max() / theirs.abs().max())
            print(f"import {directory.name:32s} {what:20s} {difference:9.1e}")
            if not difference <= TOLERANCE:
                yield f"import of {directory.name}: {what} differ by {difference:.1e}"


def check_round_trips(workdir: Path, names: list[str]) -> Iterator[str]:
    """What SAELens saved after loading our exports, imported: the tensors we exported, bit for bit."""
    for name in names:
        ours = safetensors.torch.load_file(workdir / "exports" / "saelens" / name / "sae_weights.safetensors")
        back = load_saelens(workdir / "saelens-saved" / name).state_dict()
        same = ours.keys() == back.keys() and all(torch.equal(ours[key], back[key]) for key in ours)
        print(f"export -> SAELens -> save -> import {name:20s} {'identical' if same else 'DIFFERENT'}")
        if not same:
            yield f"{name}: SAELens saved something else than it was given"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
