"""Whether a plan fits: memory of each kind of process, memory of this machine and its GPUs, disks."""

import shutil
from pathlib import Path

import torch

from penstock.common.errors import ConfigError, StoreError
from penstock.common.memory import free_bytes, held_bytes
from penstock.deploy.plan.probe import Probe, resource
from penstock.deploy.plan.record import Plan
from penstock.deploy.plan.resolved import Resolved, local_path
from penstock.deploy.plan.sizes import stored_size, weight_bytes
from penstock.deploy.plan.time import CPU
from penstock.producer.memory import KEPT, bytes_held
from penstock.store.objects import open_store
from penstock.trainer.config import RunConfig

SERVER_BYTES = 50_000_000
"""An embedded Valkey server."""
WINDOWS_HELD = 5
"""Windows of rows in a trainer: one in use, one waiting, one being laid out from its chunks, which are as
large again, and as much of the one before as the allocator has kept."""
DEVICE_BYTES = 500_000_000
"""What CUDA itself needs of a GPU, per process."""


def fit(what: Resolved, plan: Plan, found: Probe | None) -> None:
    """Memory per process; refuse what this machine cannot hold.

    Raises:
        ConfigError, StoreError: naming the setting.
    """
    config, gpu = what.config, what.language_model is not None and what.model.device.type == "cuda"
    trains_on_gpu = what.trainer_device.type == "cuda"
    _check_disk(what, plan)
    plan.processes = {"producer": config.producers}
    plan.memory["producer"] = _producer_bytes(what, found)
    on_device: dict[torch.device, int] = {}
    if gpu:
        need = (found.model_device_bytes if found else _model_bytes(what)) + DEVICE_BYTES
        plan.device_memory["producer"] = need
        on_device[what.model.device] = config.producers * need
    hosts = []
    free = {CPU: free_bytes(torch.device("cpu")) + held_bytes()}
    for name, run in what.runs.items():
        host, on_gpu = _trainer_bytes(what, run)
        hosts.append(host)
        plan.memory[f"trainer, run {name}"] = host
        if trains_on_gpu:
            plan.device_memory[f"trainer, run {name}"] = on_gpu
        if what.trainers:
            _need(host, free[CPU], f"runs: {name}: a trainer", "window_chunks or dataset.sequences_per_chunk")
    trainers = what.trainers
    plan.processes["trainer"] = trainers
    if trains_on_gpu and trainers:
        most = sorted(n for kind, n in plan.device_memory.items() if kind != "producer")[-trainers:]
        on_device[what.trainer_device] = on_device.get(what.trainer_device, 0) + sum(most)
    if config.producers:
        _need(plan.memory["producer"], free[CPU], "dataset.memory_bytes: a producer", "it")
    both = config.producers * plan.memory["producer"] + sum(sorted(hosts)[-trainers:] if trainers else [])
    who = f"producers, trainers: {config.producers} and {trainers} processes"
    _need(both + SERVER_BYTES, free[CPU], who, "their number")
    for device, need in on_device.items():
        own = torch.cuda.memory_reserved(device)
        free[resource(device)] = free_bytes(device) + own
        _need(need, free_bytes(device) + own, f"model.device, trainer.device: {device}", "what runs on it")
    plan.free_memory = free


def _producer_bytes(what: Resolved, found: Probe | None) -> int:
    chunk, largest = what.manifest.chunk_bytes(), what.manifest.largest_object_bytes()
    process = found.host_bytes if found else what.base_bytes + _model_bytes(what)
    return process + bytes_held(chunk, largest, what.threads)


def _model_bytes(what: Resolved) -> int:
    if what.language_model is None:
        return 0
    return sum(file.stat().st_size for file in what.model.files.weight_files())


def _trainer_bytes(what: Resolved, run: RunConfig) -> tuple[int, int]:
    """Bytes of a trainer in memory, and on its device if that is a GPU."""
    weights = weight_bytes(run)
    row = sum(2 * run.widths[hook] for hook in run.hooks)
    window = row * max((run.window_rows(n) for n in run.windows), default=0)
    # a dense step holds about four times its feature activations, and six times its rows
    widths = [(max(run.widths[hook] for hook in sae.hooks), sae.d_sae) for sae in run.settings.saes]
    step = 4 * run.settings.batch_rows * max(6 * width + 4 * d_sae for width, d_sae in widths)
    training = 4 * weights + step  # weights, their gradients, two moments
    host = WINDOWS_HELD * window + 3 * weights  # a checkpoint as it is stored
    if what.trainer_device.type == "cuda":
        return what.base_bytes + int(KEPT * host), int(KEPT * training) + DEVICE_BYTES
    return what.base_bytes + int(KEPT * (host + training)), 0


def _check_disk(what: Resolved, plan: Plan) -> None:
    config, disks = what.config, dict[int, list[tuple[str, Path, int]]]()
    urls = {
        "dataset.url": config.dataset.url,
        "corpus.url": config.corpus.url,
        "runs_url": config.runs_url,
    }
    for setting, url in urls.items():
        path = local_path(url)
        if path is None:
            continue
        need = plan.parts[setting.split(".")[0].removesuffix("_url")]["bytes"]
        if setting == "dataset.url" and plan.at_once is not None:
            need = plan.at_once + plan.parts["metadata"]["bytes"]
        need -= min(need, stored_size(open_store(url)).bytes)
        there = next(p for p in (path, *path.parents) if p.exists())
        disks.setdefault(there.stat().st_dev, []).append((setting, there, need))
    for parts in disks.values():
        needed, free = sum(need for _, _, need in parts), shutil.disk_usage(parts[0][1]).free
        if needed > free:
            raise StoreError(
                f"{parts[0][0]}: {needed:,} bytes are needed, {free:,} are free at {parts[0][1]}; make "
                "space, lower dataset.max_rows, or use retention: window"
            )


def _need(needed: int, free: int, who: str, what: str) -> None:
    if needed > free:
        raise ConfigError(
            f"{who} would need {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free; "
            f"lower {what}"
        )
