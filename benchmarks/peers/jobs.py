"""What the training scripts of the peers share: rows in, jobs in, results out.

    python -m benchmarks.peers.saelens_train ROWS THREADS

says `ready`, and reads one job per line: a JSON object with `kind`, `lr`, `seed`, `sparsity` (k, or a
coefficient), `d_sae`, `steps`, `batch_rows`, `warmup` and `decay` (steps), `dead_after` (rows) and `out`. It
trains on the rows in their order, writes reconstructions of the held-out rows' targets, their L0 and the
seconds that training took to `out`, and says `done`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.peers.rows import Rows

Encode = Callable[[Tensor], Tensor]
Reconstruct = Callable[[Tensor, Tensor], Tensor]
Trained = tuple[Encode, Reconstruct]
"""What gives feature activations of rows, and reconstructions of rows and their feature activations."""
Step = Callable[[int, Tensor, Tensor], None]
"""One training step: its number, rows [B, D], and targets: the same tensor, except for transcoders."""
Begin = Callable[[dict[str, Any], int], tuple[Step, Callable[[], Trained]]]
"""From a job and d_in to the steps of its training, and what ends it."""


def decoding(decode: Encode) -> Reconstruct:
    """Reconstructions that need feature activations alone."""
    return lambda rows, acts: decode(acts)


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
        for number, (batch, targets) in enumerate(rows.batches(job)):
            step(number, batch, targets)
        encode, reconstruct = finish()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            held_out = rows.held_out.float() * rows.scale
            acts = encode(held_out)
            made = {
                "reconstruction": reconstruct(held_out, acts).float().contiguous(),
                "l0": (acts > 0).sum(dim=1).double().mean(),
                "alive": (acts > 0).any(dim=0).sum(),
                "seconds": torch.tensor(seconds),
            }
        safetensors.torch.save_file(made, job["out"])
        print("done", flush=True)
