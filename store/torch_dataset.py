"""A dataset as a `torch.utils.data.IterableDataset`: one global order, whoever takes part in reading it.

The global order of batches is that of a training run with the same settings. Rank r of W gets the batches
whose number is r modulo W. Worker w of n gets every n-th of its rank's, which a DataLoader takes from its
workers in turn, and so puts into order again. Every rank and worker therefore reads every window: the rows of
one batch come from all chunks of its window.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from penstock.common.errors import DamagedObject, DataError, UserError
from penstock.store.chunks import Chunk
from penstock.store.dataset import Dataset
from penstock.store.joined import JoinedDataset
from penstock.store.loader import AsStored, WindowLoader, WindowReader, refuse_passing
from penstock.store.local import LocalStore
from penstock.store.resume import (
    BatchPlan,
    Part,
    PinnedOrder,
    ReadingState,
    from_ranges,
    pin_chunks,
    to_ranges,
)


class TorchBatches(IterableDataset[dict[str, Tensor]]):
    """Shuffled batches {hook: [≤ batch_rows, d_in] bfloat16}; see `Dataset.as_torch`.

    An iteration begins at the start point: the first batch, or where `load_state_dict` put it. `len` is the
    number of batches that an iteration of this rank gives.
    """

    def __init__(
        self,
        dataset: Dataset,
        hooks: Sequence[str],
        batch_rows: int = 4096,
        window_chunks: int | None = None,
        epochs: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        with_tokens: bool = False,
        partial: bool = False,
    ) -> None:
        data = JoinedDataset([dataset])
        if window_chunks is None:
            window_chunks = data.default_window(hooks)
        sizes = {"batch_rows": batch_rows, "window_chunks": window_chunks, "epochs": epochs}
        for name, value in (sizes | {"world_size": world_size}).items():
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise UserError(f"rank is {rank}; with world_size {world_size} it must be 0 to {world_size - 1}")
        for hook in hooks:
            dataset.manifest.d_in(hook)
        refuse_passing(data)
        self._dataset = dataset
        self._hooks = list(hooks)
        self._batch_rows = batch_rows
        self._window_chunks = window_chunks
        self._epochs = epochs
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._with_tokens = with_tokens
        self._digest = dataset.manifest.digest
        self._start = self._next = 0
        self._taken = 0
        self._iteration: object = None
        self._pid = os.getpid()
        self._pin(*pin_chunks(dataset, partial))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self._pid != os.getpid() and not isinstance(self._dataset.store, LocalStore):
            raise UserError(
                f"{self._dataset.url} cannot be read in a forked process; give the DataLoader "
                'multiprocessing_context="spawn" or "forkserver"'
            )
        self._taken = 0
        self._iteration = object()
        return self._iterate(self._numbers(), self._iteration)

    def __len__(self) -> int:
        return len(range(self._first_of_rank(), self._plan.n_batches, self._world_size))

    def state_dict(self) -> dict[str, Any]:
        """How far the newest iteration in this process is: a batch counts as done once it is handed out.

        The batches done by all ranks together, if each has taken as many as this one. The result consists of
        JSON's types. Batches that DataLoader workers hand out are not seen by the object in the main process:
        there, count them and use `state_after`, or use torchdata's StatefulDataLoader.
        """
        if get_worker_info() is None:
            return self.state_after(self._taken)
        numbers = self._numbers()
        following = numbers[self._taken] if self._taken < len(numbers) else self._plan.n_batches
        return self._state(following, self._part()).model_dump()

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state once this rank, and every other one, has taken some batches since the start point.

        Raises:
            UserError: there are not so many.
        """
        if not 0 <= batches <= len(self):
            raise UserError(
                f"{batches} batches were not taken: this rank has {len(self)} from its start point"
            )
        done = min(self._start + batches * self._world_size, self._plan.n_batches)
        return self._state(done).model_dump()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let iterations begin where a state says, with any number of ranks and workers.

        The chunks are those of the state, whatever was committed or quarantined since.

        Raises:
            UserError: the state is that of another dataset or order; nothing was changed.
        """
        told = ReadingState.parse(state)
        own = self._state(0)
        for name in ("digest", "seed", "batch_rows", "window_chunks"):
            there, here = getattr(told, name), getattr(own, name)
            if there != here:
                what = "the dataset's digest" if name == "digest" else name
                raise UserError(f"the state is of another order: {what} is {there} in it and {here} here")
        part = told.part
        if part is not None and part != self._part(part.start):
            raise UserError(
                f"the state is that of DataLoader worker {part.worker} of {part.workers} of rank {part.rank} "
                f"of {part.world_size}, and of no use to another; take the state from state_after instead"
            )
        n_chunks = self._dataset.n_chunks
        chunks, left_out = from_ranges(told.chunks, n_chunks), from_ranges(told.left_out, n_chunks)
        order, plan = self._plan_for(chunks, frozenset(left_out))
        if told.batches > plan.n_batches:
            raise UserError(
                f"the state is {told.batches} batches far, and {self._epochs} epochs have {plan.n_batches}"
            )
        self._chunks, self._left_out = chunks, frozenset(left_out)
        self._order, self._plan = order, plan
        self._start = told.batches if part is None else part.start
        self._next = told.batches
        self._taken = 0
        self._iteration = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pid = os.getpid()

    def _pin(self, chunks: tuple[int, ...], left_out: frozenset[int]) -> None:
        self._chunks, self._left_out = chunks, left_out
        self._order, self._plan = self._plan_for(chunks, left_out)

    def _plan_for(self, chunks: tuple[int, ...], left_out: frozenset[int]) -> tuple[PinnedOrder, BatchPlan]:
        order = PinnedOrder((len(chunks),), self._epochs, self._window_chunks, self._seed, chunks)
        return order, BatchPlan(order, self._dataset.manifest.rows, left_out, self._batch_rows)

    def _state(self, batches: int, part: Part | None = None) -> ReadingState:
        return ReadingState(
            digest=self._digest,
            seed=self._seed,
            batch_rows=self._batch_rows,
            window_chunks=self._window_chunks,
            chunks=to_ranges(self._chunks),
            left_out=to_ranges(self._left_out),
            batches=batches,
            part=part,
        )

    def _part(self, start: int | None = None) -> Part | None:
        """The DataLoader worker that this process is, if it is one."""
        info = get_worker_info()
        if info is None:
            return None
        return Part(
            rank=self._rank,
            world_size=self._world_size,
            worker=info.id,
            workers=info.num_workers,
            start=self._start if start is None else start,
        )

    def _first_of_rank(self) -> int:
        return self._start + (self._rank - self._start) % self._world_size

    def _numbers(self) -> range:
        """Global numbers of the batches that an iteration in this process gives."""
        part = self._part()
        worker, workers = (0, 1) if part is None else (part.worker, part.workers)
        step = self._world_size * workers
        first = self._first_of_rank() + self._world_size * worker
        passed = max(0, -(-(self._next - first) // step))
        return range(first + passed * step, self._plan.n_batches, step)

    def _iterate(self, numbers: range, iteration: object) -> Generator[dict[str, Tensor], None, None]:
        if not numbers:
            return
        plan, at = self._plan, 0
        first, last = plan.window_of(numbers[0]), plan.window_of(numbers[-1])
        reader = _PinnedReader(self._dataset, self._hooks, self._order, self._left_out, self._with_tokens)
        loader = WindowLoader(reader, first)
        try:
            for window in range(first, last + 1):
                loaded, bounds = loader.wait(), plan.bounds(window)
                while at < len(numbers) and numbers[at] < plan.edges[window + 1]:
                    batch = loaded.batch(*bounds[numbers[at] - int(plan.edges[window])])
                    at += 1
                    if self._iteration is iteration:
                        self._taken = at
                    yield batch
        finally:
            loader.close()


class _PinnedReader(WindowReader):
    """Leaves out what was quarantined when the order was fixed, and nothing else."""

    def __init__(
        self,
        dataset: Dataset,
        hooks: Sequence[str],
        order: PinnedOrder,
        left_out: frozenset[int],
        with_origins: bool,
    ) -> None:
        super().__init__(dataset, hooks, order, AsStored(), with_origins)
        self._whole = dataset
        self._left_out = left_out

    def quarantined(self) -> set[int]:
        return set(self._left_out)

    def read(self, index: int) -> Chunk:
        chunk = super().read(index)
        url, planned = self._whole.url, self._whole.manifest.rows[index]
        if chunk is None:
            raise DataError(
                f"{url}: chunk {index} was quarantined after the order of this reading was fixed; "
                "begin another one, without the state"
            )
        if chunk.rows != planned:
            raise DamagedObject(f"{url}: chunk {index} has {chunk.rows} rows, not the {planned} planned")
        return chunk
