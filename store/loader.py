"""Windows of rows, read ahead of their use.

A background thread waits for each position's chunk, reads and checks it, and lays the window's rows out
in one tensor per hook; the consumer gathers shuffled batches from it. At most one finished window waits
while another is used and a third is read.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from penstock.common import metrics
from penstock.common.errors import DamagedObject, DataError, ObjectMissing, UserError
from penstock.store.chunks import Chunk
from penstock.store.joined import JoinedDataset
from penstock.store.layout import POSITION, SEQUENCE, TOKENS
from penstock.store.order import ReadingOrder, Window, batch_bounds

READ_THREADS = 4
"""Chunks read at the same time."""


@dataclass(frozen=True)
class LoadedWindow:
    """A window's rows in position order: per hook [n_rows, d_in] bfloat16, on the CPU.

    `chunks` are the numbers of the chunks that they come from. `origins` holds [n_rows] `tokens`, `position`
    (both int32) and `sequence` (int64), if the reader was asked for them.
    """

    window: Window
    chunks: tuple[int, ...]
    acts: dict[str, Tensor]
    n_rows: int
    row_order: Tensor
    origins: dict[str, Tensor] = field(default_factory=dict)

    def batch(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows [start, stop) of the mixed window: {hook: [stop − start, d_in] bfloat16}, and origins."""
        rows = self.row_order[start:stop]
        batch = {}
        for hook, acts in self.acts.items():
            # 16-bit integers gather faster than bfloat16, and the bits are the same
            batch[hook] = acts.view(torch.int16).index_select(0, rows).view(torch.bfloat16)
        return batch | {name: values.index_select(0, rows) for name, values in self.origins.items()}

    def batches(self, batch_rows: int, device: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
        """Shuffled batches {hook: [≤ batch_rows, d_in] bfloat16} on `device`; no row is left out.

        Copies to CUDA are pinned and asynchronous, one batch ahead of the computation.
        """
        pin = torch.device(device).type == "cuda"
        ahead: dict[str, Tensor] | None = None
        for start, stop in batch_bounds(self.n_rows, batch_rows):
            batch = self.batch(start, stop)
            if pin:
                batch = {k: v.pin_memory().to(device, non_blocking=True) for k, v in batch.items()}
            if ahead is not None:
                yield ahead
            ahead = batch
        if ahead is not None:
            yield ahead


class ChunkSupply(Protocol):
    """What a reader asks for chunks that are not there, or not whole. Both may block.

    They must return or raise soon after the reader is told to stop.
    """

    def await_chunk(self, position: int, chunk: int) -> None:
        """Return once the chunk that stands at a position is committed."""
        ...

    def mend(self, chunk: int, error: DataError) -> None:
        """Return when a chunk that could not be read is worth another try, or is quarantined.

        Raises:
            DataError: nobody can make it again.
        """
        ...


class ChunkReader(Protocol):
    """What a reader needs of a dataset, or of several read as one."""

    def d_in(self, hook_name: str) -> int: ...
    def read_chunk(self, chunk: int, /, hooks: Sequence[str] | None = None) -> Chunk: ...
    def quarantined(self) -> set[int]: ...


class AsStored:
    """A supply for datasets that nobody writes or mends: what cannot be read is an error."""

    def await_chunk(self, position: int, chunk: int) -> None:
        pass

    def mend(self, chunk: int, error: DataError) -> None:
        raise error


class WindowReader:
    """Reads the chunks of windows, checked, and lays their rows out."""

    def __init__(
        self,
        dataset: ChunkReader,
        hooks: Sequence[str],
        order: ReadingOrder,
        supply: ChunkSupply,
        with_origins: bool = False,
    ) -> None:
        self.order = order
        self.supply = supply
        self._dataset = dataset
        self._hooks = list(dict.fromkeys(hooks))
        self._with_origins = with_origins

    def quarantined(self) -> set[int]:
        """Chunks to be left out, asked once per window."""
        return self._dataset.quarantined()

    def read(self, chunk: int) -> Chunk | None:
        """A chunk, mended if need be; None if it is quarantined.

        Raises:
            DataError: it cannot be read, and nobody can make it again.
        """
        while True:
            try:
                return self._try(chunk)
            except DataError as error:
                if chunk in self._dataset.quarantined():
                    return None
                self.supply.mend(chunk, error)

    def lay_out(self, window: Window, chunks: Iterable[Chunk | None]) -> LoadedWindow:
        """The window's rows in position order."""
        there = [chunk for chunk in chunks if chunk is not None]
        n_rows = sum(chunk.rows for chunk in there)
        acts = {hook: self._concatenate(hook, there) for hook in self._hooks}
        order = torch.from_numpy(self.order.row_order(window, n_rows))
        origins = _origins(there) if self._with_origins else {}
        return LoadedWindow(window, tuple(chunk.index for chunk in there), acts, n_rows, order, origins)

    def _try(self, chunk: int) -> Chunk:
        with metrics.chunk_read_seconds.time():
            try:
                return self._dataset.read_chunk(chunk, self._hooks)
            except (DamagedObject, ObjectMissing):
                metrics.chunk_corrupt.inc()
                # once more: the fault may lie in the transfer and not in what is stored
                return self._dataset.read_chunk(chunk, self._hooks)

    def _concatenate(self, hook: str, chunks: Sequence[Chunk]) -> Tensor:
        rows = sum(chunk.rows for chunk in chunks)
        out = torch.empty((rows, self._dataset.d_in(hook)), dtype=torch.bfloat16)
        plain = out.view(torch.int16).numpy()
        at = 0
        for chunk in chunks:
            plain[at : at + chunk.rows] = chunk.acts[hook].view(np.int16)
            at += chunk.rows
        return out


def _origins(chunks: Sequence[Chunk]) -> dict[str, Tensor]:
    """Where the rows of some chunks came from."""
    found: dict[str, Tensor] = {}
    for name, dtype in ((TOKENS, np.int32), (SEQUENCE, np.int64), (POSITION, np.int32)):
        parts = [getattr(chunk, name) for chunk in chunks]
        found[name] = torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]))
    return found


class WindowLoader:
    """Reads windows in the order of a run, in the background."""

    def __init__(self, reader: WindowReader, first_window: int) -> None:
        self._reader = reader
        self.stop = threading.Event()
        self._ready: queue.Queue[LoadedWindow | BaseException] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._run, args=(first_window,), name="loader", daemon=True)
        self._thread.start()

    def get(self, timeout: float) -> LoadedWindow | None:
        """The next window, or None if it is not there within `timeout` seconds.

        Raises whatever stopped the reading.
        """
        try:
            item = self._ready.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def wait(self) -> LoadedWindow:
        """The next window, however long that takes. Raises whatever stopped the reading."""
        while True:
            loaded = self.get(timeout=1.0)
            if loaded is not None:
                return loaded

    def close(self) -> None:
        self.stop.set()
        self._thread.join()

    def _run(self, first_window: int) -> None:
        try:
            with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read") as pool:
                order = self._reader.order
                for number in range(first_window, order.n_windows):
                    if self.stop.is_set():
                        return
                    self._offer(self._load(pool, order.window(number)))
        except BaseException as error:  # handed to the consumer, who raises it
            self._offer(error)

    def _offer(self, item: LoadedWindow | BaseException) -> None:
        while not self.stop.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _load(self, pool: ThreadPoolExecutor, window: Window) -> LoadedWindow:
        reader = self._reader
        pending = []
        skipped = reader.quarantined()
        for position in range(window.start, window.stop):
            chunk = reader.order.chunk_at(position)
            if chunk not in skipped:
                reader.supply.await_chunk(position, chunk)
                pending.append(pool.submit(reader.read, chunk))
        return reader.lay_out(window, [future.result() for future in pending])


class Batches:
    """An iterator over a dataset's shuffled batches. Reading begins with the first one; closing stops it."""

    def __init__(self, start: Callable[[], WindowLoader], n_windows: int, batch_rows: int) -> None:
        self._iterator = self._iterate(start, n_windows, batch_rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        return next(self._iterator)

    def close(self) -> None:
        self._iterator.close()

    def _iterate(
        self, start: Callable[[], WindowLoader], n_windows: int, batch_rows: int
    ) -> Generator[dict[str, Tensor], None, None]:
        loader = start()
        try:
            for _ in range(n_windows):
                yield from loader.wait().batches(batch_rows)
        finally:
            loader.close()


def dataset_batches(
    dataset: JoinedDataset,
    hooks: Sequence[str],
    batch_rows: int,
    window_chunks: int | None,
    epochs: int,
    seed: int,
) -> Batches:
    """See `Dataset.batches`."""
    for hook in hooks:
        dataset.d_in(hook)
    refuse_passing(dataset)
    if window_chunks is None:
        window_chunks = dataset.default_window(hooks)
    order = ReadingOrder(dataset.sizes, epochs, window_chunks, seed)

    def start() -> WindowLoader:
        return WindowLoader(WindowReader(dataset, hooks, order, AsStored()), 0)

    return Batches(start, order.n_windows, batch_rows)


def refuse_passing(dataset: JoinedDataset) -> None:
    """Refuse a dataset whose chunks are deleted once its runs have read them."""
    if dataset.keeps_window:
        raise UserError(f"{dataset.url} keeps only a window of its chunks: read it with a run")
