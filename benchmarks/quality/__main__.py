"""Dictionaries beside the peers': explained variance at equal L0 after equal steps on the same batches.

    python -m benchmarks.quality WORKDIR        (`make peers`)

Rows of one hook point of the model that ships with us, for transcoders of two, are scaled to a mean squared
norm of their width and put into one order. Every library trains its own kinds with its own trainer on these
batches, in an environment of its own. All have the same budget: with the first seed up to `RATES` learning
rates, doubled or halved from `FIRST_RATE` on until both neighbours of the best one have been tried; then two
more seeds with that one. The best is the one with the most explained variance on half of the held-out rows.
Each of these is up to `SPARSITIES` trainings until the wanted L0 lies close between two (or is met), and the
explained variance there is read off the line through them, over log L0. Figures are of the other half of the
held-out rows; of transcoders they are those of the targets. What was trained is kept in WORKDIR, a file per
kind, so that an interrupted benchmark goes on and kinds can be trained by several processes.
"""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from safetensors import safe_open

from benchmarks.peer import Peer
from benchmarks.quality.contenders import CONTENDERS, OURS
from benchmarks.quality.contest import compete
from benchmarks.quality.laboratory import Laboratory
from benchmarks.quality.rows import HOOKS, make_rows
from penstock.common.memory import keep_freed_memory


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: per kind, ours and then the peers', best first."""
    yield "| kind | library | lr | explained variance, median (all seeds) | ours less it | alive |"
    yield "|---|---|---|---|---|---|"
    ours = {line["kind"]: line["median"] for line in lines if line["library"] == OURS}
    for line in sorted(lines, key=lambda x: (x["kind"], x["library"] != OURS, -x["median"])):
        name = line["library"] if line["as"] == line["kind"] else f"{line['library']}, {line['as']}"
        seeds = ", ".join(f"{value:.4f}" for value in line["explained"])
        less = "" if line["library"] == OURS else f"{ours.get(line['kind'], math.nan) - line['median']:+.4f}"
        yield (
            f"| {line['kind']} | {name} | {line['lr']:g} | {line['median']:.4f} ({seeds}) | {less} | "
            f"{line['alive']:,.0f} |"
        )


KINDS = list(dict.fromkeys(contender.kind for contender in CONTENDERS))


@click.command()
@click.argument("workdir", type=click.Path(path_type=Path))
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Only this kind; repeatable.")
@click.option("--steps", default=600, show_default=True)
@click.option("--d-sae", default=1024, show_default=True)
@click.option("--batch-rows", default=512, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(
    workdir: Path, kinds: tuple[str, ...], steps: int, d_sae: int, batch_rows: int, threads: int
) -> None:
    """Train everything, print a table."""
    if not Peer.available():
        raise click.UsageError("`make interop` makes the peers' environment; it is not there")
    keep_freed_memory()
    shape = {"steps": steps, "d_sae": d_sae, "batch_rows": batch_rows}
    shape |= {"warmup": steps // 20, "decay": steps // 5, "dead_after": 100 * batch_rows}
    lines: list[dict[str, Any]] = []
    for which in HOOKS:
        contenders = [one for one in CONTENDERS if one.rows == which and (not kinds or one.kind in kinds)]
        if not contenders:
            continue
        rows = make_rows(workdir, which, shape)
        with safe_open(rows, "pt") as file:
            stored = file.get_slice("train").get_shape()[0]
        if stored < steps * batch_rows:
            raise click.UsageError(
                f"{rows} has {stored:,} rows; {steps:,} steps of {batch_rows:,} need "
                f"{steps * batch_rows:,}: take another WORKDIR"
            )
        with ExitStack() as stack:
            lines.extend(compete(Laboratory(workdir, rows, shape, threads, stack), contenders))
    (workdir / "quality.json").write_text(json.dumps({"shape": shape, "lines": lines}, indent=1))
    click.echo("\n".join(table(lines)))


if __name__ == "__main__":
    main()
