"""`python -m benchmarks`: run the benchmarks, print a table, optionally write JSON."""

import dataclasses
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import groups, harvest, loader, object_store, step
from benchmarks.measure import Case
from penstock.common.device import device_kind
from penstock.common.memory import keep_freed_memory

BENCHMARKS = {
    "loader": loader.run,
    "step": step.run,
    "groups": groups.run,
    "harvest": harvest.run,
    "objects": object_store.run,
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--quick", is_flag=True, help="Few rounds: to see that it works, not to quote.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure here.")
@click.option("--device", default="cpu", help="torch device of loader, step and groups.", show_default=True)
def main(names: tuple[str, ...], quick: bool, json_file: Path | None, device: str) -> None:
    """Measure NAMES (all by default) against their limits."""
    keep_freed_memory()
    torch_device = torch.device(device)
    environment = _environment(torch_device)
    for name, value in environment.items():
        click.echo(f"{name + ':':<14}{value}")
    click.echo(f"\n{'':<26}{'median':>20}   ours ÷ it, time (min–max)")
    cases = []
    for name in names or BENCHMARKS:
        for case in BENCHMARKS[name](quick, torch_device):
            cases.append(case)
            click.echo("\n" + "\n".join(_lines(case)))
    if json_file:
        record = {"environment": environment, "quick": quick, "cases": [_record(case) for case in cases]}
        json_file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _lines(case: Case) -> Iterator[str]:
    rounds = len(case.seconds[case.ours])
    threads = f"{case.threads} thread" + ("s" if case.threads > 1 else "")
    yield f"{case.benchmark}: {case.title} ({threads}, {rounds} rounds)"
    for name in case.seconds:
        figure = f"{case.figure(name):,.{1 if case.unit == 'ms' else 0}f}"
        line = f"  {name:<24}{figure:>11} {case.unit:<8}"
        if name in case.limits:
            ratio = case.ratio(name)
            line += f"   {ratio.of_medians:.2f} ({ratio.lowest:.2f}–{ratio.highest:.2f})"
        yield line.rstrip()
    for note in case.notes:
        yield f"  {note}"


def _record(case: Case) -> dict[str, Any]:
    return dataclasses.asdict(case) | {
        "medians": {name: case.figure(name) for name in case.seconds},
        "ratios": {name: dataclasses.asdict(case.ratio(name)) for name in case.limits},
    }


def _environment(device: torch.device) -> dict[str, str]:
    """What the figures depend on. The load tells whether anything else was running."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_kind(device),
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "threads": str(torch.get_num_threads()),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or "unknown"


if __name__ == "__main__":
    main()
