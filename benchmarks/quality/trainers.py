"""How a library's training is done: ours here, the others' in processes of their own."""

import json
import time
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch

from benchmarks.peer import Peer
from benchmarks.peers.rows import Rows
from benchmarks.quality.rows import HOOKS
from penstock.common.settings import parse
from penstock.trainer.config import RunSettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.step import SAETraining

WINDOW_STEPS = 32


class Trainer(Protocol):
    """Does one job."""

    def train(self, job: dict[str, Any]) -> None: ...


class PeerTrainer:
    """In a process and environment of its own."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def train(self, job: dict[str, Any]) -> None:
        self._peer.tell(json.dumps(job), "done")


class OurTrainer:
    """What a run does with each window, without the run."""

    def __init__(self, rows: Path, threads: int) -> None:
        self._rows = Rows(rows)
        torch.set_num_threads(threads)

    def train(self, job: dict[str, Any]) -> None:
        rows, steps, size = self._rows, job["steps"], job["batch_rows"]
        targets = rows.train_targets if rows.pairs else None
        training = SAETraining(rows.d_in, our_settings(job), torch.device("cpu"))
        started = time.perf_counter()
        for step in range(steps):
            if step % WINDOW_STEPS == 0:
                window = slice(step * size, (step + WINDOW_STEPS) * size)
                of_window = None if targets is None else targets[window]
                if step == 0:
                    training.initialise(rows.train[window], targets=of_window)
                training.begin_window(rows.train[window], step * size, of_window)
            batch = slice(step * size, (step + 1) * size)
            of_batch = None if targets is None else targets[batch]
            training.step(rows.train[batch], Schedule(step, steps), of_batch)
        seconds = time.perf_counter() - started
        sae = training.sae
        sae.fold_scale(training.scale, training.scale_out)
        held_out = rows.held_out.float()
        with torch.no_grad():
            acts = sae.encode(held_out)
            made = {
                "reconstruction": sae.reconstruct(held_out, acts) * rows.target_scale,
                "l0": (acts > 0).sum(dim=1).double().mean(),
                "alive": (acts > 0).any(dim=0).sum(),
                "seconds": torch.tensor(seconds),
            }
        safetensors.torch.save_file(made, job["out"])


def our_settings(job: dict[str, Any]) -> Any:
    """Settings of one SAE; what is not told has its default."""
    kind, value, steps = job["kind"], job["sparsity"], job["steps"]
    told: dict[str, Any] = {
        "name": "a",
        "hook_name": HOOKS["rows"][0],
        "architecture": kind,
        "d_sae": job["d_sae"],
        "lr": job["lr"],
        "seed": job["seed"],
        "lr_warmup_steps": job["warmup"],
        "lr_decay_fraction": job["decay"] / steps,
        "dead_after_rows": job["dead_after"],
    }
    if kind in ("standard", "gated"):
        told |= {"l1_coefficient": value, "l1_warmup_steps": steps // 5}
    elif kind == "jumprelu":
        told |= {"l0_target": value}
    else:
        told |= {"k": int(value)}
    if kind == "matryoshka":
        told |= {"prefixes": [1 / 16, 1 / 8, 1 / 4, 1 / 2]}
    if "transcoder" in kind:
        hook_in, hook_out = HOOKS["pairs"]
        told |= {"architecture": "transcoder", "hook_name": hook_in, "hook_out": hook_out}
        told |= {"skip": kind == "skip-transcoder"}
    return parse(RunSettings, {"name": "quality", "saes": [told]}, "quality").saes[0]
