"""The experiments that are disturbed: two epochs, two strict runs of two SAEs each, short leases."""

from pathlib import Path
from typing import Any

from chaos.light import PROGRAM, chunk_rows
from services.command import COMMAND, SMALL_SAES, small_config
from services.runs import standard, topk
from services.synthetic import WIDTHS

LEASE_SECONDS = 2.0
CHUNKS = 96


def program(source: str) -> list[str]:
    """What stands for `penstock`."""
    return list(PROGRAM if source == "light" else COMMAND)


def experiment(
    source: str, workdir: Path, base: str | None = None, trainers: int = 2, chunks: int = CHUNKS
) -> dict[str, Any]:
    """The config of an experiment.

    Args:
        base: a URL below which corpus, dataset and runs are stored; the work directory by default.
        chunks: of a light dataset.
    """
    config = light(workdir, chunks) if source == "light" else language_model(workdir)
    if base is not None:
        config["corpus"]["url"] = f"{base}/corpus"
        config["dataset"]["url"] = f"{base}/dataset"
        config["runs_url"] = f"{base}/runs"
    return config | {"trainers": trainers}


def light(workdir: Path, chunks: int = CHUNKS) -> dict[str, Any]:
    return {
        "workdir": str(workdir),
        "corpus": {},
        "dataset": {"hooks": list(WIDTHS), "max_rows": sum(map(chunk_rows, range(chunks)))},
        "runs": [_run("first", [topk(), standard()], 64), _run("second", [topk(k=3), standard()], 50, 7)],
        "producers": 2,
        "trainers": 2,
        "redis": {"lease_seconds": LEASE_SECONDS},
    }


def language_model(workdir: Path) -> dict[str, Any]:
    runs = [_run("first", SMALL_SAES, 256), _run("second", SMALL_SAES, 200, 7)]
    return small_config(workdir, producers=2, trainers=2, runs=runs, redis={"lease_seconds": LEASE_SECONDS})


def _run(name: str, saes: list[dict[str, Any]], batch_rows: int, seed: int = 0) -> dict[str, Any]:
    return {
        "name": name,
        "saes": saes,
        "batch_rows": batch_rows,
        "window_chunks": 4,
        "epochs": 2,
        "head_interval": 1,
        "seed": seed,
        "strict": True,
    }
