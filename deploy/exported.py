"""What the exporter publishes of a survey: names, labels and meaning, in one place.

Names of design and dashboards; docs/observability.md lists them. A value that is not known is absent: it is
never published as zero.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily

from penstock.deploy.survey import Survey
from penstock.deploy.survey_runs import ENDED, STATES

KINDS = ("producer", "trainer")

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "penstock_runs_pending": ("Runs that have not ended: one trainer is of use for each", ()),
    "penstock_runs": ("Runs by state", ("state",)),
    "penstock_backlog_chunks": ("Chunks stored next in the reading order, from the newest head on", ("run",)),
    "penstock_run_next_head_chunks": ("Chunks to train on from the newest head to the next", ("run",)),
    "penstock_run_position": ("Chunks trained on by the newest head, over all epochs", ("run",)),
    "penstock_run_positions": ("Chunks to train on, over all epochs", ("run",)),
    "penstock_run_rows": ("Rows trained on by the newest head", ("run",)),
    "penstock_run_rows_planned": ("Rows to train on, over all epochs", ("run",)),
    "penstock_run_head": ("Number of the newest head", ("run",)),
    "penstock_run_head_age_seconds": ("Seconds since the newest head of a run that has not ended", ("run",)),
    "penstock_run_head_interval_seconds": ("Seconds from the newest progress head's parent to it", ("run",)),
    "penstock_run_held": ("1 if a worker holds a lease on the run", ("run",)),
    "penstock_dataset_chunks_planned": ("Chunks of the plan", ("dataset",)),
    "penstock_dataset_chunks_committed": ("Chunks committed", ("dataset",)),
    "penstock_dataset_rows_planned": ("Rows of the plan", ("dataset",)),
    "penstock_dataset_rows_committed": ("Rows in committed chunks", ("dataset",)),
    "penstock_dataset_chunks_wanted": ("Chunks that a producer could make now, repairs too", ("dataset",)),
    "penstock_dataset_chunks_claimed": ("Chunks being made", ("dataset",)),
    "penstock_dataset_blocked": ("1 while the budget allows none of the missing chunks", ("dataset",)),
    "penstock_chunks_quarantined": ("Chunks given up: readers skip them", ("dataset",)),
    "penstock_workers": ("Workers present", ("kind",)),
    "penstock_workers_waiting": ("Workers that say that they wait", ("kind",)),
    "penstock_store_bytes": ("Bytes stored below a URL", ("url",)),
    "penstock_store_quota_bytes": ("Quota of a dataset", ("url",)),
    "penstock_store_free_bytes": ("Free bytes of the file system of a local path", ("url",)),
    "penstock_redis_up": ("1 if Redis answered the last look", ()),
    "penstock_exporter_look_success": ("1 if the last look at the store succeeded", ()),
    "penstock_exporter_look_timestamp_seconds": ("When the last look that succeeded ended", ()),
    "penstock_exporter_look_duration_seconds": ("Seconds that the last look that succeeded took", ()),
}
"""Name -> (help, labels)."""


@dataclass(frozen=True)
class Space:
    """What lies below one URL, in bytes; None where it is not known."""

    url: str
    used: int | None = None
    quota: int | None = None


Sample = tuple[str, tuple[str, ...], float]


def families(samples: Iterator[Sample]) -> Iterator[GaugeMetricFamily]:
    """Samples as Prometheus takes them; a metric without a sample is left out."""
    found: dict[str, GaugeMetricFamily] = {}
    for name, labels, value in samples:
        if name not in found:
            text, label_names = GAUGES[name]
            found[name] = GaugeMetricFamily(name, text, labels=label_names)
        found[name].add_metric(labels, value)
    yield from found.values()


def survey_samples(survey: Survey) -> Iterator[Sample]:
    """What a survey says. Ages are counted from now: a look may be some seconds old."""
    yield "penstock_exporter_look_timestamp_seconds", (), survey.time
    yield "penstock_exporter_look_duration_seconds", (), survey.seconds
    yield "penstock_redis_up", (), float(survey.crew is not None)
    yield from _of_runs(survey)
    yield from _of_datasets(survey)
    if survey.crew is not None:
        for kind in KINDS:
            words = [word for word in survey.crew.workers.values() if word.get("kind") == kind]
            waiting = [word for word in words if word.get("waiting") or word.get("waiting_for")]
            yield "penstock_workers", (kind,), len(words)
            yield "penstock_workers_waiting", (kind,), len(waiting)


def _of_runs(survey: Survey) -> Iterator[Sample]:
    runs = [run for run in survey.runs.values() if run.state in STATES]
    states = Counter(run.state for run in runs)
    yield "penstock_runs_pending", (), states["pending"] + states["running"]
    for state in STATES:
        yield "penstock_runs", (state,), states[state]
    for run in runs:
        if run.state == "unreadable":
            continue
        label = (run.id,)
        yield "penstock_run_position", label, run.position
        yield "penstock_run_positions", label, run.n_positions
        yield "penstock_run_rows", label, run.rows
        yield "penstock_run_rows_planned", label, run.total_rows
        if run.head is not None:
            yield "penstock_run_head", label, run.head
        if run.state in ENDED:
            continue
        yield "penstock_run_next_head_chunks", label, run.next_head
        if run.backlog is not None:
            yield "penstock_backlog_chunks", label, run.backlog
        if run.head_time is not None:
            yield "penstock_run_head_age_seconds", label, max(0.0, time.time() - run.head_time)
        if run.head_seconds is not None:
            yield "penstock_run_head_interval_seconds", label, run.head_seconds
        if survey.crew is not None:
            yield "penstock_run_held", label, float(run.holder is not None)


def _of_datasets(survey: Survey) -> Iterator[Sample]:
    for dataset in survey.datasets.values():
        label = (dataset.url,)
        if dataset.wanted is not None:
            yield "penstock_dataset_chunks_wanted", label, dataset.wanted
        if dataset.planned is None:
            continue
        yield "penstock_dataset_chunks_planned", label, dataset.planned
        yield "penstock_dataset_chunks_committed", label, dataset.committed
        yield "penstock_dataset_rows_planned", label, dataset.rows
        yield "penstock_dataset_rows_committed", label, dataset.committed_rows
        yield "penstock_chunks_quarantined", label, dataset.quarantined
        if dataset.wanted is not None:
            yield "penstock_dataset_blocked", label, float(dataset.blocked is not None)
        if dataset.claims is not None:
            yield "penstock_dataset_chunks_claimed", label, len(dataset.claims)


def space_samples(spaces: dict[str, Space]) -> Iterator[Sample]:
    """What is known of the space below each URL."""
    for url, space in spaces.items():
        for name, value in (("", space.used), ("quota_", space.quota)):
            if value is not None:
                yield f"penstock_store_{name}bytes", (url,), value


def free_samples(free: dict[str, int]) -> Iterator[Sample]:
    """Free bytes, by the URL below which they are."""
    for url, value in free.items():
        yield "penstock_store_free_bytes", (url,), value
