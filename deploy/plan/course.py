"""From measured costs to the course of the whole: when what would be done on this machine."""

import tempfile
import uuid
from collections.abc import Callable

import torch

from penstock.deploy.plan.probe import Cost, Probe, evaluation_passes, probe, resource
from penstock.deploy.plan.resolved import Resolved, cores, local_path
from penstock.deploy.plan.time import CPU, Job, overlap
from penstock.store.objects import open_store
from penstock.trainer.config import RunConfig

BARE_SECONDS = 1.5
"""For a process to start, before it does anything of its own, and for its end to be noticed."""


def measure(what: Resolved, probe_store: bool, say: Callable[[str], None]) -> Probe:
    """Measure, with as many processors busy as the config's processes would use."""
    config = what.config
    trainer_threads = what.trainer_threads(all(run.strict for run in config.runs))
    makes = config.producers * what.model_threads if what.model.device.type == "cpu" else 0
    trains = what.trainers * trainer_threads if what.trainer_device.type == "cpu" else 0
    neighbours = max(0, min(cores(), makes + trains) - max(what.model_threads, trainer_threads))
    with tempfile.TemporaryDirectory(prefix="penstock-plan-") as directory:
        target = open_store(directory) if local_path(config.dataset.url) else None
        if probe_store:
            target = open_store(f"{config.dataset.url}/.probe-{uuid.uuid4().hex}")
        say("measuring for some seconds")
        try:
            return probe(
                what.manifest,
                what.corpus,
                what.model,
                config.runs,
                (what.trainer_device, config.trainer.threads),
                what.threads,
                neighbours,
                target,
            )
        finally:
            if probe_store and target is not None:
                for key, _ in list(target.list("")):
                    target.delete(key)


def course(
    what: Resolved, found: Probe, committed: int, share: float
) -> tuple[dict[str, float], dict[str, float], float]:
    """Seconds per phase, rows per second, and hours that producers take in all.

    Args:
        committed: chunks that are there already.
        share: of the corpus, how many times what was looked at it is.
    """
    config, processors = what.config, float(cores())
    rows = what.manifest.total_rows * (1 - committed / max(1, what.manifest.n_chunks))
    producing = [_producing(what, found, rows / config.producers) for _ in range(config.producers)]
    training = [_training(what, found, run) for run in what.runs.values()]
    capacity = {job.resource: 1.0 for job in (*producing, *training)} | {CPU: processors}
    done = overlap(producing, training if what.trainers else [], what.trainers, capacity)
    loads = what.loading_seconds * max(1.0, config.producers / processors) if producing else 0.0
    seconds = {
        "start and corpus": 2 * BARE_SECONDS + what.corpus_seconds * share,
        "loading the model": BARE_SECONDS + loads,
        "producing": done.produced,
        "training": done.trained,
        "reports": sum(_report(what, found, run) for run in what.runs.values()) if what.trainers else 0.0,
    }
    seconds["whole"] = sum(seconds.values()) - min(done.produced, done.trained)
    rates = {}
    if producing and rows:
        rates["a producer alone"] = rows / config.producers / max(1e-9, producing[0].seconds)
    for (name, run), job in zip(what.runs.items(), training, strict=True):
        rates[f"training of {name} alone"] = run.total_rows() / max(1e-9, job.seconds - what.base_seconds)
    return seconds, rates, _producing(what, found, what.manifest.total_rows).seconds / 3600


def _producing(what: Resolved, found: Probe, rows: float) -> Job:
    return _job(what.model.device, what.model_threads, found.forward, found.store or Cost(), rows)


def _training(what: Resolved, found: Probe, run: RunConfig) -> Job:
    name, settings = run.settings.name, run.settings
    threads = what.trainer_threads(settings.strict)
    job = _job(what.trainer_device, threads, found.steps[name], found.read, run.total_rows())
    heads = -(-len(run.windows) // settings.head_interval) * found.heads[name].wait
    return Job(
        seconds=job.seconds + heads + what.base_seconds,
        resource=job.resource,
        amount=job.amount,
        epochs=settings.epochs,
        window=min(1.0, settings.window_chunks / max(1, what.manifest.n_chunks)),
    )


def _report(what: Resolved, found: Probe, run: RunConfig) -> float:
    n = min(what.config.evaluation.sequences, what.corpus.manifest.n_held_out)
    passes = evaluation_passes(run.settings, n, min(16, n))
    cuda = what.model.device.type == "cuda"
    # an evaluation uses the whole machine
    per_pass = found.evaluation.wait if cuda else found.evaluation.work / cores()
    return BARE_SECONDS + what.loading_seconds + passes * per_pass


def _job(device: torch.device, threads: int, main: Cost, beside: Cost, rows: float) -> Job:
    """Work of a process whose other threads read or store meanwhile."""
    if device.type != "cpu":
        per_row = max(main.wait, beside.wait)
        return Job(rows * per_row, resource(device), main.wait / max(per_row, 1e-12))
    per_row = max(main.work / threads, beside.wait)
    return Job(rows * per_row, CPU, (main.work + beside.work) / max(per_row, 1e-12))
