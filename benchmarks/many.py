"""Many dictionaries in one run against as many runs of one: wall time of everything.

    python -m benchmarks.many WORKDIR

Each side is `penstock run` as a user calls it, reports included, the language model's passes and every read
with them: once with all dictionaries, and once for each of them in a work directory of its own.
"""

import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import yaml

HOOK = "blocks.3.hook_resid_post"
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "k": 32},
    "batchtopk": {"architecture": "batchtopk", "k": 32},
    "standard": {"architecture": "standard", "l1_coefficient": 4.0},
    "jumprelu": {"architecture": "jumprelu", "l0_target": 32},
}


def dictionaries(n: int) -> list[dict[str, Any]]:
    """Kinds in turn, with other seeds each round."""
    kinds = list(KINDS.items())
    return [
        {"name": f"{name}-{i // len(kinds)}", "seed": i // len(kinds), "hook_name": HOOK, "d_sae": 512} | told
        for i, (name, told) in ((i, kinds[i % len(kinds)]) for i in range(n))
    ]


def config(workdir: Path, saes: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    return {
        "workdir": str(workdir),
        "corpus": {"context": 256, "max_tokens": 2 * rows, "max_held_out_tokens": 10_000},
        "dataset": {"hooks": [HOOK], "max_rows": rows, "sequences_per_chunk": 32},
        "runs": [{"name": "run", "batch_rows": 1024, "window_chunks": 4, "saes": saes}],
        "evaluation": {"sequences": 8},
    }


def seconds(workdir: Path, saes: list[dict[str, Any]], rows: int) -> float:
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    file = workdir / "config.yaml"
    file.write_text(yaml.safe_dump(config(workdir / "work", saes, rows)))
    started = time.monotonic()
    subprocess.run([".venv/bin/penstock", "run", str(file)], check=True, stdout=subprocess.DEVNULL)
    took = time.monotonic() - started
    shutil.rmtree(workdir)
    return took


@click.command()
@click.argument("workdir", type=click.Path(path_type=Path))
@click.option("--dictionaries", "n", default=16, show_default=True)
@click.option("--rows", default=100_000, show_default=True)
def main(workdir: Path, n: int, rows: int) -> None:
    """Measure, and say the ratio."""
    saes = dictionaries(n)
    together = seconds(workdir / "together", saes, rows)
    click.echo(f"one run of {n}: {together:.1f} s")
    alone = []
    for sae in saes:
        alone.append(seconds(workdir / "alone", [sae], rows))
        click.echo(f"{sae['name']} alone: {alone[-1]:.1f} s")
    click.echo(
        f"{n} runs of one: {sum(alone):.1f} s, median {statistics.median(alone):.1f} s; "
        f"together {together / sum(alone):.3f} of that"
    )


if __name__ == "__main__":
    main()
