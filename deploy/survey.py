"""Where everything stands: datasets, runs and workers. What `status` shows and the exporter publishes.

The store alone says how far datasets and runs are; Redis adds who is at it. A `Surveyor` looks again and
again, and asks only for what may have changed since.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import redis

from penstock.common.errors import DataError, OtherFormat, PenstockError
from penstock.common.redis import Client, connect
from penstock.common.retries import ONCE
from penstock.deploy.config import Config
from penstock.deploy.state import redis_settings
from penstock.deploy.survey_datasets import DatasetNow, Seen, look_at_dataset
from penstock.deploy.survey_redis import Crew, look_at_redis
from penstock.deploy.survey_runs import ENDED, RunKnown, RunNow, look_at_run, with_backlog
from penstock.store.objects import ObjectStore, open_store
from penstock.trainer.config import RunConfig, RunSettings

THREADS = 16
"""Requests at a time: a look at many runs on S3 is many small requests."""
FORGET_SECONDS = 600.0
"""What never changes is read again this often: somebody may have removed a run and submitted it again."""
REDIS_SECONDS = 2.0
"""Redis that takes longer for an answer is as good as down: what the store says must not wait for it."""
RATE_SECONDS = 60.0
"""Rates are over as much of the past."""


@dataclass(frozen=True)
class Survey:
    """What one look found.

    Attributes:
        time: when it was over (Unix seconds).
        seconds: how long it took.
        datasets: by URL; the config's own first.
        runs: by id, or by name where a run of the config is not submitted.
        crew: what Redis says; None where it does not answer.
        redis_error: why it does not.
    """

    time: float
    seconds: float
    datasets: dict[str, DatasetNow]
    runs: dict[str, RunNow]
    crew: Crew | None
    redis_error: str | None


class Surveyor:
    """Looks at everything that a config names, and at all runs below its runs URL.

    It never waits long for Redis: its place may be empty, and the store tells most.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._client: Client | None = None
        self._stores: dict[str, ObjectStore] = {}
        self._datasets: dict[str, Seen] = {}
        self._known: dict[str, RunKnown] = {}
        self._forgot = time.monotonic()
        self._rates = _Rates()

    def look(self) -> Survey:
        """Look at the store, and at Redis if it answers.

        Raises:
            PenstockError: the store does not answer, or refuses us.
        """
        started = time.monotonic()
        if started - self._forgot > FORGET_SECONDS:
            self._datasets, self._known, self._forgot = {}, {}, started
        with ThreadPoolExecutor(THREADS, thread_name_prefix="look") as pool:
            runs = self._look_at_runs(pool)
            urls = dict.fromkeys(self._store(url).url for url in self._config.dataset_urls())
            for run_id, run in runs.items():
                if run.state not in ENDED and run_id in self._known:
                    urls |= dict.fromkeys(run.datasets)
            datasets = dict(zip(urls, pool.map(self._look_at_dataset, urls), strict=True))
        runs = {
            run_id: with_backlog(run, self._known[run_id], self._datasets) if run_id in self._known else run
            for run_id, run in runs.items()
        }
        crew, error = self._look_at_redis(list(runs), list(datasets))
        now = time.time()
        runs = {run_id: self._with_crew(run, crew, now) for run_id, run in runs.items()}
        datasets = {url: self._made(seen, crew) for url, seen in datasets.items()}
        runs = self._not_submitted(datasets, runs) | runs
        return Survey(now, time.monotonic() - started, datasets, runs, crew, error)

    def _store(self, url: str) -> ObjectStore:
        """Opened once: a store that is opened anew connects anew."""
        if url not in self._stores:
            self._stores[url] = open_store(url)
        return self._stores[url]

    def _look_at_runs(self, pool: ThreadPoolExecutor) -> dict[str, RunNow]:
        store = self._store(self._config.runs_url)
        ids = sorted(store.folders(""))
        self._known = {run_id: known for run_id, known in self._known.items() if run_id in ids}
        looks = pool.map(lambda run_id: look_at_run(store, run_id, self._known), ids)
        return {run_id: run for run_id, run in zip(ids, looks, strict=True) if run is not None}

    def _look_at_dataset(self, url: str) -> DatasetNow:
        made_here = url == self._store(self._config.dataset.url).url
        try:
            return look_at_dataset(self._store(url), self._config, made_here, self._datasets)
        except (DataError, OtherFormat) as error:
            return DatasetNow(url, problem=str(error))
        except PenstockError as error:
            if url in (self._store(own).url for own in self._config.dataset_urls()):
                raise
            # only a run of another config reads it
            return DatasetNow(url, problem=str(error))

    def _look_at_redis(self, run_ids: list[str], urls: list[str]) -> tuple[Crew | None, str | None]:
        digests = {url: self._datasets[url].digest for url in urls if url in self._datasets}
        try:
            runs_url = self._store(self._config.runs_url).url
            # tried once: the next look is the next try
            self._client = self._client or connect(redis_settings(self._config), ONCE, REDIS_SECONDS)
            return look_at_redis(self._client, self._config.redis, runs_url, run_ids, digests), None
        except (PenstockError, redis.RedisError) as error:
            self._client = None  # an embedded server may return elsewhere
            return None, str(error)

    def _with_crew(self, run: RunNow, crew: Crew | None, now: float) -> RunNow:
        if run.state in ENDED:
            return run
        rows, waiting, holder = run.rows, None, None
        if crew is not None:
            holder = crew.holders.get(run.id)
            word = crew.at_run(run.id)
            rows = max(rows, word.get("rows") or 0)
            waiting = word.get("waiting_for")
            if holder is None and run.state in ("pending", "running"):
                waiting = "a trainer"
        rate = self._rates.of(f"run {run.id}", rows) or run.rate_of_head(now)
        if crew is not None and holder is None:
            rate = None
        left = (run.total_rows - rows) / rate if rate else None
        return replace(
            run, live_rows=rows, holder=holder, waiting_for=waiting, rows_per_second=rate, seconds_left=left
        )

    def _made(self, dataset: DatasetNow, crew: Crew | None) -> DatasetNow:
        if dataset.planned is None:
            return dataset
        seen = self._rates.of(f"dataset {dataset.url}", dataset.committed_rows)
        rate = seen or (crew.rows_per_second(dataset.url) if crew else None)
        left = dataset.rows - dataset.committed_rows
        dataset = replace(
            dataset,
            rows_per_second=rate if left else None,
            seconds_left=left / rate if left and rate else None,
        )
        if crew is None:
            return dataset
        repairs = crew.repairs.get(dataset.url, 0)
        wanted = None if dataset.wanted is None else dataset.wanted + repairs
        return replace(dataset, claims=crew.claims.get(dataset.url, {}), repairs=repairs, wanted=wanted)

    def _not_submitted(self, datasets: dict[str, DatasetNow], runs: dict[str, RunNow]) -> dict[str, RunNow]:
        """Runs of the config that are not there yet, by name."""
        found = {}
        # whose config is damaged, nobody can compare
        damaged = {run_id.rsplit("-", 1)[0] for run_id in runs if run_id not in self._known}
        there = [known.config for known in self._known.values()]
        for settings in self._config.runs:
            urls = [self._store(url).url for url in self._config.datasets_of(settings)]
            if settings.name in damaged:
                continue
            if not any(_is_of(stored, settings, urls) for stored in there):
                missing = (f"no dataset at {url}" for url in urls if datasets[url].planned is None)
                found[settings.name] = RunNow(
                    settings.name, "not submitted", tuple(urls), reason=next(missing, None)
                )
        return found


def _is_of(stored: RunConfig, settings: RunSettings, urls: list[str]) -> bool:
    """Whether a stored run is what these settings ask for."""
    if stored.settings.name != settings.name or stored.dataset_urls != urls:
        return False
    left_open = {"datasets", "grid"} | ({"window_chunks"} if settings.window_chunks is None else set())
    told = dict(stored.settings)
    return all(told[name] == value for name, value in dict(settings).items() if name not in left_open)


@dataclass
class _Rates:
    """Rows per second over the last minute, as far as it was watched."""

    seen: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def of(self, name: str, rows: int) -> float | None:
        """None at the first look, and while nothing moves."""
        now = time.monotonic()
        marks = [mark for mark in self.seen.get(name, []) if now - mark[0] < RATE_SECONDS]
        self.seen[name] = [*marks, (now, rows)]
        if not marks or now - marks[0][0] < 1:
            return None
        at, before = marks[0]
        return (rows - before) / (now - at) if rows > before else None
