"""Many runs on three datasets, written as records: nothing is trained, and it takes a moment."""

import time
from pathlib import Path
from typing import Any

import yaml

from penstock.deploy.config import load_config
from penstock.store.dataset import open_dataset
from penstock.store.heads import Head, Status, StoredFile
from penstock.store.joined import JoinedDataset
from penstock.store.layout import head_key
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore, open_store
from penstock.trainer.config import RunConfig, submit_run
from services.big import write_big
from services.runs import topk
from services.synthetic import make_manifest

CHUNKS = (40, 30, 20)
"""Planned chunks of each dataset."""
COMMITTED = (25, 30, 20)
STATES: tuple[Status, ...] = ("running", "done", "failed", "cancelled")


def plan(number: int, chunks: int) -> Manifest:
    """Datasets of one corpus, one after the other."""
    return make_manifest([200] * chunks, first_sequence=1000 * number)


def write_fleet(directory: Path, runs: int = 50, now: float | None = None) -> Path:
    """Three datasets and runs of them in every state; the path of the config that names them all.

    Run i reads dataset i modulo 3. Its state is that of i modulo 5: no head yet, or one of `STATES`, whose
    newest head is at position 10, an hour old, and took 100 s since its parent.
    """
    now = time.time() if now is None else now
    urls = [str(directory / f"dataset-{number}") for number in range(3)]
    for number, url in enumerate(urls):
        write_big(open_store(url), plan(number, CHUNKS[number]), range(COMMITTED[number]))
    settings = {
        "workdir": str(directory),
        "dataset": {"url": urls[0], "hooks": ["blocks.0.hook_resid_post"]},
        "runs_url": str(directory / "runs"),
        "runs": [run_of(f"run-{number:02}", urls[number % 3]) for number in range(runs)],
        "metrics": {"port": 0},
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    config = load_config(str(path))
    store = open_store(config.runs_url)
    opened = [JoinedDataset([open_dataset(url)]) for url in urls]
    for number, run in enumerate(config.runs):
        submitted, _ = submit_run(store, opened[number % 3], run)
        if number % 5:
            write_heads(store, submitted, STATES[number % 5 - 1], now - 3600)
    return path


def run_of(name: str, dataset: str) -> dict[str, Any]:
    return {"name": name, "datasets": [dataset], "saes": [topk()], "window_chunks": 5, "head_interval": 1}


def write_heads(
    store: ObjectStore, run: RunConfig, status: Status, when: float, checkpoints: bool = False
) -> None:
    """A takeover, a head at position 5, and 100 s later one at position 10."""
    at = [("takeover", 0, when - 110), ("progress", 5, when - 100), ("progress", 10, when)]
    for n, (kind, position, moment) in enumerate(at):
        head = Head(
            n=n,
            parent=n - 1 if n else None,
            writer=f"{n:032x}",
            kind=kind,  # type: ignore[arg-type]
            status=status if n == 2 else "running",
            position=position,
            step=position,
            rows=200 * position,
            environment={},
            checkpoint={"sae/topk": stored_file(n)} if checkpoints and n else {},
            metrics={"topk": {"loss": 1.5, "l0": 2.0}},
            reason="as planned" if status == "failed" and n == 2 else None,
            time=moment,
        )
        assert store.create_guarded(head_key(run.run_id, n), head.record())


def stored_file(n: int) -> StoredFile:
    """There is nothing behind it."""
    return StoredFile(key=f"checkpoints/{n}-{n:032x}/sae/topk.safetensors", size=1, sha256="0" * 64)
