"""Several datasets read as one. A run over one dataset is the case of a single part.

Chunks are numbered through: those of the first dataset, then those of the second, and so on. Everything that
a reader asks for by number is asked of the dataset that holds the chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

from penstock.common.errors import UserError
from penstock.store.chunks import Chunk
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.layout import commit_key
from penstock.store.manifest import Manifest
from penstock.store.order import first_chunk, locate

if TYPE_CHECKING:
    from penstock.store.loader import Batches

WINDOW_BYTES = 2**30
"""A window whose size nobody chose holds as many chunks as fit into this. A reader holds up to three."""

_SHARED: dict[str, Callable[[Manifest], str]] = {
    "the model weights": lambda manifest: manifest.source.weights_sha256,
    "the tokenizer": lambda manifest: manifest.corpus.tokenizer_sha256,
    "the held-out rule": lambda manifest: manifest.corpus.held_out_rule,
}
"""What datasets read as one must have in common, besides the hook points that are read."""


class JoinedDataset:
    """Read access to one dataset or several as one. Needs neither Redis nor a language model.

    Attributes:
        parts: the datasets, in the order in which their chunks are numbered.

    Raises:
        UserError: they do not go together; the message names the two that do not.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = tuple(parts)
        if not parts:
            raise UserError("datasets: give at least one dataset")
        for one, other in combinations(parts, 2):
            _check_pair(one, other)
        for part in parts:
            if len(parts) > 1 and part.manifest.retention != "keep":
                raise UserError(
                    f"datasets: {part.url} keeps only a window of its chunks (retention: window), so it can "
                    "only be read alone; list datasets with retention: keep"
                )

    @property
    def url(self) -> str:
        """The URLs of all parts, for messages."""
        return ", ".join(part.url for part in self.parts)

    @property
    def keeps_window(self) -> bool:
        """Whether chunks are deleted once they are read: a single part's `retention: window`."""
        return any(part.manifest.retention == "window" for part in self.parts)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Planned chunks of each part."""
        return tuple(part.n_chunks for part in self.parts)

    @property
    def n_chunks(self) -> int:
        """Planned chunks of all parts."""
        return sum(self.sizes)

    def d_in(self, hook_name: str) -> int:
        """Width of a hook point.

        Raises:
            UserError: a part does not hold it, or they hold it in different widths.
        """
        first, width = self.parts[0], self.parts[0].d_in(hook_name)
        for part in self.parts[1:]:
            if part.d_in(hook_name) != width:
                raise UserError(
                    f"datasets: {hook_name} has d_in {width} in {first.url} and {part.d_in(hook_name)} in "
                    f"{part.url}: they cannot be read as one"
                )
        return width

    def default_window(self, hooks: Sequence[str]) -> int:
        """Chunks of the average size whose rows at some hook points fill `WINDOW_BYTES`; at least one.

        Raises:
            UserError: as `d_in`.
        """
        rows = sum(part.manifest.total_rows for part in self.parts)
        held = rows * sum(2 * self.d_in(hook) for hook in set(hooks))
        return max(1, min(self.n_chunks, WINDOW_BYTES * self.n_chunks // max(1, held)))

    def locate(self, chunk: int) -> tuple[Dataset, int]:
        """The dataset that holds a chunk, and the chunk's index in it."""
        part, index = locate(self.sizes, chunk)
        return self.parts[part], index

    def part_of(self, chunk: int) -> int:
        """Which of `parts` holds a chunk."""
        return locate(self.sizes, chunk)[0]

    def name_of(self, chunk: int) -> str:
        """What to call a chunk in messages."""
        return chunk_name([part.url for part in self.parts], self.sizes, chunk)

    def read_chunk(self, chunk: int, hooks: Sequence[str] | None = None) -> Chunk:
        """As `Dataset.read_chunk`; the chunk that is returned carries its number among all parts."""
        dataset, index = self.locate(chunk)
        return replace(dataset.read_chunk(index, hooks), index=chunk)

    def is_committed(self, chunk: int) -> bool:
        """Whether a chunk is there, asked of the store now."""
        dataset, index = self.locate(chunk)
        return dataset.store.exists(commit_key(index))

    def committed(self) -> set[int]:
        """Numbers of the chunks that listings show as committed."""
        return {first_chunk(self.sizes, n) + i for n, part in enumerate(self.parts) for i in part.committed()}

    def quarantined(self) -> set[int]:
        """Numbers of the chunks that no producer could make again as committed: readers skip them."""
        return {
            first_chunk(self.sizes, n) + i for n, part in enumerate(self.parts) for i in part.quarantined()
        }

    def batches(
        self,
        hooks: Sequence[str],
        batch_rows: int = 4096,
        window_chunks: int | None = None,
        epochs: int = 1,
        seed: int = 0,
    ) -> "Batches":
        """Shuffled torch batches of all chunks of all parts; see `Dataset.batches`."""
        from penstock.store.loader import dataset_batches

        return dataset_batches(self, hooks, batch_rows, window_chunks, epochs, seed)


def open_datasets(urls: Sequence[str]) -> JoinedDataset:
    """Open datasets read-only, to be read as one.

    Raises:
        ObjectMissing: one of them is not there.
        DamagedObject: a manifest is damaged.
        UserError: they do not go together, or one is of a newer format.
    """
    return JoinedDataset([open_dataset(url) for url in urls])


def chunk_name(urls: Sequence[str], sizes: Sequence[int], chunk: int) -> str:
    """What to call a chunk in messages: by its index, and by its dataset where there are several."""
    part, index = locate(sizes, chunk)
    return f"chunk {index}" if len(urls) == 1 else f"chunk {index} of {urls[part]}"


def _check_pair(one: Dataset, other: Dataset) -> None:
    if one.manifest.digest == other.manifest.digest:
        raise UserError(f"datasets: {one.url} and {other.url} hold the same rows; list it once")
    for what, of in _SHARED.items():
        if of(one.manifest) != of(other.manifest):
            raise UserError(
                f"datasets: {what} of {one.url} and of {other.url} differ: they cannot be read as one"
            )
    first, second = one.manifest.corpus, other.manifest.corpus
    start = max(first.first_sequence, second.first_sequence)
    stop = min(first.end, second.end)
    if first.digest == second.digest and start < stop:
        raise UserError(
            f"datasets: {one.url} and {other.url} both hold sequences {start} to {stop - 1} of one corpus; "
            "make the later one with dataset.after"
        )
