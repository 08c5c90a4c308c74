"""Run many schedules: `python -m simulation --schedules 10000 --jobs 2`, or one: `--seed 7`."""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from simulation.planted import BUGS
from simulation.schedules import try_schedule


def main() -> int:
    """Returns the exit code: 1 if a schedule broke an invariant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="run this one schedule and show its story")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--bug", choices=sorted(BUGS), help="plant a bug, which must be found")
    options = parser.parse_args()
    if options.seed is not None:
        _, failure = try_schedule((options.seed, options.bug))
        print(failure or f"schedule {options.seed}: no violation")
        return 1 if failure else 0
    started = time.monotonic()
    jobs = [(seed, options.bug) for seed in range(options.first, options.first + options.schedules)]
    failed = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done, (seed, failure) in enumerate(pool.map(try_schedule, jobs, chunksize=20), start=1):
            if failure is not None:
                failed += 1
                print(f"schedule {seed}: {failure.splitlines()[0]}; --seed {seed} shows it", flush=True)
                if options.bug or failed >= 5:
                    pool.shutdown(cancel_futures=True)
                    break
            if done % 500 == 0:
                rate = done / (time.monotonic() - started)
                left = (options.schedules - done) / rate
                print(f"{done} schedules, {rate:.0f}/s, {left:.0f} s left", file=sys.stderr, flush=True)
    print(f"schedules={done} violations={failed} seconds={time.monotonic() - started:.0f}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
