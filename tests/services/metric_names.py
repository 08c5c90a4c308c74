"""Every metric that some process publishes, with its labels."""

from collections.abc import Iterable

from prometheus_client.core import Metric

from penstock.common.metrics import REGISTRY

SCRAPED = {"job", "instance"}
"""What Prometheus adds to every series."""
PROMETHEUS = {"up": set[str](), "ALERTS": {"alertname", "alertstate", "severity", "run"}}
"""Series that Prometheus makes itself."""

# >>> The exporter's metrics, as docs/observability.md lists them. They are not in the registry above, because
# the exporter asks the store for them. A test compares this table with that page.
EXPORTER: dict[str, set[str]] = {
    "penstock_runs_pending": set(),
    "penstock_runs": {"state"},
    "penstock_backlog_chunks": {"run"},
    "penstock_run_position": {"run"},
    "penstock_run_positions": {"run"},
    "penstock_run_rows": {"run"},
    "penstock_run_rows_planned": {"run"},
    "penstock_run_head": {"run"},
    "penstock_run_head_age_seconds": {"run"},
    "penstock_run_head_interval_seconds": {"run"},
    "penstock_run_held": {"run"},
    "penstock_dataset_chunks_planned": {"dataset"},
    "penstock_dataset_chunks_committed": {"dataset"},
    "penstock_dataset_rows_planned": {"dataset"},
    "penstock_dataset_rows_committed": {"dataset"},
    "penstock_dataset_chunks_wanted": {"dataset"},
    "penstock_dataset_chunks_claimed": {"dataset"},
    "penstock_dataset_blocked": {"dataset"},
    "penstock_chunks_quarantined": {"dataset"},
    "penstock_workers": {"kind"},
    "penstock_workers_waiting": {"kind"},
    "penstock_store_bytes": {"url"},
    "penstock_store_quota_bytes": {"url"},
    "penstock_store_free_bytes": {"url"},
    "penstock_redis_up": set(),
    "penstock_exporter_look_success": set(),
    "penstock_exporter_look_timestamp_seconds": set(),
    "penstock_exporter_look_duration_seconds": set(),
}
# <<<


def of_workers() -> dict[str, set[str]]:
    """Those of producers and trainers: all that is registered, in use or not."""
    # registered once each, whatever their samples
    metrics = {id(c): c for c in REGISTRY._collector_to_names}.values()
    found: dict[str, set[str]] = {}
    for collector in metrics:
        described: Iterable[Metric] = collector.collect()
        labels = set(getattr(collector, "_labelnames", ()))
        for metric in described:
            found |= {name: set(more) | labels for name, more in _series(metric.name, metric.type).items()}
    return found


def _series(name: str, kind: str) -> dict[str, set[str]]:
    if kind == "counter":
        return {f"{name}_total": set()}
    if kind == "histogram":
        return {f"{name}_bucket": {"le"}, f"{name}_sum": set(), f"{name}_count": set()}
    return {name: set()}


def everything() -> dict[str, set[str]]:
    """Metric -> labels that some process gives it."""
    found = {**PROMETHEUS, **of_workers()}
    for name, labels in EXPORTER.items():
        found[name] = found.get(name, set()) | labels
    return found
