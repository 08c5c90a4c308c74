"""Every metric that some process publishes, with its labels."""

from collections.abc import Iterable

from prometheus_client.core import Metric

from penstock.common.metrics import REGISTRY
from penstock.deploy.exported import GAUGES

SCRAPED = {"job", "instance", "namespace"}
"""What Prometheus adds to every series; `namespace` on Kubernetes only."""
PROMETHEUS = {"up": set[str](), "ALERTS": {"alertname", "alertstate", "severity", "run"}}
"""Series that Prometheus makes itself."""

EXPORTER: dict[str, set[str]] = {name: set(labels) for name, (_, labels) in GAUGES.items()}
"""The exporter's, which are not in the registry above: it makes them when it is scraped."""


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
