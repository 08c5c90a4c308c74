"""Shuffled batches from a stored dataset, against gathering the same rows from memory.

Ours reads chunks from the page cache, checks size and crc32c of each, lays out windows and gathers
batches from them, reading ahead in the background. The limit has the rows in one tensor already and
knows the order: what is left is one gather per batch. Both cast to float32, as a training step does.
Beside them SAELens's loader of cached activations on as many rows, which it stores in float32: with its own
default buffer of 20 sequences, and once with as many sequences in its buffer as ours mixes.
With all of torch's threads and with one: the threads that read ahead want the same cores.
"""

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import WARM_UPS, Case, Work, take_turns
from benchmarks.peer import PYTHON, Peer
from penstock.store.arrays import BFLOAT16
from penstock.store.chunks import Chunk
from penstock.store.dataset import Dataset
from penstock.store.layout import FORMAT_VERSION
from penstock.store.manifest import CorpusPin, HookSpec, Manifest, Numerics, SourcePin
from penstock.store.objects import open_store
from penstock.store.order import ReadingOrder, batch_bounds
from penstock.store.writer import DatasetWriter

HOOK, D_IN = "synthetic", 768
CONTEXT, SEQUENCES = 256, 64
BATCH_ROWS, WINDOW_CHUNKS = 4096, 8
N_CHUNKS = 2 * WINDOW_CHUNKS
MIXED_SEQUENCES = WINDOW_CHUNKS * SEQUENCES


def run(quick: bool, device: torch.device) -> list[Case]:
    """A case per number of threads: a pass over several windows, the first one's reading included."""
    all_threads = torch.get_num_threads()
    cases = []
    with tempfile.TemporaryDirectory(prefix="penstock-benchmark-") as directory:
        dataset = _write_dataset(Path(directory))
        try:
            for threads in dict.fromkeys((all_threads, 1)):
                torch.set_num_threads(threads)
                cases.append(_compare(dataset, 1 if quick else 3, 2 if quick else 5, device))
        finally:
            torch.set_num_threads(all_threads)
    return cases


def _compare(dataset: Dataset, epochs: int, rounds: int, device: torch.device) -> Case:
    n_rows = dataset.manifest.total_rows * epochs
    waits = []

    def ours() -> None:
        started = time.perf_counter()
        seen = 0
        for batch in dataset.batches([HOOK], BATCH_ROWS, WINDOW_CHUNKS, epochs):
            if not seen:
                waits.append(time.perf_counter() - started)
            seen += len(batch[HOOK].to(device).float())
        if seen != n_rows:
            raise RuntimeError(f"{seen} rows came, not {n_rows}")

    resident = _window_tensor(dataset)
    batches = _row_batches(dataset, epochs, len(resident))

    def limit() -> None:
        for rows in batches:
            resident.index_select(0, rows).view(torch.bfloat16).to(device).float()

    contenders: dict[str, Work] = {"Dataset.batches": ours, "gather and cast from memory": limit}
    notes = []
    with ExitStack() as stack:
        if Peer.available():
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-benchmark-")))
            peer, alike = (
                stack.enter_context(_saelens(directory / str(n), n)) for n in (20, MIXED_SEQUENCES)
            )
            contenders["SAELens, cached activations"] = lambda: [peer.round() for _ in range(epochs)]
            notes.append(
                f"SAELens mixing {MIXED_SEQUENCES} sequences: {_rate(alike.round()):,.0f} rows/s, once"
            )
        else:
            notes.append(f"SAELens left out: `make interop` makes {PYTHON}")
        seconds = take_turns(contenders, rounds, device)
    notes.insert(0, f"first batch after {statistics.median(waits[WARM_UPS:]) * 1000:.0f} ms")
    return Case(
        "loader",
        f"{n_rows:,} rows of d_in {D_IN} in batches of {BATCH_ROWS:,}, cast to float32",
        "rows/s",
        n_rows,
        torch.get_num_threads(),
        seconds,
        notes,
    )


def _saelens(directory: Path, buffer_sequences: int) -> Peer:
    directory.mkdir()
    shape = (N_CHUNKS * SEQUENCES, CONTEXT, D_IN, BATCH_ROWS, buffer_sequences)
    return Peer("benchmarks.peers.saelens_loader", directory, *shape, torch.get_num_threads())


def _rate(seconds: float) -> float:
    return N_CHUNKS * SEQUENCES * CONTEXT / seconds


def _window_tensor(dataset: Dataset) -> Tensor:
    """[R·K, D] int16: the first window's rows."""
    parts = [dataset.read_chunk(index).acts[HOOK].view(np.int16) for index in range(WINDOW_CHUNKS)]
    return torch.from_numpy(np.concatenate(parts))


def _row_batches(dataset: Dataset, epochs: int, window_rows: int) -> list[Tensor]:
    """The rows of each batch, in the order in which the loader draws them."""
    order = ReadingOrder(dataset.sizes, epochs, WINDOW_CHUNKS, seed=0)
    batches = []
    for number in range(order.n_windows):
        rows = torch.from_numpy(order.row_order(order.window(number), window_rows))
        batches += [rows[start:stop] for start, stop in batch_bounds(window_rows, BATCH_ROWS)]
    return batches


def _write_dataset(directory: Path) -> Dataset:
    store = open_store(str(directory))
    manifest = _manifest()
    writer = DatasetWriter(store, manifest)
    generator = torch.Generator().manual_seed(0)
    rows = manifest.rows_per_chunk
    sequence, position = np.divmod(np.arange(rows), CONTEXT)
    for index in range(N_CHUNKS):
        acts = torch.randn(rows, D_IN, generator=generator).bfloat16()
        chunk = Chunk(
            index=index,
            acts={HOOK: acts.view(torch.int16).numpy().view(BFLOAT16)},
            tokens=np.zeros(rows, np.int32),
            sequence=sequence.astype(np.int64) + index * SEQUENCES,
            position=position.astype(np.int32),
        )
        writer.write(index, chunk)
    writer.close()
    return Dataset(store, manifest)


def _manifest() -> Manifest:
    rows = SEQUENCES * CONTEXT
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus=CorpusPin(
            digest="none",
            description="random numbers",
            first_sequence=0,
            n_sequences=N_CHUNKS * SEQUENCES,
            context=CONTEXT,
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
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            compute_dtype="float32",
            attention="none",
            capture="none",
            libraries="none",
            sequences_per_forward=SEQUENCES,
            allow_mixed=False,
        ),
        hooks=[HookSpec(name=HOOK, d_in=D_IN)],
        sequences_per_chunk=SEQUENCES,
        rows_per_chunk=rows,
        rows=[rows] * N_CHUNKS,
        seed=0,
        codec="bytes+crc32c",
        retention="keep",
    )
