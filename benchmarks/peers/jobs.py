"""What the training scripts of the peers share: rows in, jobs in, results out.

    python -m benchmarks.peers.saelens_train ROWS THREADS

says `ready`, and reads one job per line: a JSON object with `kind`, `lr`, `seed`, `sparsity` (k, or a
coefficient), `d_sae`, `steps`, `batch_rows`, `warmup` and `decay` (steps), `dead_after` (rows) and `out`. It
trains on the rows in their order, writes reconstructions of the held-out rows, their L0 and the seconds that
training took to `out`, and says `done`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

Encode = Callable[[torch.Tensor], torch.Tensor]
Trained = tuple[Encode, Encode]
"""What gives feature activations of rows, and reconstructions of feature activations."""
Step = Callable[[int, torch.Tensor], None]
"""One training step: its number, and rows [B, D]."""
Begin = Callable[[dict[str, Any], int], tuple[Step, Callable[[], Trained]]]
"""From a job and d_in to the steps of its training, and what ends it."""


class Rows:
    """Training rows in order, and held-out ones, scaled to a mean squared norm of d_in."""

    def __init__(self, file: Path) -> None:
        there = safetensors.torch.load_file(file)
        self._scale = float(there["scale"])
        self._train = there["train"]
        self.held_out = there["held_out"].float() * self._scale
        self.d_in = self._train.shape[1]

    def batches(self, job: dict[str, Any]) -> Iterator[torch.Tensor]:
        for step in range(job["steps"]):
            rows = self._train[step * job["batch_rows"] : (step + 1) * job["batch_rows"]]
            yield rows.float() * self._scale


def serve(begin: Begin) -> None:
    """Do the jobs that come on standard input."""
    torch.set_num_threads(int(sys.argv[2]))
    rows = Rows(Path(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        torch.manual_seed(job["seed"])
        started = time.perf_counter()
        step, finish = begin(job, rows.d_in)
        for number, batch in enumerate(rows.batches(job)):
            step(number, batch)
        encode, decode = finish()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            acts = encode(rows.held_out)
            made = {
                "reconstruction": decode(acts).float().contiguous(),
                "l0": (acts > 0).sum(dim=1).double().mean(),
                "alive": (acts > 0).any(dim=0).sum(),
                "seconds": torch.tensor(seconds),
            }
        safetensors.torch.save_file(made, job["out"])
        print("done", flush=True)
