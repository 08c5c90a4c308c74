"""Trainings and their figures, kept in a file per kind."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
import safetensors.torch

from benchmarks.peer import Peer
from benchmarks.peers.rows import Rows
from benchmarks.quality.contenders import OURS, Contender
from benchmarks.quality.trainers import OurTrainer, PeerTrainer, Trainer


@dataclass(frozen=True)
class Result:
    """Explained variance on the two halves of the held-out rows, L0, features alive, seconds of training."""

    chosen_by: float
    explained: float
    l0: float
    alive: int
    seconds: float


class Laboratory:
    """Trains what it is asked to, once.

    Args:
        rows: file of the rows to train on.
    """

    def __init__(
        self, workdir: Path, rows: Path, shape: dict[str, int], threads: int, stack: ExitStack
    ) -> None:
        self.shape = shape
        self._rows = rows
        self._results = workdir / f"results-{shape['steps']}-{shape['d_sae']}-{shape['batch_rows']}"
        self._results.mkdir(exist_ok=True)
        self._threads = threads
        self._stack = stack
        self._trainers: dict[str, Trainer] = {}
        there = Rows(rows)
        self._wanted = there.held_out_targets.float() * there.target_scale

    def train(self, contender: Contender, lr: float, seed: int, sparsity: float) -> Result:
        out = self._results / f"{contender.kind}.safetensors"
        job = self.shape | {
            "kind": contender.as_called_there,
            "lr": lr,
            "seed": seed,
            "sparsity": sparsity,
            "out": str(out),
        }
        told = (contender.library, contender.as_called_there, f"{lr:g}", str(seed), f"{sparsity:.5g}")
        key = " ".join(told)
        file = self._results / f"{contender.kind}.json"
        done = json.loads(file.read_text()) if file.exists() else {}
        if key not in done:
            self._trainer(contender.library).train(job)
            done[key] = self._measure(out)
            file.write_text(json.dumps(done, indent=1))
            click.echo(f"  {key:<60} {done[key]}")
        return Result(**done[key])

    def _trainer(self, library: str) -> "Trainer":
        if library not in self._trainers:
            if library == OURS:
                self._trainers[library] = OurTrainer(self._rows, self._threads)
            else:
                peer = Peer(f"benchmarks.peers.{library}_train", self._rows, self._threads)
                self._trainers[library] = PeerTrainer(self._stack.enter_context(peer))
        return self._trainers[library]

    def _measure(self, out: Path) -> dict[str, float]:
        made = safetensors.torch.load_file(out)
        halves = []
        for part in range(2):
            rows, other = self._wanted[part::2].double(), made["reconstruction"][part::2].double()
            variance = (rows - rows.mean(dim=0)).square().sum()
            halves.append(1 - float((rows - other).square().sum() / variance))
        return {
            "chosen_by": halves[0],
            "explained": halves[1],
            "l0": float(made["l0"]),
            "alive": int(made["alive"]),
            "seconds": round(float(made["seconds"]), 2),
        }
