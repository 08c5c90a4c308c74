"""Where things stand, read from the store alone; Redis only adds who is at it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.common.errors import ObjectMissing
from penstock.common.redis import RedisSettings
from penstock.deploy.config import Config
from penstock.store.objects import open_store

if TYPE_CHECKING:
    from penstock.store.dataset import Dataset

CONFIG_FILE = "penstock.json"
"""The resolved config, below the work directory, for child processes."""
REDIS_FILE = "redis-url"
"""The embedded server's URL while it runs, below the work directory, for status."""


@dataclass(frozen=True)
class RunState:
    """A run as its newest head has it."""

    status: str
    position: int
    n_positions: int
    step: int
    total_steps: int
    rows: int
    total_rows: int
    stored_rows: int
    head: int | None
    figures: dict[str, dict[str, float]]
    reason: str | None


NOT_SUBMITTED = RunState("not submitted", 0, 0, 0, 0, 0, 0, 0, None, {}, None)


@dataclass(frozen=True)
class State:
    """A config's corpus, dataset and runs."""

    corpus_sequences: int | None = None
    planned: int | None = None
    committed: int = 0
    rows: int = 0
    committed_rows: int = 0
    runs: dict[str, RunState] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """The dataset is complete and every run is done."""
        return (
            self.planned is not None
            and self.committed == self.planned
            and all(run.status == "done" for run in self.runs.values())
        )


def has_text(config: Config) -> bool:
    """Whether a config's dataset is made from a corpus; one that is only read may be of anything."""
    if config.toy is not None or config.producers:
        return config.toy is None
    from penstock.store.dataset import open_dataset

    try:
        return open_dataset(config.dataset.url).manifest.of_text
    except ObjectMissing:
        return True


def read_state(config: Config) -> State:
    """What the store says about everything in a config."""
    from penstock.store.corpus import open_corpus
    from penstock.store.dataset import open_dataset

    try:
        sequences: int | None = open_corpus(config.corpus.url).manifest.n_sequences
    except ObjectMissing:
        sequences = None
    try:
        dataset = open_dataset(config.dataset.url)
    except ObjectMissing:
        return State(corpus_sequences=sequences)
    committed = dataset.committed()
    rows = dataset.manifest.rows
    committed_rows = sum(rows[index] for index in committed)
    return State(
        corpus_sequences=sequences,
        planned=dataset.n_chunks,
        committed=len(committed),
        rows=sum(rows),
        committed_rows=committed_rows,
        runs=dict(_read_runs(config, {config.dataset.url: (dataset, committed_rows)})),
    )


def _read_runs(config: Config, opened: "dict[str, tuple[Dataset, int]]") -> Iterator[tuple[str, RunState]]:
    """Each run of a config by its id; by its name where a dataset is missing that it is to read.

    Args:
        opened: datasets by URL, with the rows that are committed; each is opened once.
    """
    if not config.runs:
        return
    from penstock.store.dataset import open_dataset
    from penstock.store.joined import JoinedDataset
    from penstock.trainer.config import resolve_run

    for settings in config.runs:
        urls = config.datasets_of(settings)
        try:
            for url in urls:
                if url not in opened:
                    part = open_dataset(url)
                    opened[url] = part, sum(part.manifest.rows[index] for index in part.committed())
        except ObjectMissing as error:
            yield settings.name, replace(NOT_SUBMITTED, reason=str(error))
            continue
        run_id = resolve_run(settings, JoinedDataset([opened[url][0] for url in urls])).run_id
        run = read_run(config.runs_url, run_id)
        yield run_id, replace(run, stored_rows=sum(opened[url][1] for url in urls))


def read_run(runs_url: str, run_id: str) -> RunState:
    """One run; `not submitted` if it is not there."""
    from penstock.store.heads import newest_head
    from penstock.trainer.config import load_run_config

    runs = open_store(runs_url)
    try:
        config = load_run_config(runs, run_id)
    except ObjectMissing:
        return NOT_SUBMITTED
    head = newest_head(runs, run_id)
    return RunState(
        status="pending" if head is None else head.status,
        position=head.position if head else 0,
        n_positions=config.order.n_positions,
        step=head.step if head else 0,
        total_steps=config.total_steps(),
        rows=head.rows if head else 0,
        total_rows=config.total_rows(),
        stored_rows=0,
        head=head.n if head else None,
        figures=head.metrics if head else {},
        reason=head.reason if head else None,
    )


def embedded_redis_url(directory: Path) -> str | None:
    """The embedded server's URL, if one is running for this work directory."""
    file = directory / REDIS_FILE
    return file.read_text().strip() if file.is_file() else None


def redis_settings(config: Config) -> RedisSettings:
    """Where the queue is: an embedded server's place, if one is running and no other is configured."""
    embedded = embedded_redis_url(config.directory)
    if config.redis.url is None and embedded:
        return config.redis.model_copy(update={"url": embedded})
    return config.redis
