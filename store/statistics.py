"""What the rows of a dataset look like: moments from all commits, the rest from a sample of chunks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.store.commits import Commit
from penstock.store.dataset import Dataset

SAMPLED_CHUNKS = 8
BINS = 24


@dataclass(frozen=True)
class HookStatistics:
    """Rows x of one hook point.

    Attributes:
        mean_norm, max_abs: mean ‖x‖ and largest |x_d|, over all committed chunks.
        rms: root of the mean square of a value, over all committed chunks.
        dead: dimensions that are 0 in every sampled row.
        constant: dimensions with one other value in every sampled row.
        edges, counts: histogram of ‖x‖ over the sampled rows, [BINS + 1] and [BINS].
    """

    name: str
    d_in: int
    mean_norm: float
    rms: float
    max_abs: float
    dead: int
    constant: int
    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Statistics:
    """`rows` of `chunks` committed chunks, of which `sampled_rows` were looked at one by one.

    `first` is the lowest index of a committed chunk.
    """

    chunks: int
    first: int
    rows: int
    stored_bytes: int
    sampled_rows: int
    hooks: list[HookStatistics]


def measure_statistics(dataset: Dataset) -> Statistics:
    """Read every commit, and up to SAMPLED_CHUNKS evenly spaced chunks.

    Raises:
        DataError: a commit or a sampled chunk is missing or damaged.
    """
    committed = sorted(dataset.committed() - dataset.quarantined())
    commits = [dataset.commit(index) for index in committed]
    # with retention: window only the chunks that are not deleted yet could be read
    sample = _evenly(committed, SAMPLED_CHUNKS) if dataset.manifest.retention == "keep" else []
    return Statistics(
        chunks=len(commits),
        first=min(committed, default=0),
        rows=sum(commit.rows for commit in commits),
        stored_bytes=sum(stored.size for commit in commits for stored in commit.objects.values()),
        sampled_rows=sum(commit.rows for commit in commits if commit.index in set(sample)),
        hooks=[
            _measure_hook(dataset, commits, sample, hook.name, hook.d_in) for hook in dataset.manifest.hooks
        ],
    )


def _evenly(indices: Sequence[int], most: int) -> list[int]:
    n = min(len(indices), most)
    return [indices[i * len(indices) // n] for i in range(n)]


def _measure_hook(
    dataset: Dataset, commits: Sequence[Commit], sample: Sequence[int], hook: str, d_in: int
) -> HookStatistics:
    rows = max(1, sum(commit.rows for commit in commits))
    lowest, highest = np.full(d_in, np.inf, np.float32), np.full(d_in, -np.inf, np.float32)
    norms = [np.zeros(0)]
    for index in sample:
        acts = dataset.read_chunk(index, [hook]).acts[hook].astype(np.float32)
        lowest = np.minimum(lowest, acts.min(axis=0, initial=np.inf))
        highest = np.maximum(highest, acts.max(axis=0, initial=-np.inf))
        norms.append(np.sqrt(np.einsum("rd,rd->r", acts, acts, dtype=np.float64)))
    together = np.concatenate(norms)
    top = float(together.max(initial=0.0))
    edges = np.linspace(0.0, top or 1.0, BINS + 1)
    counts = np.histogram(together, edges)[0].astype(np.int64)
    moments = [(commit.rows, commit.moments[hook]) for commit in commits]
    return HookStatistics(
        name=hook,
        d_in=d_in,
        mean_norm=sum(n * m.mean_norm for n, m in moments) / rows,
        rms=(sum(n * m.mean_squared_norm for n, m in moments) / rows / d_in) ** 0.5,
        max_abs=max((m.max_abs for _, m in moments), default=0.0),
        dead=int(((lowest == 0) & (highest == 0)).sum()),
        constant=int(((lowest == highest) & (lowest != 0)).sum()),
        edges=edges,
        counts=counts,
    )
