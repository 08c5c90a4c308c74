"""`penstock plan`: what a config will take, before anything is made of it. Nothing of the user's is written.

Rows, bytes and objects follow from the manifest, which is resolved as a producer would. Where there is no
corpus yet, the text is tokenised into a temporary directory; of long texts the beginning, and the rest is
estimated. Times come from a short probe (`plan_probe`) and from how processes share this machine
(`plan_time`): as if all producers and trainers ran here, and nothing else.

    whole = start + corpus + loading the model + producing and training side by side + reports
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from penstock.common.errors import ConfigError, ObjectMissing, StoreError
from penstock.deploy.config import Config
from penstock.deploy.plan_time import CPU, Job, overlap
from penstock.store.objects import open_store

if TYPE_CHECKING:
    import torch

    from penstock.common.model.language_model import LanguageModel
    from penstock.deploy.plan_probe import Cost, Probe
    from penstock.deploy.plan_sizes import Size
    from penstock.store.corpus import Corpus
    from penstock.store.manifest import Manifest
    from penstock.trainer.config import RunConfig

SAMPLE_TOKENS = 2_000_000
"""Training tokens that are looked at where there is no corpus yet."""
BARE_SECONDS = 1.5
"""For a process to start, before it does anything of its own, and for its end to be noticed."""
SERVER_BYTES = 50_000_000
"""An embedded Valkey server."""
WINDOWS_HELD = 5
"""Windows of rows in a trainer: one in use, one waiting, one being laid out from its chunks, which are as
large again, and as much of the one before as the allocator has kept."""
DEVICE_BYTES = 500_000_000
"""What CUDA itself needs of a GPU, per process."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prices:
    """What storing a GB (10⁹ bytes) for a month and a GPU (or machine) for an hour cost; None: not given."""

    gb_month: float | None = None
    gpu_hour: float | None = None
    months: float = 1.0


@dataclass
class Plan:
    """What `penstock plan` says; see `plan_text` for how. Bytes, seconds and counts.

    Attributes:
        estimated: rows are extrapolated from the beginning of the text.
        committed: chunks that are there already.
        parts: bytes and objects of hooks, of the rest of the arrays, and so on.
        at_once: the most bytes of chunks at any time, below their total with `retention: window`.
        memory, device_memory: per kind of process, bytes.
        seconds: per phase; empty without a probe.
        rates: rows per second.
        costs: money; empty without prices.
    """

    url: str
    rows: int = 0
    chunks: int = 0
    sequences_per_chunk: int = 0
    estimated: bool = False
    committed: int = 0
    hooks: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
    at_once: int | None = None
    processes: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    device_memory: dict[str, int] = field(default_factory=dict)
    free_memory: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    config: Config,
    prices: Prices,
    probing: bool = True,
    probe_store: bool = False,
    say: Say = lambda text: None,
) -> Plan:
    """Work everything out.

    Args:
        probing: measure; else nothing is said about time, and memory is a lower bound.
        probe_store: measure storing below the dataset's own URL, and remove what was stored.

    Raises:
        UserError: something given is wrong, or does not fit; as a producer or trainer would say, or sooner.
    """
    began = time.process_time()
    import penstock.trainer.worker  # noqa: F401  (what a trainer loads)
    from penstock.common.memory import held_bytes

    base_bytes, trainer_start = held_bytes(), time.process_time() - began
    began = time.process_time()
    from penstock.common.model.files import find_model
    from penstock.common.model.language_model import LanguageModel
    from penstock.producer.plan import plan_dataset

    say("loading the model")
    model = LanguageModel(find_model(config.model), config.model)
    loading = time.process_time() - began
    with _corpus(config, say) as (corpus, corpus_seconds):
        began = time.process_time()
        sampled = _sampled(config, corpus)
        settings = config.dataset.model_copy(update={"max_rows": None}) if sampled else config.dataset
        manifest = plan_dataset(settings, corpus, model)
        if sampled:
            manifest = _extrapolated(config, manifest)
        loading += time.process_time() - began + trainer_start
        maker = _Planner(config, manifest, model, corpus, base_bytes)
        plan = Plan(config.dataset.url, estimated=sampled)
        maker.refuse(plan)
        found = maker.probe(probe_store, say) if probing else None
        maker.count(plan, found)
        maker.fit(plan, found)
        if found is not None:
            maker.time(plan, found, corpus_seconds, loading, trainer_start)
        maker.price(plan, prices)
        return plan


@contextmanager
def _corpus(config: Config, say: Say) -> "Iterator[tuple[Corpus, float]]":
    """The corpus, or one of the beginning of the text in a temporary directory, and the seconds it took."""
    from penstock.common.model.files import find_model, load_tokenizer
    from penstock.producer.corpus import ensure_corpus
    from penstock.store.layout import MANIFEST

    tokenizer = load_tokenizer(find_model(config.model))
    settings = config.corpus
    if open_store(settings.url).exists(MANIFEST):
        yield ensure_corpus(settings, tokenizer, lambda done, wanted: None), 0.0
        return
    say(f"no corpus at {settings.url} yet: tokenising text into a temporary directory")
    most = min(settings.max_tokens or SAMPLE_TOKENS, SAMPLE_TOKENS)
    with tempfile.TemporaryDirectory(prefix="penstock-plan-") as directory:
        update = {"url": directory, "max_tokens": most}
        started = time.perf_counter()
        corpus = ensure_corpus(settings.model_copy(update=update), tokenizer, lambda done, wanted: None)
        yield corpus, time.perf_counter() - started


def _sampled(config: Config, corpus: "Corpus") -> bool:
    """Whether a corpus is only the beginning of the text."""
    wanted, there = config.corpus.max_tokens, corpus.manifest
    lead = 1 if there.bos == "prepend" else 0
    full = (there.n_sequences + 1) * (there.context - lead) > SAMPLE_TOKENS
    return there.max_tokens == SAMPLE_TOKENS != wanted and full


def _extrapolated(config: Config, manifest: "Manifest") -> "Manifest":
    """The plan for the whole text, from that for its beginning: rows per sequence stay what they are."""
    per_sequence = manifest.total_rows / manifest.corpus.n_sequences
    body = manifest.context - (1 if manifest.corpus.bos == "prepend" else 0)
    tokens, rows = config.corpus.max_tokens, config.dataset.max_rows
    if tokens is None and rows is None:
        raise ConfigError(
            "corpus.max_tokens: without it and dataset.max_rows, nobody knows how long the text is before it "
            "is tokenised; run `penstock corpus CONFIG` first, or set one of them"
        )
    sequences = None if tokens is None else -(-tokens // body)
    if sequences is None or (rows is not None and rows <= sequences * per_sequence):
        sequences = int((rows or 0) / per_sequence) + 1
    elif rows is not None:
        raise ConfigError(
            f"dataset.max_rows: {rows} rows are asked for, but the corpus gives about "
            f"{int(sequences * per_sequence)}; raise corpus.max_tokens or lower dataset.max_rows"
        )
    n, left = divmod(sequences, manifest.sequences_per_chunk)
    if rows is not None and left:
        n, left = n + 1, 0  # chunks are made whole
    counts = [manifest.sequences_per_chunk] * n + ([left] if left else [])
    pin = manifest.corpus.model_copy(update={"n_sequences": sum(counts)})
    return manifest.model_copy(
        update={"corpus": pin, "rows": [round(count * per_sequence) for count in counts]}
    )


@dataclass
class _Planner:
    """Fills a plan in, part by part."""

    config: Config
    manifest: "Manifest"
    model: "LanguageModel"
    corpus: "Corpus"
    base_bytes: int
    runs: "dict[str, RunConfig]" = field(default_factory=dict)
    threads: int = 1
    """Objects stored at a time."""

    def __post_init__(self) -> None:
        from penstock.common.device import open_device

        self.trainer_device = open_device(self.config.trainer.device, "trainer.device")
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def refuse(self, plan: Plan) -> None:
        """Raise what a producer, a submission or a trainer would, and count what is there already."""
        from penstock.producer.memory import store_threads
        from penstock.store.commits import committed_indices
        from penstock.store.dataset import Dataset
        from penstock.store.heads import CHECKPOINTS_KEPT
        from penstock.store.manifest import check_same_plan, load_manifest
        from penstock.store.retention import budget_chunks, check_quota
        from penstock.trainer.config import chunks_needed, resolve_run

        settings, manifest = self.config.dataset, self.manifest
        chunk, largest = manifest.chunk_bytes(), manifest.largest_object_bytes()
        self.threads = store_threads(chunk, largest, settings.memory_bytes)
        check_quota(manifest, settings.quota_bytes, settings.budget_bytes)
        budget = budget_chunks(manifest, settings.budget_bytes)
        store = open_store(settings.url)
        for run in self.config.runs:
            self.runs[run.name] = resolve_run(run, Dataset(store, manifest))
            needs = chunks_needed(run, manifest.n_chunks)
            if budget is not None and budget < needs:
                raise ConfigError(
                    f"dataset.budget_bytes: holds {budget} chunks, but run {run.name} needs {needs} "
                    f"({CHECKPOINTS_KEPT} × head_interval × window_chunks); raise it, or lower these"
                )
        try:
            there = load_manifest(store)
        except ObjectMissing:
            return
        if not plan.estimated:
            check_same_plan(store.url, there, manifest)
        plan.committed = len(committed_indices(store, there.n_chunks))

    def probe(self, probe_store: bool, say: Say) -> "Probe":
        """Measure, with as many processors busy as the config's processes would use."""
        import uuid

        from penstock.deploy.plan_probe import probe

        url, own = self.config.dataset.url, self._model_threads()
        wanted = sum(job.amount for job in self._jobs_at_most())
        neighbours = max(0, min(self.cores, int(wanted)) - max(own, self._trainer_threads()))
        with tempfile.TemporaryDirectory(prefix="penstock-plan-") as directory:
            target = open_store(directory) if _local_path(url) else None
            if probe_store:
                target = open_store(f"{url}/.probe-{uuid.uuid4().hex}")
            say("measuring for a few seconds")
            try:
                trainer = (self.trainer_device, self.config.trainer.threads)
                arguments = (self.manifest, self.corpus, self.model, self.config.runs, trainer)
                return probe(*arguments, self.threads, neighbours, target)
            finally:
                if probe_store and target is not None:
                    for key, _ in list(target.list("")):
                        target.delete(key)

    def count(self, plan: Plan, found: "Probe | None") -> None:
        """Rows, bytes and objects."""
        from penstock.deploy.plan_sizes import Size, metadata_size, object_bytes, run_size, stored_size

        manifest, ratios = self.manifest, {} if found is None else found.ratios
        plan.rows, plan.chunks = manifest.total_rows, manifest.n_chunks
        plan.sequences_per_chunk = manifest.sequences_per_chunk
        sizes = object_bytes(manifest, ratios)
        for hook in manifest.hooks:
            size = manifest.n_chunks * sizes.pop(f"acts/{hook.name}")
            plan.hooks[hook.name] = {"d_in": hook.d_in, "bytes": size, "objects": manifest.n_chunks}
        acts = Size(sum(hook["bytes"] for hook in plan.hooks.values()), len(plan.hooks) * manifest.n_chunks)
        origins = Size(sum(sizes.values()), len(sizes)).times(manifest.n_chunks)
        metadata = metadata_size(manifest, len(self.runs), self.config.runs_url)
        corpus = stored_size(self.corpus.store)
        if plan.estimated:
            share = manifest.corpus.n_sequences / self.corpus.manifest.n_sequences
            corpus = Size(int(corpus.bytes * share), int(corpus.objects * share))
        runs = sum((run_size(run) for run in self.runs.values()), Size())
        parts = {"activations": acts, "tokens, sequence, position": origins, "metadata": metadata}
        parts |= {"dataset": acts + origins + metadata, "corpus": corpus, "runs": runs}
        plan.parts = {name: _told(size) for name, size in parts.items()}
        plan.total = _told(acts + origins + metadata + corpus + runs)
        if manifest.retention == "window" and self.config.dataset.budget_bytes:
            plan.at_once = min(self.config.dataset.budget_bytes, (acts + origins).bytes)
        if manifest.codec != "bytes+crc32c" and found is None:
            plan.notes.append("compression was not measured: bytes are the most that there can be")

    def fit(self, plan: Plan, found: "Probe | None") -> None:
        """Memory per process; refuse what this machine cannot hold.

        Raises:
            ConfigError, StoreError: naming the setting.
        """
        import torch

        from penstock.common.memory import free_bytes, held_bytes
        from penstock.deploy.plan_probe import resource

        config, cpu = self.config, torch.device("cpu")
        self._check_disk(plan)
        plan.processes = {"producer": config.producers}
        plan.memory["producer"] = self._producer_bytes(found)
        on_device: dict[torch.device, int] = {}
        if self.model.device.type == "cuda":
            need = (found.model_device_bytes if found else self._model_bytes()) + DEVICE_BYTES
            plan.device_memory["producer"] = need
            on_device[self.model.device] = config.producers * need
        hosts = []
        free = {CPU: free_bytes(cpu) + held_bytes()}
        for name, run in self.runs.items():
            host, device = self._trainer_bytes(run)
            hosts.append(host)
            plan.memory[f"trainer, run {name}"] = host
            if self.trainer_device.type == "cuda":
                plan.device_memory[f"trainer, run {name}"] = device
            _need(host, free[CPU], f"runs: {name}: a trainer", "window_chunks or dataset.sequences_per_chunk")
        trainers = min(config.trainers, len(hosts))
        plan.processes["trainer"] = trainers
        if self.trainer_device.type == "cuda" and trainers:
            most = sorted(n for kind, n in plan.device_memory.items() if kind != "producer")[-trainers:]
            on_device[self.trainer_device] = on_device.get(self.trainer_device, 0) + sum(most)
        _need(plan.memory["producer"], free[CPU], "a producer", "dataset.memory_bytes")
        both = config.producers * plan.memory["producer"] + sum(sorted(hosts)[-trainers:] if trainers else [])
        what = f"producers, trainers: {config.producers} and {trainers} processes"
        _need(both + SERVER_BYTES, free[CPU], what, "their number")
        for device, need in on_device.items():
            own = torch.cuda.memory_reserved(device)
            free[resource(device)] = free_bytes(device) + own
            _need(
                need, free_bytes(device) + own, f"model.device, trainer.device: {device}", "what runs on it"
            )
        plan.free_memory = free

    def time(
        self, plan: Plan, found: "Probe", corpus_seconds: float, loading: float, trainer_start: float
    ) -> None:
        """Seconds per phase, if everything runs on this machine."""
        from penstock.deploy.plan_probe import evaluation_passes

        config = self.config
        rows = sum(self.manifest.rows) * (1 - plan.committed / max(1, plan.chunks))
        producing = [self._producing(found, rows / config.producers) for _ in range(config.producers)]
        training = [self._training(found, run, trainer_start) for run in self.runs.values()]
        capacity = {job.resource: 1.0 for job in (*producing, *training)} | {CPU: float(self.cores)}
        course = overlap(producing, training, min(config.trainers, len(training)), capacity)
        loads = loading * max(1.0, config.producers / self.cores) if producing else 0.0
        reports = 0.0
        for run in config.runs if config.trainers else []:
            n = min(config.evaluation.sequences, self._held_out())
            passes = evaluation_passes(run, n, min(16, n))
            cuda = self.model.device.type == "cuda"
            per_pass = found.evaluation.wait if cuda else found.evaluation.work / self.cores
            reports += BARE_SECONDS + loading + passes * per_pass
        start = 2 * BARE_SECONDS
        plan.seconds = {
            "start and corpus": start + self._scaled_corpus(plan, corpus_seconds),
            "loading the model": BARE_SECONDS + loads,
            "producing": course.produced,
            "training": course.trained,
            "reports": reports,
        }
        plan.seconds["whole"] = sum(plan.seconds.values()) - min(course.produced, course.trained)
        if producing:
            plan.rates["a producer alone"] = rows / config.producers / max(1e-9, producing[0].seconds)
        for run, job in zip(self.runs.values(), training, strict=True):
            alone = max(1e-9, job.seconds - trainer_start)
            plan.rates[f"training of {run.settings.name} alone"] = run.total_rows() / alone
        plan.costs["producer hours"] = sum(job.seconds for job in producing) / 3600
        if found.store is None:
            plan.notes.append(
                f"storing at {config.dataset.url} was not measured; --probe-store does, and removes what it "
                "stored"
            )

    def price(self, plan: Plan, prices: Prices) -> None:
        """Storing for some months against making the rows again for every pass over them."""
        hours = plan.costs.pop("producer hours", None)
        if prices.gb_month is None and prices.gpu_hour is None:
            plan.notes.append("costs: give --gb-month and --gpu-hour")
            return
        stored = plan.at_once or plan.parts["dataset"]["bytes"]
        if prices.gb_month is not None:
            plan.costs["storing"] = stored / 1e9 * prices.gb_month * prices.months
            plan.costs["months"] = prices.months
        if prices.gpu_hour is None or hours is None:
            missing = "--gpu-hour" if prices.gpu_hour is None else "a probe"
            plan.notes.append(f"cost of making the rows: needs {missing}")
            return
        if plan.committed:
            hours *= plan.chunks / max(1, plan.chunks - plan.committed)
        plan.costs |= {"producer hours": hours, "making once": hours * prices.gpu_hour}
        passes = sum(run.settings.epochs for run in self.runs.values())
        plan.costs["passes"] = passes
        if prices.gb_month is None:
            plan.notes.append("cost of storing: give --gb-month")
        elif plan.costs["making once"] > 0:
            # stored: made once and kept; else: made for every pass
            plan.costs["stored"] = plan.costs["making once"] + plan.costs["storing"]
            plan.costs["made again"] = plan.costs["making once"] * passes
            plan.costs["pays off from passes"] = int(plan.costs["stored"] / plan.costs["making once"]) + 1

    def _model_threads(self) -> int:
        if self.model.device.type != "cpu":
            return 1
        return min(self.cores, self.config.model.threads or self.cores)

    def _trainer_threads(self, strict: bool | None = None) -> int:
        if self.trainer_device.type != "cpu":
            return 1
        if strict is None:
            strict = all(run.strict for run in self.config.runs)
        return 1 if strict else min(self.cores, self.config.trainer.threads or self.cores)

    def _jobs_at_most(self) -> "Iterator[Job]":
        trainers = min(self.config.trainers, len(self.config.runs))
        for _ in range(self.config.producers if self.model.device.type == "cpu" else 0):
            yield Job(1, CPU, self._model_threads())
        for _ in range(trainers if self.trainer_device.type == "cpu" else 0):
            yield Job(1, CPU, self._trainer_threads())

    def _producing(self, found: "Probe", rows: float) -> Job:
        stored = found.store or _nothing()
        return _job(self.model.device, self._model_threads(), found.forward, stored, rows)

    def _training(self, found: "Probe", run: "RunConfig", trainer_start: float) -> Job:
        name, settings = run.settings.name, run.settings
        job = _job(
            self.trainer_device,
            self._trainer_threads(settings.strict),
            found.steps[name],
            found.read,
            run.total_rows(),
        )
        heads = -(-len(run.windows) // settings.head_interval) * found.heads[name].wait
        return Job(
            seconds=job.seconds + heads + trainer_start,
            resource=job.resource,
            amount=job.amount,
            epochs=settings.epochs,
            window=min(1.0, settings.window_chunks / max(1, self.manifest.n_chunks)),
        )

    def _producer_bytes(self, found: "Probe | None") -> int:
        from penstock.producer.memory import bytes_held

        chunk, largest = self.manifest.chunk_bytes(), self.manifest.largest_object_bytes()
        process = found.host_bytes if found else self.base_bytes + self._model_bytes()
        return process + bytes_held(chunk, largest, self.threads)

    def _model_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.model.files.weight_files())

    def _trainer_bytes(self, run: "RunConfig") -> tuple[int, int]:
        """Bytes of a trainer in memory, and on its device if that is a GPU."""
        from penstock.deploy.plan_sizes import weight_bytes
        from penstock.producer.memory import KEPT

        weights = weight_bytes(run)
        row = sum(2 * run.dataset.widths[hook] for hook in run.hooks)
        window = row * max((run.window_rows(n) for n in run.windows), default=0)
        # a dense step holds about four times its feature activations, and six times its rows
        widths = [(run.dataset.widths[sae.hook_name], sae.d_sae) for sae in run.settings.saes]
        step = 4 * run.settings.batch_rows * max(6 * d_in + 4 * d_sae for d_in, d_sae in widths)
        training = 4 * weights + step  # weights, their gradients, two moments
        host = WINDOWS_HELD * window + 3 * weights  # a checkpoint as it is stored
        if self.trainer_device.type == "cuda":
            return self.base_bytes + int(KEPT * host), int(KEPT * training) + DEVICE_BYTES
        return self.base_bytes + int(KEPT * (host + training)), 0

    def _check_disk(self, plan: Plan) -> None:
        from penstock.deploy.plan_sizes import stored_size

        config, disks = self.config, dict[int, list[tuple[str, Path, int]]]()
        urls = {
            "dataset.url": config.dataset.url,
            "corpus.url": config.corpus.url,
            "runs_url": config.runs_url,
        }
        for setting, url in urls.items():
            path = _local_path(url)
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

    def _held_out(self) -> int:
        return self.corpus.manifest.n_held_out

    def _scaled_corpus(self, plan: Plan, seconds: float) -> float:
        if not plan.estimated:
            return seconds
        return seconds * self.manifest.corpus.n_sequences / self.corpus.manifest.n_sequences


def _job(device: "torch.device", threads: int, main: "Cost", beside: "Cost", rows: float) -> Job:
    """Work of a process whose other threads read or store meanwhile."""
    from penstock.deploy.plan_probe import resource

    if device.type != "cpu":
        per_row = max(main.wait, beside.wait)
        return Job(rows * per_row, resource(device), main.wait / max(per_row, 1e-12))
    per_row = max(main.work / threads, beside.wait)
    return Job(rows * per_row, CPU, (main.work + beside.work) / max(per_row, 1e-12))


def _nothing() -> "Cost":
    from penstock.deploy.plan_probe import Cost

    return Cost()


def _told(size: "Size") -> dict[str, int]:
    return {"bytes": size.bytes, "objects": size.objects}


def _need(needed: int, free: int, who: str, what: str) -> None:
    if needed > free:
        raise ConfigError(
            f"{who} would need {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free; "
            f"lower {what}"
        )


def _local_path(url: str) -> Path | None:
    if "://" not in url:
        return Path(url).absolute()
    return Path(url.removeprefix("file://")).absolute() if urlsplit(url).scheme == "file" else None
