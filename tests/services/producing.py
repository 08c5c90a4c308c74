"""Producers of synthetic datasets, in this process: what they made, and pauses that are short."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

from penstock.common.redis import Client
from penstock.producer.loop import produce
from penstock.producer.sink import Sink
from penstock.producer.work import Work
from penstock.store.chunks import Chunk
from penstock.store.dataset import Dataset
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore, open_store
from penstock.store.queue import ChunkQueue, repairs_wanted
from penstock.store.retention import Retention
from penstock.store.writer import DatasetWriter
from services.runs import Bench
from services.synthetic import SyntheticSource, make_manifest


class CountingSource:
    """A synthetic source that notes what it made and takes a moment for each chunk."""

    def __init__(
        self, manifest: Manifest, seconds: float = 0.0, on_chunk: Callable[[int], None] = lambda index: None
    ) -> None:
        self.made: list[int] = []
        self._source = SyntheticSource(manifest)
        self._seconds = seconds
        self._on_chunk = on_chunk

    def chunk(self, index: int) -> Chunk:
        self._on_chunk(index)
        time.sleep(self._seconds)
        self.made.append(index)
        return self._source.chunk(index)


class Impatient(threading.Event):
    """A stop event whose waits are short: pauses of the loop do not slow the tests down."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(0.02)


class Producer:
    """Everything one producer process consists of.

    Args:
        budget: chunks that may lie ahead of the floor.
        store: the dataset's, if it is not simply the one at `url`.
    """

    def __init__(
        self,
        client: Client,
        prefix: str,
        url: Path | str,
        name: str,
        source: CountingSource | None = None,
        lease_seconds: float = 20.0,
        queue: type[ChunkQueue] = ChunkQueue,
        manifest: Manifest | None = None,
        budget: int | None = None,
        store: ObjectStore | None = None,
        pool: Executor | None = None,
    ) -> None:
        self.manifest = manifest or make_manifest()
        self.stop = Impatient()
        self.source = source or CountingSource(self.manifest)
        self.writer = DatasetWriter(store or open_store(str(url)), self.manifest, pool)
        where = (client, prefix, self.writer.store.url, self.manifest.digest, name, lease_seconds)
        self.queue = queue(*where)
        self.repairs = ChunkQueue(*where, repairs=True)
        self.committed: list[int] = []
        self.retention = Retention(self.writer.store, self.manifest, budget)
        self.work = Work(self.queue, self.repairs, self.writer, self.retention, lambda: None)
        self.sink = Sink(
            self.writer,
            self.work,
            client,
            self.queue.feeds_key,
            name,
            lambda index, rows: self.committed.append(index),
        )

    def run(self) -> None:
        """A producer's life; its threads end with it."""
        try:
            produce(self.work, self.source, self.sink, self.stop)
        finally:
            self.writer.close()

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self.run, daemon=True)
        thread.start()
        return thread


def run_together(producers: Iterable[Producer]) -> None:
    """Start producers at the same moment and wait until all have ended well."""
    failures: list[BaseException] = []

    def run(producer: Producer) -> None:
        try:
            producer.run()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(producer,), daemon=True) for producer in producers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@contextmanager
def mended_by(
    bench: Bench, dataset: Dataset, source: Callable[[], CountingSource] | None = None
) -> Iterator[list[int]]:
    """Whenever a repair is asked for, a producer comes; gives what they made."""
    made: list[int] = []
    stop = threading.Event()

    def produce() -> None:
        while not stop.wait(0.01):
            if repairs_wanted(bench.client, bench.redis.prefix, dataset.url, dataset.manifest.digest):
                using = source() if source else CountingSource(dataset.manifest)
                place = (bench.client, bench.redis.prefix, dataset.url, "producer", using)
                Producer(*place, manifest=dataset.manifest).run()
                made.extend(using.made)

    producing = threading.Thread(target=produce, daemon=True)
    producing.start()
    try:
        yield made
    finally:
        stop.set()
        producing.join()
