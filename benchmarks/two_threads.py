"""Does training with several threads give the same bits each time, and the same as with one?

Every repetition is a fresh process that trains a few steps from the same seed: what differs only at
the first use of a library shows up too. Busy processes compete for the cores if asked for. Printed per
kind and number of threads: repetitions that differ from the first one, with a bound on the rate (the
rule of three: 3/n with 95 % confidence when none of n differs).

    python -m benchmarks.two_threads --repetitions 100 --threads 1 2 --busy 2
"""

import argparse
import hashlib
import multiprocessing
import time
from collections import Counter
from multiprocessing.context import SpawnContext

import torch

from penstock.trainer.kinds import SAESettings, StandardSettings, TopKSettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.step import SAETraining

D_IN, D_SAE, BATCH_ROWS, STEPS = 192, 512, 1013, 6
KINDS: dict[str, SAESettings] = {
    "standard": StandardSettings(
        name="standard", hook_name="synthetic", d_sae=D_SAE, architecture="standard", l1_coefficient=1.0
    ),
    "topk with AuxK": TopKSettings(
        name="topk", hook_name="synthetic", d_sae=D_SAE, architecture="topk", k=32, dead_after_rows=10**6
    ),
}


def train(kind: str, threads: int, seed: int) -> str:
    """SHA-256 over weights and optimizer state after each step: one process's work."""
    torch.set_num_threads(threads)
    settings = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(BATCH_ROWS, D_IN, generator=generator).bfloat16() for _ in range(STEPS)]
    training = SAETraining(D_IN, settings, torch.device("cpu"))
    training.initialise(torch.cat(batches))
    training.rows_since_active[: D_SAE // 4] = settings.dead_after_rows
    training.begin_window(torch.zeros(0, D_IN), 0)
    digest = hashlib.sha256()
    for step, rows in enumerate(batches):
        training.step(rows, Schedule(step, STEPS))
        for tensor in (training.weights() | training.optimizer_state()).values():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def spin() -> None:
    """Take a core's time until the parent ends."""
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            pass


def repeat(context: SpawnContext, kind: str, threads: int, repetitions: int, seed: int) -> Counter[str]:
    """How often each digest came, one fresh process per repetition."""
    with context.Pool(1, maxtasksperchild=1) as pool:
        work = [(kind, threads, seed)] * repetitions
        return Counter(pool.starmap(train, work, chunksize=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20, help="fresh processes per line")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--busy", type=int, default=0, help="processes that compete for the cores")
    parser.add_argument("--seed", type=int, default=0, help="of the rows")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rivals = [context.Process(target=spin, daemon=True) for _ in range(args.busy)]
    for rival in rivals:
        rival.start()
    try:
        for kind in KINDS:
            for threads in dict.fromkeys(args.threads):
                seen = repeat(context, kind, threads, args.repetitions, args.seed)
                usual, times = seen.most_common(1)[0]
                n, k = args.repetitions, args.repetitions - times
                bound = f", below {3 / n:.1%}" if k == 0 and n > 3 else ""
                print(f"{kind}, threads {threads}: {k} of {n} differ{bound}; digest {usual[:12]}", flush=True)
    finally:
        for rival in rivals:
            rival.terminate()


if __name__ == "__main__":
    main()
