"""Single training steps of a peer, one for each line on standard input; prints the seconds it took.

    python -m benchmarks.peers.steps LIBRARY KIND SPARSITY D_IN D_SAE BATCH_ROWS THREADS

The rows are sums of a few directions, as in `benchmarks.step`.
"""

import importlib
import sys
import time

import torch


def main() -> None:
    library, kind, sparsity = sys.argv[1:4]
    d_in, d_sae, batch_rows, threads = map(int, sys.argv[4:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    job = {"kind": kind, "d_sae": d_sae, "batch_rows": batch_rows, "seed": 0, "lr": 1e-3}
    job |= {"sparsity": float(sparsity) if "." in sparsity else int(sparsity)}
    job |= {"steps": 100_000, "warmup": 100, "decay": 20_000, "dead_after": 10_000_000}
    step, _ = importlib.import_module(f"benchmarks.peers.{library}_train").begin(job, d_in)
    strength = torch.rand(batch_rows, 2 * d_in)
    rows = torch.where(strength > 0.99, strength, 0.0) @ torch.randn(2 * d_in, d_in)
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        step(number, rows, rows)
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
