"""Rows of the model that ships with us, for `benchmarks.peers.rows`."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import yaml
from torch import Tensor

from penstock.store.dataset import Dataset, open_dataset

HOOKS = {
    "rows": ("blocks.3.hook_resid_post",),
    "pairs": ("blocks.3.mlp.hook_in", "blocks.3.mlp.hook_out"),
}
"""Which rows -> their hook point, and that of their targets, if that is another one."""
HELD_OUT = 16_384


def make_rows(workdir: Path, which: str, shape: dict[str, int]) -> Path:
    """Store activations with the ordinary commands, and put the batches of a run in a file, once."""
    file = workdir / f"{which}.safetensors"
    if file.exists():
        return file
    directory = workdir / which
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "workdir": str(directory),
        "corpus": {"context": 256, "max_tokens": 560_000, "max_held_out_tokens": 20_000},
        "dataset": {"hooks": list(HOOKS[which]), "sequences_per_chunk": 64, "max_rows": 510_000},
        "trainers": 0,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "penstock.deploy.cli", "run", str(directory / "config.yaml")]
    subprocess.run(command, check=True)
    dataset = open_dataset(str(directory / "dataset"))
    needed = shape["steps"] * shape["batch_rows"]
    made: dict[str, Tensor] = {}
    names = [("train", "held_out", "scale"), ("train_targets", "held_out_targets", "target_scale")]
    for hook, (train, held_out, scale) in zip(HOOKS[which], names, strict=False):
        rows, made[held_out] = _split(dataset, hook)
        made[train] = _in_order(rows, needed)
        mean_square = float(rows.double().square().sum(dim=1).mean())
        made[scale] = torch.tensor(math.sqrt(rows.shape[1] / mean_square), dtype=torch.float64)
    safetensors.torch.save_file(made, file)
    return file


def _split(dataset: Dataset, hook: str) -> tuple[Tensor, Tensor]:
    """All rows of a hook point but the last, and these."""
    last = dataset.manifest.total_rows - HELD_OUT
    parts = [dataset.as_numpy(hook, 0, last), dataset.as_numpy(hook, -HELD_OUT)]
    rows, held_out = (torch.from_numpy(part.view(np.int16)).view(torch.bfloat16) for part in parts)
    return rows, held_out.contiguous()


def _in_order(rows: Tensor, needed: int) -> Tensor:
    """As many rows as are needed: the same order for every hook point, another one each time they repeat."""
    parts: list[Tensor] = []
    while sum(map(len, parts)) < needed:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(parts)))
        parts.append(rows[order])
    return torch.cat(parts)[:needed].contiguous()
