"""`make interop`: exports checked in the libraries they are for, and imports of what SAELens itself wrote.

    python -m interop WORKDIR PEERS_PYTHON

Trains a small run of every kind of SAE on real activations with the ordinary commands, exports it in every
format, and starts `peers.py` in the other environment, which loads each export with the library's public
loader, and has SAELens judge exports inside the model, on the tokens that we judge them on (`metrics.py`).
Then it imports what SAELens saved there, and what it made of our own exports.
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

from interop.compare import compare
from interop.judged import write_judged
from penstock.common.errors import UserError
from penstock.store.dataset import open_dataset
from penstock.trainer.config import load_run_config
from penstock.trainer.exchange.write import FORMATS, export_run
from penstock.trainer.kinds import KINDS
from penstock.trainer.load import load_sae, load_saelens, split_run_url
from penstock.trainer.sae import SAE

HERE = Path(__file__).parent
CANNOT: set[tuple[str, str]] = {
    ("batchtopk", "sparsify"),
    ("gated", "sparsify"),
    ("jumprelu", "sparsify"),
    ("matryoshka", "sparsify"),
    ("switch", "dictionary-learning"),
    ("switch", "saelens"),
    ("switch", "sparsify"),
    ("transcoder", "dictionary-learning"),
    ("mlp-transcoder-topk", "saelens"),
}
"""Kinds, or names of SAEs, and formats that docs/export.md says do not go together."""
ROWS = 4096
"""Real activations that every dictionary is compared on."""


def main(workdir: Path, peers_python: str) -> int:
    """Returns the exit code."""
    began = time.monotonic()
    shutil.rmtree(workdir, ignore_errors=True)
    penstock("run", str(HERE / "config.yaml"), "--workdir", str(workdir))
    (run_url,) = map(str, (workdir / "runs").iterdir())
    names = write_references(run_url, workdir)
    wrong = list(export(run_url, names, workdir / "exports"))
    write_judged(run_url, workdir, names)
    print(f"trained, exported and judged in {time.monotonic() - began:.0f} s", flush=True)

    environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(HERE.parent)
    command = [peers_python, "-m", "interop.peers", str(workdir), *names]
    code = subprocess.run(command, env=environment, check=False).returncode
    if not (workdir / "saelens-made").is_dir():
        return code or 1  # it has said what went wrong

    wrong += list(check_imports(workdir)) + list(check_round_trips(workdir, names))
    for line in wrong:
        print(line)
    print(f"whole: {time.monotonic() - began:.0f} s")
    return code or (1 if wrong else 0)


def penstock(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "penstock.deploy.cli", *arguments], check=True)


def export(run_url: str, names: dict[str, str], out: Path) -> Iterator[str]:
    """Export each SAE in each format that has its kind."""
    missing = set(KINDS) - set(names.values())
    if missing:
        yield f"config.yaml has no SAE of these kinds: {missing}"
    for format in FORMATS:
        for name, kind in names.items():
            try:
                list(export_run(run_url, format, out / format, [name]))
            except UserError as error:
                print(f"{name}: {error}")
                if not {(kind, format), (name, format)} & CANNOT:
                    yield f"{name} is not in {format} (docs/export.md)"


def write_references(run_url: str, workdir: Path) -> dict[str, str]:
    """What our own modules give, for each SAE of the run; returns their names and kinds."""
    runs, run_id = split_run_url(run_url)
    saes = load_run_config(runs, run_id).settings.saes
    hooks = sorted({settings.hook_name for settings in saes})
    batch = next(iter(open_dataset(str(workdir / "dataset")).batches(hooks, batch_rows=ROWS)))
    for settings in saes:
        rows = batch[settings.hook_name].float()
        save_reference(workdir / "references" / settings.name, load_sae(run_url, settings.name), rows)
    return {settings.name: settings.architecture for settings in saes}


def save_reference(path: Path, sae: SAE, rows: torch.Tensor) -> None:
    path.parent.mkdir(exist_ok=True)
    acts = sae.encode(rows)
    told = {"rows": rows, "feature_acts": acts, "reconstruction": sae.reconstruct(rows, acts)}
    safetensors.torch.save_file(told, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps({"architecture": sae.architecture}))


def check_imports(workdir: Path) -> Iterator[str]:
    """Dictionaries that SAELens made and saved itself: what it gives and what we give must be the same."""
    for directory in sorted((workdir / "saelens-made").iterdir()):
        told = safetensors.torch.load_file(directory / "outputs.safetensors")
        sae = load_saelens(directory)
        acts = sae.encode(told["rows"])
        again = sae.reconstruct(told["rows"], acts)
        found = compare((told["feature_acts"], acts), (told["reconstruction"], again))
        print(f"{sae.architecture:12s} {directory.name:20s} {'SAELens, by us':20s} {found}")
        if not found.same:
            yield f"import of {directory.name}: not what SAELens gives"


def check_round_trips(workdir: Path, names: dict[str, str]) -> Iterator[str]:
    """What SAELens saved after loading our exports, imported: the tensors we exported, bit for bit."""
    for name in names:
        exported = workdir / "exports" / "saelens" / name
        if not exported.exists():
            continue  # SAELens has no such kind
        ours = safetensors.torch.load_file(exported / "sae_weights.safetensors")
        back = load_saelens(workdir / "saelens-saved" / name).to_saelens().tensors
        same = ours.keys() == back.keys() and all(torch.equal(ours[key], back[key]) for key in ours)
        print(
            f"{name}: exported, loaded and saved by SAELens, imported: {'the same' if same else 'OTHER'} bits"
        )
        if not same:
            yield f"{name}: SAELens saved something else than it was given"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
