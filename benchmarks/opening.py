"""What a dataset of very many chunks costs: to open it, to look at it, to add a chunk to it.

A dataset of N committed chunks is written outright: its real manifest and its real index blocks; commits and
chunks themselves are made for what is not indexed alone, which is what a reader and a producer look at. Then

- fresh processes open it, ask what is committed, do what `status` does with one run, and what `inspect` does;
  seconds without the imports, and the peak memory of the process with them;
- a real producer (queue, work, sink) adds chunks of a few rows; milliseconds from commit to commit, and those
  of one comparison of the queue with the store, which comes every 30 seconds.

    python -m benchmarks.opening --chunks 1000 --chunks 100000 --store local --store moto
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

HOOKS, D_IN, ROWS = 2, 8, 16
TAIL = 500
"""Chunks committed after the last indexed block, whose commits lie one by one."""
MADE = 200
"""Chunks that the producer adds."""


@click.command()
@click.option("--chunks", type=int, multiple=True, default=(1000, 10_000, 100_000), show_default=True)
@click.option("--store", "stores", multiple=True, default=("local", "moto"), show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True, help="Fresh processes per figure.")
@click.option("--look", help="Open the dataset at this URL and print JSON: one round, in this process.")
def main(chunks: tuple[int, ...], stores: tuple[str, ...], rounds: int, look: str | None) -> None:
    """Measure opening, status and commits at each size, on each store. Sizes are whole thousands."""
    if look is not None:
        click.echo(json.dumps(_look(look)))
        return
    head = (
        "store",
        "chunks",
        "open s",
        "committed s",
        "status s",
        "inspect s",
        "open MB",
        "status MB",
        "commit ms",
        "compare ms",
    )
    click.echo(f"load before: {os.getloadavg()[0]:.1f}\n" + "".join(f"{name:>13}" for name in head))
    for store in stores:
        for n in chunks:
            with _place(store) as url:
                click.echo(f"{store:>13}{n:>13,}" + _measure(url, n, rounds))


def _measure(url: str, n: int, rounds: int) -> str:
    _write(url, n)
    command = [sys.executable, "-m", "benchmarks.opening", "--look", url]
    found = [json.loads(subprocess.check_output(command)) for _ in range(rounds)]
    seconds = "".join(
        f"{statistics.median(f[name] for f in found):>13.3f}"
        for name in ("open", "committed", "status", "inspect")
    )
    commit, compare = _produce(url)
    memory = "".join(f"{max(f[name] for f in found) / 1e6:>13.0f}" for name in ("open_peak", "status_peak"))
    return seconds + memory + f"{1000 * commit:>13.1f}{1000 * compare:>13.1f}"


def _look(url: str) -> dict[str, float]:
    """Seconds of each step, and the peak memory of the process so far in bytes."""
    from penstock.deploy.look import describe
    from penstock.deploy.state import read_state
    from penstock.store.dataset import open_dataset

    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - started
        return result

    dataset = timed("open", lambda: open_dataset(url))
    committed = timed("committed", dataset.committed)
    if len(committed) != dataset.n_chunks - MADE:
        raise RuntimeError(f"{len(committed)} of {dataset.n_chunks} chunks are committed")
    seconds["open_peak"] = _peak_memory()
    config = _config(url)
    timed("status", lambda: read_state(config))
    seconds["status_peak"] = _peak_memory()
    timed("inspect", lambda: list(describe(url)))
    return seconds


def _peak_memory() -> int:
    """Bytes. getrusage would count what the parent had when it started this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def _config(url: str) -> Any:
    from penstock.deploy.config import Config

    hook = "h0"
    sae = {"name": "a", "architecture": "topk", "hook_name": hook, "d_sae": 16, "k": 2}
    return Config.model_validate(
        {
            "corpus": {"url": f"{url}-corpus"},
            "dataset": {"url": url, "hooks": [hook]},
            "runs_url": f"{url}-runs",
            "runs": [{"name": "run", "saes": [sae], "epochs": 2}],
        }
    )


def _write(url: str, n: int) -> None:
    """N chunks in index blocks, a tail of `TAIL` commits, and `MADE` that are still to be made."""
    from penstock.store.commits import Commit, Moments, StoredObject, create_commit
    from penstock.store.dataset import Dataset
    from penstock.store.index import Columns, encode_block
    from penstock.store.joined import JoinedDataset
    from penstock.store.layout import block_range, index_key
    from penstock.store.objects import open_store
    from penstock.store.writer import DatasetWriter
    from penstock.trainer.config import submit_run

    manifest = _manifest(n + TAIL + MADE)
    store = open_store(url)
    writer = DatasetWriter(store, manifest)
    paths = [spec.path for spec in writer.specs]

    def commit(index: int) -> Commit:
        return Commit(
            index,
            ROWS,
            {path: StoredObject(ROWS * D_IN * 2 + 4, index * 40_503 % 2**32) for path in paths},
            {hook.name: Moments(1.0, 2.0, index / n) for hook in manifest.hooks},
        )

    columns = Columns.of(manifest)
    for block in range(n // 1000):
        commits = [commit(index) for index in block_range(block, n)]
        store.create(index_key(block), encode_block(columns, commits))
    for index in range(n, n + TAIL):
        create_commit(store, commit(index))
    submit_run(open_store(f"{url}-runs"), JoinedDataset([Dataset(store, manifest)]), _config(url).runs[0])
    writer.close()


def _produce(url: str) -> tuple[float, float]:
    """Seconds between commits, and of one comparison with the store, both medians."""
    from penstock.common.embedded import EmbeddedServer
    from penstock.common.redis import RedisSettings, connect
    from penstock.producer.loop import produce
    from penstock.producer.sink import Sink
    from penstock.producer.work import Work
    from penstock.store.dataset import open_dataset
    from penstock.store.objects import open_store
    from penstock.store.queue import ChunkQueue
    from penstock.store.retention import Retention
    from penstock.store.writer import DatasetWriter

    manifest = open_dataset(url).manifest
    moments: list[float] = []
    with tempfile.TemporaryDirectory(prefix="penstock-benchmark-") as directory:
        server = EmbeddedServer(Path(directory))
        try:
            server.wait_until_ready()
            client = connect(RedisSettings(url=server.url))
            writer = DatasetWriter(open_store(url), manifest)
            address = (client, "bench", writer.store.url, manifest.digest, "p", 30.0)
            queue, repairs = ChunkQueue(*address), ChunkQueue(*address, repairs=True)
            work = Work(queue, repairs, writer, Retention(writer.store, manifest, None), lambda: None)
            sink = Sink(
                writer,
                work,
                client,
                queue.feeds_key,
                "p",
                lambda i, rows: moments.append(time.perf_counter()),
            )
            work._reconcile()  # the first one fills the queue
            compares = []
            for _ in range(7):
                work._reconciled = float("-inf")
                started = time.perf_counter()
                work._reconcile()
                compares.append(time.perf_counter() - started)
            produce(work, _Source(), sink, threading.Event())
            writer.close()
        finally:
            server.close()
    if len(moments) != MADE:
        raise RuntimeError(f"{len(moments)} chunks were made, not {MADE}")
    return float(np.median(np.diff(moments))), statistics.median(compares)


class _Source:
    """Chunks of a few rows, which cost nothing to make."""

    def chunk(self, index: int) -> Any:
        from penstock.store.arrays import BFLOAT16
        from penstock.store.chunks import Chunk

        rows = np.arange(ROWS)
        return Chunk(
            index=index,
            acts={f"h{hook}": np.ones((ROWS, D_IN), BFLOAT16) for hook in range(HOOKS)},
            tokens=rows.astype(np.int32),
            sequence=np.full(ROWS, index, np.int64),
            position=rows.astype(np.int32),
        )


def _manifest(n_chunks: int) -> Any:
    from penstock.store.layout import FORMAT_VERSION
    from penstock.store.manifest import CorpusPin, HookSpec, Manifest, Numerics, SourcePin

    return Manifest(
        format_version=FORMAT_VERSION,
        corpus=CorpusPin(
            digest="none",
            description="nothing",
            first_sequence=0,
            n_sequences=n_chunks,
            context=ROWS,
            tokenizer_sha256="none",
            special_ids=[],
            bos="none",
            held_out_rule="none",
        ),
        source=SourcePin(
            kind="synthetic", name="benchmark", revision=None, weights_sha256="none", drop_special=False
        ),
        numerics=Numerics(
            device="cpu",
            torch="none",
            threads=1,
            compute_dtype="float32",
            attention="none",
            capture="none",
            libraries="none",
            sequences_per_forward=1,
            allow_mixed=False,
        ),
        hooks=[HookSpec(name=f"h{hook}", d_in=D_IN) for hook in range(HOOKS)],
        sequences_per_chunk=1,
        rows_per_chunk=ROWS,
        rows=[ROWS] * n_chunks,
        seed=0,
        codec="bytes+crc32c",
        retention="keep",
    )


@contextmanager
def _place(kind: str) -> Iterator[str]:
    """A URL for a dataset: a directory, or a bucket of moto's server in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="penstock-benchmark-") as directory:
        if kind == "local":
            yield f"{directory}/dataset"
            return
        port = _free_port()
        command = [sys.executable, "-m", "moto.server", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            os.environ |= {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "x",
                "AWS_SECRET_ACCESS_KEY": "x",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            yield f"s3://{_make_bucket(port)}/dataset"
        finally:
            server.terminate()
            server.wait()


def _free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _make_bucket(port: int) -> str:
    import urllib.request

    name = f"bench-{uuid.uuid4().hex[:8]}"
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{name}", method="PUT")
    for _ in range(200):
        try:
            urllib.request.urlopen(request).close()
        except OSError:
            time.sleep(0.1)
        else:
            return name
    raise RuntimeError("moto does not start")


if __name__ == "__main__":
    main()
