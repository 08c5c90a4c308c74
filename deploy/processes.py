"""The processes: what `penstock corpus`, `produce`, `submit`, `train` and `report` do.

Each puts the rooms' parts together, runs one loop and takes everything down again.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.common.errors import ConfigError, ModelError, ObjectMissing, UserError
from penstock.common.health import Health, HealthServer
from penstock.common.logs import LOGGER, tell_about
from penstock.common.process import stop_on_signals, worker_name
from penstock.deploy.config import Config
from penstock.store.objects import open_store

if TYPE_CHECKING:
    from penstock.producer.source import Source
    from penstock.producer.toy import ToySettings
    from penstock.store.joined import JoinedDataset
    from penstock.store.manifest import Manifest
    from penstock.trainer.config import RunSettings

    MakeSource = Callable[[Manifest, Callable[[], None]], Source]


def build_corpus(config: Config, progress: Callable[[int, int | None], None]) -> Any:
    """Make the corpus unless it is there; returns it.

    Raises:
        ConfigError: the config is of toy data.
    """
    if config.toy is not None:
        raise ConfigError("toy: toy data are made from no text; `penstock produce` makes them")
    from penstock.common.model.files import find_model, load_tokenizer
    from penstock.producer.corpus import ensure_corpus

    tokenizer = load_tokenizer(find_model(config.model))
    return ensure_corpus(config.corpus, tokenizer, progress)


def open_source(config: Config) -> "tuple[Manifest, MakeSource]":
    """The plan of a config's dataset, and what makes its chunks: a model on a corpus, or toy data."""
    if config.toy is not None:
        return _open_toy(config.toy, config)
    from penstock.common.model.files import find_model
    from penstock.common.model.language_model import LanguageModel
    from penstock.producer.plan import plan_dataset
    from penstock.producer.source import LanguageModelSource

    files = find_model(config.model)
    corpus = build_corpus(config, lambda done, wanted: None)
    model = LanguageModel(files, config.model)
    _check_tokenizer(model, corpus)
    plan = plan_dataset(config.dataset, corpus, model)
    return plan, lambda manifest, progress: LanguageModelSource(manifest, corpus, model, progress)


def _open_toy(settings: "ToySettings", config: Config) -> "tuple[Manifest, MakeSource]":
    from penstock.producer.toy import Toy
    from penstock.producer.toy_source import ToySource, plan_toy
    from penstock.store.truth import store_truth

    toy = Toy(settings)

    def make_source(manifest: "Manifest", progress: Callable[[], None]) -> ToySource:
        # before the first chunk: whoever sees one finds what it is made of
        store_truth(open_store(config.dataset.url), manifest, toy.truth)
        return ToySource(manifest, toy, progress)

    return plan_toy(config.dataset, toy), make_source


def produce(config: Config) -> None:
    """One producer: claims chunks of the dataset until it is complete or SIGTERM comes."""
    import redis

    from penstock.common.heartbeat import Heartbeat
    from penstock.common.memory import keep_freed_memory
    from penstock.common.redis import connect
    from penstock.producer.loop import produce as run_loop
    from penstock.producer.memory import store_threads
    from penstock.producer.pace import Pace
    from penstock.producer.sink import Sink
    from penstock.producer.work import Work
    from penstock.store.queue import ChunkQueue, Presence
    from penstock.store.retention import Retention, budget_chunks, check_quota
    from penstock.store.writer import DatasetWriter

    keep_freed_memory()
    stop = stop_on_signals()
    health, worker = Health(), worker_name("producer")
    tell_about(role="producer", worker=worker)
    server = HealthServer(health, config.metrics.host, config.metrics.port)
    client = connect(config.redis)
    store = open_store(config.dataset.url)
    store.probe()
    plan, make_source = open_source(config)
    settings = config.dataset
    check_quota(plan, settings.quota_bytes, settings.budget_bytes)
    budget = budget_chunks(plan, settings.budget_bytes)
    threads = store_threads(plan.chunk_bytes(), plan.largest_object_bytes(), settings.memory_bytes)
    writer = DatasetWriter(store, plan, ThreadPoolExecutor(threads, thread_name_prefix="put"))
    manifest = writer.manifest
    _announce_build()
    LOGGER.info("producing %s as %s", store.url, worker, extra={"port": server.port})
    address = (client, config.redis.prefix, store.url, manifest.digest, worker, config.redis.lease_seconds)
    queue = ChunkQueue(*address)
    hours = settings.detach_after_hours
    retention = Retention(store, manifest, budget, None if hours is None else 3600 * hours)
    presence = Presence(client, config.redis.prefix, worker)
    work = Work(queue, ChunkQueue(*address, repairs=True), writer, retention, lambda: heartbeat.beat())
    made: list[int] = []

    def renew() -> None:
        work.renew()
        presence.tell(
            {
                "kind": "producer",
                "port": server.port,
                "dataset": store.url,
                "chunks": len(made),
                "rows_per_second": pace.rows_per_second(),
                "making": sorted(task.index for task in work.held),
                "waiting": work.waiting,
            },
            3 * config.redis.lease_seconds,
        )

    def committed(index: int, rows: int) -> None:
        made.append(index)
        pace.add(rows)
        heartbeat.beat()
        LOGGER.info("chunk %d committed", index, extra={"chunk": index, "rows": rows})

    heartbeat = Heartbeat(renew, config.redis.lease_seconds, health)
    source = make_source(manifest, heartbeat.beat)
    pace = Pace()
    sink = Sink(writer, work, client, queue.feeds_key, worker, committed)
    health.ready = True
    try:
        run_loop(work, source, sink, stop)
        LOGGER.info("producer finished: %d chunks made here", len(made))
    finally:
        heartbeat.close()
        try:
            work.release()
            presence.leave()
        except redis.RedisError as error:
            LOGGER.warning("leases end by themselves; redis: %s", error)
        writer.close()
        server.close()


def submit(config: Config) -> list[tuple[str, bool]]:
    """Submit every run of the config; (run id, whether it is new) of each.

    Raises:
        UserError: a dataset does not exist yet, or those of a run do not go together.
    """
    from penstock.trainer.config import submit_run

    if not config.runs:
        raise ConfigError("runs: no run is configured; add one")
    wanted = [(settings, open_data(config, settings)) for settings in config.runs]
    runs = open_store(config.runs_url)
    runs.probe()
    submitted = [submit_run(runs, data, settings, _budget(config, data)) for settings, data in wanted]
    return [(run.run_id, new) for run, new in submitted]


def open_data(config: Config, run: "RunSettings") -> "JoinedDataset":
    """The datasets that a run of the config reads, as one.

    Raises:
        UserError: one does not exist yet, or they do not go together.
    """
    from penstock.store.dataset import open_dataset
    from penstock.store.joined import JoinedDataset

    parts = []
    for url in config.datasets_of(run):
        try:
            parts.append(open_dataset(url))
        except ObjectMissing as error:
            field = f"runs: {run.name}: datasets" if run.datasets else "dataset.url"
            raise UserError(f"{field}: no dataset at {url} yet; start a producer first") from error
    return JoinedDataset(parts)


def _budget(config: Config, data: "JoinedDataset") -> int | None:
    """How many chunks a run's dataset holds at a time, if it keeps only a window."""
    from penstock.store.retention import budget_chunks

    part = data.parts[0]
    if data.keeps_window and part.url != open_store(config.dataset.url).url:
        raise ConfigError(
            f"runs: {part.url} keeps only a window of its chunks (retention: window): submit its runs with "
            "the config that it is made with"
        )
    return budget_chunks(part.manifest, config.dataset.budget_bytes)


def train(config: Config, drain: bool) -> None:
    """One trainer: carries runs on until SIGTERM comes or, with `drain`, until none is left."""
    from penstock.common.memory import keep_freed_memory
    from penstock.common.redis import connect

    keep_freed_memory()
    stop = stop_on_signals()
    health, worker = Health(), worker_name("trainer")
    tell_about(role="trainer", worker=worker)
    server = HealthServer(health, config.metrics.host, config.metrics.port)
    client = connect(config.redis)
    runs = open_store(config.runs_url)
    runs.probe()

    from penstock.common.device import open_device
    from penstock.deploy.evaluation import live_evaluation
    from penstock.trainer.worker import work
    from penstock.trainer.workplace import Workplace

    device = open_device(config.trainer.device, "trainer.device")
    place = Workplace(
        runs=runs,
        client=client,
        redis=config.redis,
        worker=worker,
        device=device,
        threads=config.trainer.threads,
        port=server.port,
        live=live_evaluation(config),
    )
    _announce_build()
    LOGGER.info("training runs of %s as %s", runs.url, worker, extra={"port": server.port})
    try:
        work(place, health, stop, drain)
    finally:
        server.close()


def report(config: Config, run_url: str, out: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Evaluate a run on what is held out; write report.html and summary.json below `out`."""
    from penstock.common.memory import keep_freed_memory
    from penstock.deploy.evaluation import evaluate_run
    from penstock.trainer.config import load_run_config, open_pinned
    from penstock.trainer.load import load_saes, split_run_url
    from penstock.trainer.report import MANY, render_report
    from penstock.trainer.summary import last_head, summarise

    keep_freed_memory()
    runs, run_id = split_run_url(run_url)
    run = load_run_config(runs, run_id)
    head = last_head(runs, run)
    data = open_pinned(run)
    started = time.monotonic()
    result = evaluate_run(config, run, data, lambda: load_saes(runs, run, head), progress)
    summary, history = summarise(runs, run, data, result, time.monotonic() - started)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out / "report.html").write_text(render_report(summary, history), encoding="utf-8")
    if len(run.settings.saes) > MANY:
        from penstock.deploy.sweep import write_sweep

        write_sweep(runs, {run_id: out}, out, run_id)
    return summary


def _check_tokenizer(model: Any, corpus: Any) -> None:
    largest = int(corpus.tokens(0, 1).max(initial=0))
    if largest >= model.vocabulary:
        raise ModelError(f"the corpus has token {largest}; the model knows only {model.vocabulary}")


def _announce_build() -> None:
    from importlib.metadata import version

    from penstock.common import metrics

    metrics.build_info.labels(version("penstock"), version("torch")).set(1)
