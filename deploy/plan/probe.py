"""A short measurement of everything that a config will do, on real tokens, in a temporary directory.

What runs on a CPU is measured in processor seconds, all threads together, so that other programs distort it
little; but processors that share caches and memory slow each other down, so those that the config's processes
would use are kept busy meanwhile. What runs on a GPU is measured in seconds. Features that die in the course
of a training, for which TopK has more to do, are not foreseen.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from penstock.common.memory import peak_bytes, reset_peak
from penstock.common.model.language_model import LanguageModel
from penstock.deploy.plan.time import CPU
from penstock.producer.source import LanguageModelSource
from penstock.store.arrays import dataset_arrays
from penstock.store.chunks import Chunk
from penstock.store.corpus import Corpus
from penstock.store.dataset import Dataset
from penstock.store.joined import JoinedDataset
from penstock.store.layout import ACTS, ARRAYS
from penstock.store.loader import AsStored, WindowReader
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore, open_store
from penstock.store.writer import DatasetWriter
from penstock.trainer.config import RunSettings, resolve_run
from penstock.trainer.evaluate import evaluate, held_out_text
from penstock.trainer.group import Group

FORWARD_SECONDS, STEP_SECONDS = 3.0, 2.0
"""How long about the model and each run are measured."""
WARM_UP_STEPS, STEPS, ROUNDS = 2, 4, 5
EVALUATED = 4
"""Held-out sequences for which an evaluation is measured."""

_BUSY = """
import os, time, numpy
parent, a = os.getppid(), numpy.ones((512, 512), numpy.float32)
end = time.monotonic() + 300
while os.getppid() == parent and time.monotonic() < end:
    a @ a
"""


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes: `work` seconds of a processor or a GPU, and at least `wait` seconds."""

    work: float = 0.0
    wait: float = 0.0


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes:
        rows: in the measured chunk.
        forward, store, read: per row. `store` is None if it was not measured.
        steps: per run, per row, all of its SAEs together.
        heads: per run, of one checkpoint.
        evaluation: of one held-out sequence, per forward pass.
        ratios: per hook, stored bytes for each byte of a row.
        host_bytes: the most memory that this process had until the model had run.
        model_device_bytes: the most that the model needed on its GPU.
    """

    rows: int
    forward: Cost
    store: Cost | None
    read: Cost
    steps: dict[str, Cost]
    heads: dict[str, Cost]
    evaluation: Cost
    ratios: dict[str, float]
    host_bytes: int
    model_device_bytes: int


def probe(
    manifest: Manifest,
    corpus: Corpus,
    model: LanguageModel,
    runs: Sequence[RunSettings],
    trainer: tuple[torch.device, int | None],
    threads: int,
    neighbours: int,
    target: ObjectStore | None,
) -> Probe:
    """Measure; takes some seconds per run.

    Args:
        corpus: the tokens; not necessarily all of them.
        trainer: device and CPU threads of a trainer.
        threads: objects stored at a time.
        neighbours: processors to be kept busy.
        target: where to store; None does not measure storing.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-plan-") as directory, _busy(neighbours):
        reset_peak()
        part, forward, chunk = _produce(manifest, corpus, model)
        cuda = model.device.type == "cuda"
        on_device = torch.cuda.max_memory_allocated(model.device) if cuda else 0
        host = peak_bytes()
        here = open_store(directory)
        stored = _store(part, chunk, here if target is None else target, threads)
        if target is not None and target.url != here.url:
            _store(part, chunk, here, threads)
        dataset = Dataset(here, part)
        read = measured(lambda: dataset.read_chunk(0), None, part.total_rows)
        trained = {run.name: _train(run, dataset, *trainer) for run in runs}
        groups = [group for _, _, group in trained.values()]
        return Probe(
            rows=part.total_rows,
            forward=forward,
            store=stored if target is not None else None,
            read=read,
            steps={name: step for name, (step, _, _) in trained.items()},
            heads={name: head for name, (_, head, _) in trained.items()},
            evaluation=_evaluate(corpus, model, groups[0]) if groups else Cost(),
            ratios=_ratios(here, part),
            host_bytes=host,
            model_device_bytes=on_device,
        )


def measured(work: Callable[[], object], device: torch.device | None, per: int) -> Cost:
    """The cost of some work on a device, None being a CPU, for each of `per` parts of it."""
    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Cost(wall / per if cuda else processor / per, wall / per)


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _BUSY]
    children = [subprocess.Popen(command, env=environment) for _ in range(processes)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def _produce(manifest: Manifest, corpus: Corpus, model: LanguageModel) -> tuple[Manifest, Cost, Chunk]:
    """A chunk, or as much of one as can be made in a short time: its plan, what it cost, its rows."""
    per_forward = manifest.numerics.sequences_per_forward
    most = min(manifest.sequences_per_chunk, corpus.manifest.n_sequences)
    first = _part(manifest, corpus, min(per_forward, most))
    LanguageModelSource(first, corpus, model).chunk(0)
    started = time.perf_counter()
    LanguageModelSource(first, corpus, model).chunk(0)
    once = time.perf_counter() - started
    n = first.sequences_per_chunk * max(1, int(FORWARD_SECONDS / max(once, 1e-6)))
    part = _part(manifest, corpus, min(n, most))
    made: list[Chunk] = []
    source = LanguageModelSource(part, corpus, model)
    cost = measured(lambda: made.append(source.chunk(0)), model.device, part.total_rows)
    return part, cost, made[0]


def _part(manifest: Manifest, corpus: Corpus, sequences: int) -> Manifest:
    """A dataset of one chunk of the first sequences."""
    kept = sequences * manifest.context
    if manifest.source.drop_special:
        kept -= int(corpus.special_counts(0, sequences).sum())
    return manifest.model_copy(
        update={
            "corpus": manifest.corpus.model_copy(update={"n_sequences": sequences}),
            "sequences_per_chunk": sequences,
            "rows_per_chunk": manifest.rows_per_chunk // manifest.sequences_per_chunk * sequences,
            "rows": [kept],
            "retention": "keep",
        }
    )


def _store(part: Manifest, chunk: Chunk, store: ObjectStore, threads: int) -> Cost:
    writer = DatasetWriter(store, part, ThreadPoolExecutor(threads))
    try:
        return measured(lambda: writer.write(0, chunk), None, part.total_rows)
    finally:
        writer.close()


def _ratios(store: ObjectStore, part: Manifest) -> dict[str, float]:
    sizes = dict(store.list(f"{ARRAYS}/"))
    found = {}
    for spec in dataset_arrays(part):
        if spec.path.startswith(ACTS):
            # of the used rows: the unused ones compress to nothing
            raw = part.total_rows * spec.dtype.itemsize * spec.shape[1]
            plain = spec.codec == "bytes+crc32c"
            found[spec.path.removeprefix(ACTS)] = 1.0 if plain else (sizes[spec.key(ARRAYS, 0)] - 4) / raw
    return found


def _train(
    settings: RunSettings, dataset: Dataset, device: torch.device, threads: int | None
) -> tuple[Cost, Cost, Group]:
    """Steps of all SAEs of a run on the probe's rows, over and over: per row; a checkpoint; the SAEs."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1 if settings.strict else threads or os.cpu_count() or 1)
    try:
        config = resolve_run(
            settings.model_copy(update={"window_chunks": 1, "epochs": 1}), JoinedDataset([dataset])
        )
        group = Group(config, device)
        reader = WindowReader(dataset, config.hooks, config.order, AsStored())
        loaded = reader.lay_out(config.order.window(0), [reader.read(0)])
        group.begin_window(loaded)

        def steps(n: int) -> None:
            order = torch.arange(n * settings.batch_rows) % loaded.n_rows
            batches = replace(loaded, n_rows=len(order), row_order=loaded.row_order[order])
            for batch in batches.batches(settings.batch_rows, device):
                group.train_step(batch)

        steps(WARM_UP_STEPS)
        started, costs = time.perf_counter(), list[Cost]()
        while not costs or (len(costs) < ROUNDS and time.perf_counter() - started < STEP_SECONDS):
            costs.append(measured(lambda: steps(STEPS), device, STEPS * settings.batch_rows))
        step = min(costs, key=lambda cost: cost.work)
        return step, measured(lambda: _checkpoint(group, dataset.store), None, 1), group
    finally:
        torch.set_num_threads(before)


def _checkpoint(group: Group, store: ObjectStore) -> None:
    for data in group.checkpoint().values():
        hashlib.sha256(data).hexdigest()
        store.put("checkpoint", data)


def _evaluate(corpus: Corpus, model: LanguageModel, group: Group) -> Cost:
    """One held-out sequence in one of an evaluation's forward passes, with what SAEs do there."""
    if not corpus.manifest.n_held_out:
        return Cost()
    text = held_out_text(corpus, EVALUATED)
    saes = {name: member.sae for name, member in group.members.items()}
    passes = evaluation_passes(group.config.settings, len(text), len(text))
    return measured(lambda: evaluate(model, text, saes), model.device, passes)


def evaluation_passes(run: RunSettings, sequences: int, in_controls: int) -> int:
    """Forward passes of single sequences in an evaluation: clean, zeros, SAEs, controls."""
    hooks = len({sae.hooks[-1] for sae in run.saes})
    return sequences * (1 + hooks + len(run.saes)) + 3 * in_controls


def resource(device: torch.device) -> str:
    """What a device is called among the resources that processes share."""
    return CPU if device.type == "cpu" else f"{device.type}:{device.index or 0}"
