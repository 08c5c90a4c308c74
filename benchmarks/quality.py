"""Dictionaries beside the peers': explained variance at equal L0 after equal steps on the same batches.

    python -m benchmarks.quality WORKDIR        (`make peers`)

Rows of one hook point of the model that ships with us are scaled to a mean squared norm of d_in and put
into one order. Every library trains its own kinds with its own trainer on these batches, in an environment
of its own. All have the same budget: with the first seed up to `RATES` learning rates, doubled or halved
from `FIRST_RATE` on until both neighbours of the best one have been tried; then two more seeds with that
one. The best is the one with the most explained variance on half of the held-out rows. Each of these is up
to `SPARSITIES` trainings until the wanted L0 lies close between two (or is met), and the explained variance
there is read off the line through them, over log L0. Figures are of the other half of the held-out rows.
What was trained is kept in WORKDIR, a file per kind, so that an interrupted benchmark goes on and kinds can
be trained by several processes.
"""

import json
import math
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import safetensors.torch
import torch
import yaml

from benchmarks.peer import Peer
from penstock.common.memory import keep_freed_memory
from penstock.common.settings import parse
from penstock.store.dataset import open_dataset
from penstock.trainer.config import RunSettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.step import SAETraining

HOOK = "blocks.3.hook_resid_post"
TARGET = 32
"""Features active per row, on average."""
FIRST_RATE = 4e-3
RATES = 5
SPARSITIES = 4
MET = 0.01
"""Difference in L0, relative, that is taken for none."""
CLOSE = 1.5
"""L0 of two trainings over each other, for a line through them to be trusted."""
SEEDS = 3
HELD_OUT = 16_384
WINDOW_STEPS = 32
OURS = "penstock"


@dataclass(frozen=True)
class Contender:
    """A kind as a library has it.

    Attributes:
        first: coefficient to begin with, where there is one; else it is told the wanted L0.
    """

    kind: str
    library: str
    as_called_there: str
    first: float | None = None


CONTENDERS = [
    Contender("standard", OURS, "standard", 2.0),
    Contender("standard", "saelens", "standard", 2.0),
    Contender("standard", "dictionary_learning", "standard", 0.1),
    Contender("standard", "dictionary_learning", "standard-april", 2.0),
    Contender("gated", OURS, "gated", 2.0),
    Contender("gated", "saelens", "gated", 2.0),
    Contender("gated", "dictionary_learning", "gated", 2.0),
    Contender("topk", OURS, "topk"),
    Contender("topk", "saelens", "topk"),
    Contender("topk", "dictionary_learning", "topk"),
    Contender("topk", "sparsify", "topk"),
    Contender("topk", "sparsify", "topk-signum"),
    Contender("batchtopk", OURS, "batchtopk"),
    Contender("batchtopk", "saelens", "batchtopk"),
    Contender("batchtopk", "dictionary_learning", "batchtopk"),
    Contender("jumprelu", OURS, "jumprelu"),
    Contender("jumprelu", "saelens", "jumprelu", 1.0),
    Contender("jumprelu", "dictionary_learning", "jumprelu"),
    Contender("matryoshka", OURS, "matryoshka"),
    Contender("matryoshka", "saelens", "matryoshka"),
    Contender("matryoshka", "dictionary_learning", "matryoshka"),
]


@dataclass(frozen=True)
class Result:
    """Explained variance on the two halves of the held-out rows, L0, features alive, seconds of training."""

    chosen_by: float
    explained: float
    l0: float
    alive: int
    seconds: float


class Laboratory:
    """Trains what it is asked to, once."""

    def __init__(self, workdir: Path, shape: dict[str, int], threads: int, stack: ExitStack) -> None:
        self.shape = shape
        self._rows = workdir / "rows.safetensors"
        self._results = workdir / f"results-{shape['steps']}-{shape['d_sae']}-{shape['batch_rows']}"
        self._results.mkdir(exist_ok=True)
        self._threads = threads
        self._stack = stack
        self._trainers: dict[str, Trainer] = {}
        rows = safetensors.torch.load_file(self._rows)
        self._held_out = rows["held_out"].float() * float(rows["scale"])

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
            rows, other = self._held_out[part::2].double(), made["reconstruction"][part::2].double()
            variance = (rows - rows.mean(dim=0)).square().sum()
            halves.append(1 - float((rows - other).square().sum() / variance))
        return {
            "chosen_by": halves[0],
            "explained": halves[1],
            "l0": float(made["l0"]),
            "alive": int(made["alive"]),
            "seconds": round(float(made["seconds"]), 2),
        }


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
        there = safetensors.torch.load_file(rows)
        self._train, self._scale = there["train"], float(there["scale"])
        self._held_out = there["held_out"]
        torch.set_num_threads(threads)

    def train(self, job: dict[str, Any]) -> None:
        settings = our_settings(job)
        batch_rows, steps = job["batch_rows"], job["steps"]
        training = SAETraining(self._train.shape[1], settings, torch.device("cpu"))
        started = time.perf_counter()
        for step in range(steps):
            if step % WINDOW_STEPS == 0:
                window = self._train[step * batch_rows : (step + WINDOW_STEPS) * batch_rows]
                if step == 0:
                    training.initialise(window)
                training.begin_window(window, step * batch_rows)
            training.step(self._train[step * batch_rows : (step + 1) * batch_rows], Schedule(step, steps))
        seconds = time.perf_counter() - started
        sae = training.sae
        sae.fold_scale(training.scale)
        with torch.no_grad():
            acts = sae.encode(self._held_out.float())
            made = {
                "reconstruction": sae.decode(acts) * self._scale,
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
        "hook_name": HOOK,
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
    return parse(RunSettings, {"name": "quality", "saes": [told]}, "quality").saes[0]


@dataclass(frozen=True)
class Reading:
    """Explained variance on both halves at the wanted L0, what was told for it, and the nearest training."""

    chosen_by: float
    explained: float
    asked: tuple[float, ...]
    nearest: Result


def read_at_target(
    laboratory: Laboratory, contender: Contender, lr: float, seed: int, begin: tuple[float, ...]
) -> Reading | None:
    """Train until the wanted L0 is met or lies between two trainings; None where it was not reached.

    Args:
        begin: sparsities to try first: what served another learning rate or seed.
    """
    tried: dict[float, Result] = {}
    for number in range(SPARSITIES):
        asked = begin[number] if number < len(begin) else _next_sparsity(contender, tried)
        if asked in tried:
            break
        tried[asked] = laboratory.train(contender, lr, seed, asked)
        nearest = min(tried, key=lambda value: abs(tried[value].l0 - TARGET))
        if abs(tried[nearest].l0 / TARGET - 1) <= MET:
            return Reading(tried[nearest].chosen_by, tried[nearest].explained, (nearest,), tried[nearest])
        below, above = _beside(tried)
        if below is not None and above is not None and tried[above].l0 <= CLOSE * tried[below].l0:
            break
    below, above = _beside(tried)
    if below is None or above is None or tried[below].l0 == 0:
        return None
    low, high = tried[below], tried[above]
    share = math.log(TARGET / low.l0) / math.log(high.l0 / low.l0)
    return Reading(
        low.chosen_by + share * (high.chosen_by - low.chosen_by),
        low.explained + share * (high.explained - low.explained),
        (below, above),
        tried[nearest],
    )


def _beside(tried: dict[float, Result]) -> tuple[float | None, float | None]:
    """What was told for the largest L0 up to the wanted one, and for the smallest above it."""
    below = max((v for v, r in tried.items() if r.l0 <= TARGET), key=lambda v: tried[v].l0, default=None)
    above = min((v for v, r in tried.items() if r.l0 > TARGET), key=lambda v: tried[v].l0, default=None)
    return below, above


def _next_sparsity(contender: Contender, tried: dict[float, Result]) -> float:
    """A guess of what gives the wanted L0; a little beyond it until that lies between two."""
    if not tried:
        return TARGET if contender.first is None else contender.first
    below, above = _beside(tried)
    if contender.first is None:
        if below is not None and above is not None:
            return round((below + above) / 2)
        value, result = max(tried.items(), key=lambda x: -abs(x[1].l0 - TARGET))
        wanted = value * TARGET / max(1.0, result.l0)
        return math.ceil(wanted) if result.l0 < TARGET else math.floor(wanted)
    if below is not None and above is not None:
        return math.sqrt(below * above)
    if above is not None:
        return above * min(4.0, max(1.15, 1.1 * tried[above].l0 / TARGET))
    assert below is not None
    return below / min(4.0, max(1.15, 1.1 * TARGET / max(1.0, tried[below].l0)))


def best_rate(laboratory: Laboratory, contender: Contender) -> tuple[float, Reading] | None:
    """The learning rate that does best with the first seed; None where no training reached the wanted L0."""
    tried: dict[float, Reading | None] = {}
    begin: tuple[float, ...] = ()
    lr: float | None = FIRST_RATE
    best: tuple[float, Reading] | None = None
    while lr is not None and len(tried) < RATES:
        reading = tried[lr] = read_at_target(laboratory, contender, lr, 0, begin)
        if reading is not None:
            begin = reading.asked
            if best is None or reading.chosen_by > best[1].chosen_by:
                best = lr, reading
        middle = FIRST_RATE if best is None else best[0]
        lr = next((rate for rate in (2 * middle, middle / 2) if rate not in tried), None)
    return best


def compete(laboratory: Laboratory, kinds: list[str]) -> Iterator[dict[str, Any]]:
    """A line per contender."""
    for contender in CONTENDERS:
        if contender.kind not in kinds:
            continue
        found = best_rate(laboratory, contender)
        if found is None:
            click.echo(f"{contender}: L0 {TARGET} was not reached")
            continue
        lr, reading = found
        readings = [reading]
        for seed in range(1, SEEDS):
            other = read_at_target(laboratory, contender, lr, seed, reading.asked)
            if other is not None:
                readings.append(other)
        yield {
            "kind": contender.kind,
            "library": contender.library,
            "as": contender.as_called_there,
            "lr": lr,
            "explained": [reading.explained for reading in readings],
            "median": statistics.median(reading.explained for reading in readings),
            "l0": statistics.median(reading.nearest.l0 for reading in readings),
            "alive": statistics.median(reading.nearest.alive for reading in readings),
            "seconds": statistics.median(reading.nearest.seconds for reading in readings),
        }


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


def make_rows(workdir: Path, shape: dict[str, int]) -> None:
    """Store activations with the ordinary commands, and put the batches of a run in a file."""
    workdir.mkdir(parents=True, exist_ok=True)
    needed = shape["steps"] * shape["batch_rows"]
    config = {
        "workdir": str(workdir),
        "corpus": {"context": 256, "max_tokens": 560_000, "max_held_out_tokens": 20_000},
        "dataset": {"hooks": [HOOK], "sequences_per_chunk": 64, "max_rows": 510_000},
        "trainers": 0,
    }
    (workdir / "config.yaml").write_text(yaml.safe_dump(config))
    penstock = str(Path(".venv/bin/penstock"))
    subprocess.run([penstock, "run", str(workdir / "config.yaml")], check=True)
    dataset = open_dataset(str(workdir / "dataset"))
    parts: list[torch.Tensor] = []
    held_out = torch.from_numpy(dataset.as_numpy(HOOK, -HELD_OUT).view(np.int16)).view(torch.bfloat16)
    last = dataset.manifest.total_rows - HELD_OUT
    rows = torch.from_numpy(dataset.as_numpy(HOOK, 0, last).view(np.int16)).view(torch.bfloat16)
    epoch = 0
    while sum(map(len, parts)) < needed:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        parts.append(rows[order])
        epoch += 1
    train = torch.cat(parts)[:needed].contiguous()
    mean_square = float(rows.double().square().sum(dim=1).mean())
    scale = torch.tensor(math.sqrt(rows.shape[1] / mean_square), dtype=torch.float64)
    made = {"train": train, "held_out": held_out.contiguous(), "scale": scale}
    safetensors.torch.save_file(made, workdir / "rows.safetensors")


@click.command()
@click.argument("workdir", type=click.Path(path_type=Path))
@click.option("--kind", "kinds", multiple=True, help="Only this kind; repeatable.")
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
    if not (workdir / "rows.safetensors").exists():
        make_rows(workdir, shape)
    stored = safetensors.torch.load_file(workdir / "rows.safetensors")["train"]
    if len(stored) < steps * batch_rows:
        raise click.UsageError(
            f"{workdir}/rows.safetensors has {len(stored):,} rows; {steps:,} steps of {batch_rows:,} need "
            f"{steps * batch_rows:,}: take another WORKDIR"
        )
    with ExitStack() as stack:
        laboratory = Laboratory(workdir, shape, threads, stack)
        wanted = list(kinds) or list(dict.fromkeys(contender.kind for contender in CONTENDERS))
        lines = list(compete(laboratory, wanted))
    (workdir / "quality.json").write_text(json.dumps({"shape": shape, "lines": lines}, indent=1))
    click.echo("\n".join(table(lines)))


if __name__ == "__main__":
    main()
