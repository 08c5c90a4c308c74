"""Make the fixture of the current format version: python -m formats.make, from tests/.

A finished run, a run that was stopped between two heads, two datasets of one corpus with both codecs, a large
dataset's index, and `expected.json` with what this version reads from them. Once released, a fixture stays as
it is.
"""

import json
import os
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from formats import experiment
from penstock.common.redis import RedisSettings, connect
from penstock.store.dataset import open_dataset
from penstock.store.layout import BLOCK_CHUNKS, FORMAT_VERSION
from penstock.store.objects import open_store
from penstock.trainer.config import load_run_config, run_ids
from services.big import big_manifest, write_big
from services.command import penstock, write_config
from services.moto import MotoServer
from services.runs import Bench
from services.valkey import valkey_server
from services.waiting import eventually

BIG_TAIL = range(BLOCK_CHUNKS, BLOCK_CHUNKS + 2)

_CORPUS = {"max_tokens": 3_000, "max_held_out_tokens": 300, "context": 32}
_SAES = [
    {"name": "topk", "architecture": "topk", "hook_name": experiment.HOOKS[1], "d_sae": 12, "k": 3},
    {"name": "l1", "architecture": "standard", "hook_name": experiment.HOOKS[0], "d_sae": 8}
    | {"l1_coefficient": 0.5},
]


def config(redis_url: str, part: str, **dataset: Any) -> dict[str, Any]:
    """One of the two configs: the second dataset continues the first, and its run reads both."""
    urls = [] if part == experiment.FIRST else [experiment.FIRST, experiment.SECOND]
    run = {"name": "run", "datasets": urls, "batch_rows": 64, "window_chunks": 2, "head_interval": 2}
    return {
        "workdir": "work",
        "corpus": _CORPUS | {"url": f"{experiment.BASE}/corpus"},
        "dataset": {"url": part, "hooks": list(experiment.HOOKS), "sequences_per_chunk": 4, **dataset},
        "runs_url": f"{part}-runs",
        "runs": [run | {"strict": True, "saes": _SAES}],
        "producers": 1,
        "trainers": 1,
        "evaluation": {"sequences": 4},
        "redis": {"url": redis_url},
    }


def call(*arguments: str | Path) -> None:
    done = penstock(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def stop_between_heads(bench: Bench) -> None:
    """Train until two heads with a checkpoint are there."""
    run = load_run_config(bench.runs, *run_ids(bench.runs))
    stop = threading.Event()
    worker = threading.Thread(target=bench.work, args=(stop,))
    worker.start()
    eventually(lambda: bench.position(run) >= 8, seconds=60)
    stop.set()
    worker.join()
    assert not bench.ended(run)


def make(directory: Path) -> Iterator[tuple[str, bytes]]:
    """(path in the fixture, bytes) of everything."""
    with valkey_server() as server:
        first = config(server.url, experiment.FIRST, max_rows=800)
        second = config(
            server.url, experiment.SECOND, max_rows=900, after=experiment.FIRST, codec="bytes+blosc+crc32c"
        )
        files = [write_config(directory / f"{n}.yaml", told) for n, told in enumerate((first, second))]
        call("run", files[0], "--workdir", directory / "work")
        call("produce", files[1])
        call("submit", files[1])
        client = connect(RedisSettings(url=server.url))
        bench = Bench(open_store(f"{experiment.SECOND}-runs"), client, "half")
        stop_between_heads(bench)
    for told, name in ((first, "first"), (second, "second")):
        told["redis"] = {}
        yield f"{name}.yaml", yaml.safe_dump(told, sort_keys=False).encode()
    everything = open_store(experiment.BASE)
    for key, _ in sorted(everything.list("")):
        yield f"objects/{key}", everything.get(key)
    big = open_store(str(directory / "big"))
    write_big(big, big_manifest(BLOCK_CHUNKS + len(BIG_TAIL)), BIG_TAIL)
    for key, _ in sorted(big.list("")):
        yield f"big/{key}", big.get(key)
    yield "expected.json", json.dumps(expected(), indent=1).encode() + b"\n"


def expected() -> dict[str, Any]:
    """What this version reads."""
    (done,) = run_ids(open_store(f"{experiment.FIRST}-runs"))
    (half,) = run_ids(open_store(f"{experiment.SECOND}-runs"))
    batches = experiment.reading(open_dataset(experiment.FIRST))
    iterator = iter(batches)
    for _ in range(experiment.TAKEN):
        next(iterator)
    state = batches.state_dict()
    return {
        "done": done,
        "half": half,
        "corpus": experiment.look_at_corpus(f"{experiment.BASE}/corpus"),
        "datasets": {url: experiment.look_at_dataset(url) for url in (experiment.FIRST, experiment.SECOND)},
        "state": state,
        "rest": experiment.digest_of_batches(iterator),
        "saes": {
            sae["name"]: experiment.look_at_sae(f"{experiment.FIRST}-runs/{done}", str(sae["name"]))
            for sae in _SAES
        },
    }


def main() -> None:
    target = Path(__file__).parent / f"{FORMAT_VERSION}.tar.xz"
    if target.exists():
        sys.exit(f"{target.name} is there already: a fixture that was released stays as it is")
    with MotoServer() as moto, tempfile.TemporaryDirectory() as directory:
        os.environ.update(moto.environment())
        moto.make_bucket(experiment.BASE.removeprefix("s3://"))
        with tarfile.open(Path(directory) / "fixture", "w:xz") as archive:
            for name, data in make(Path(directory)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
        (Path(directory) / "fixture").replace(target)


if __name__ == "__main__":
    main()
