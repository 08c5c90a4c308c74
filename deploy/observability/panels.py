"""What a dashboard is described by, and how Grafana has it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["timeseries", "stat", "table"]

SOURCE = {"type": "prometheus", "uid": "prometheus"}
"""The provisioned data source."""
COLUMNS = 24
TAG = "penstock"
"""Every dashboard has it, so that each links to the others."""
RUN = 'run=~"$run"'
"""Matches the runs chosen at the top of a dashboard."""


@dataclass(frozen=True)
class Query:
    """PromQL, and what its series are called: text with `{{label}}`.

    `may_be_empty`: why there is no data where all is well, and runs are trained.
    """

    expr: str
    legend: str = "__auto"
    may_be_empty: str | None = None


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        unit: Grafana's name for it: `s`, `bytes`, `percentunit`, `short`, …
        text: what it shows and what to look for.
        limits: value -> colour from there on.
        stacked: areas on top of each other.
        log: logarithmic axis.
    """

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    text: str = ""
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    limits: dict[float, str] = field(default_factory=dict)
    stacked: bool = False
    log: bool = False
    top: float | None = None


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    """`name`: of its file, and its uid after `penstock-`."""

    name: str
    title: str
    text: str
    rows: Sequence[Row]

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]


def quantiles(histogram: str) -> list[Query]:
    """Median and 99th percentile of a histogram's observations, of all processes together."""
    rate = f"sum by (le) (rate({histogram}_bucket[$__rate_interval]))"
    return [
        Query(f"histogram_quantile(0.5, {rate})", "median"),
        Query(f"histogram_quantile(0.99, {rate})", "99 %"),
    ]


TAKEOVERS = 'sae_takeover_timestamp_seconds{run=~"$run"} * 1000'
"""Each takeover is marked at its own time, in milliseconds: no scrape needs to see it happen."""
RUNS = "label_values(penstock_run_position, run)"


def render(dashboard: Dashboard) -> dict[str, Any]:
    """A dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in dashboard.rows:
        panels.append(_row(row, len(panels) + 1, y))
        y += 1
        x = tallest = 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            panels.append(_panel(panel, len(panels) + 1, x, y))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return {
        "uid": f"penstock-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.text,
        "tags": [TAG],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "annotations": {"list": [_takeovers()]},
        "links": [_links()],
        "templating": {"list": [_runs()]},
        "panels": panels,
    }


def _row(row: Row, number: int, y: int) -> dict[str, Any]:
    at = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
    return {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": at, "panels": []}


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    steps = [{"color": "green", "value": None}]
    steps += [{"color": colour, "value": value} for value, colour in sorted(panel.limits.items())]  # type: ignore[dict-item]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
    }
    if panel.kind == "timeseries":
        defaults["custom"] = _drawing(panel)
        defaults["min"] = None if panel.log else 0
    if panel.top is not None:
        defaults["max"] = panel.top
    instant = panel.kind != "timeseries"
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel.kind),
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "instant": instant,
                "range": not instant,
                "format": "table" if panel.kind == "table" else "time_series",
            }
            for i, query in enumerate(panel.queries)
        ],
    }


def _drawing(panel: Panel) -> dict[str, Any]:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.stacked else 0,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if panel.log else {"type": "linear"},
        "thresholdsStyle": {"mode": "line" if panel.limits else "off"},
    }


def _options(kind: Kind) -> dict[str, Any]:
    if kind == "timeseries":
        return {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    if kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "none",
            "textMode": "auto",
        }
    return {"showHeader": True}


def _takeovers() -> dict[str, Any]:
    return {
        "name": "Takeovers",
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "orange",
        "expr": TAKEOVERS,
        "step": "30s",
        "useValueForTime": True,
        "titleFormat": "Takeover",
        "textFormat": "{{run}} by {{instance}}",
        "tagKeys": "run",
    }


def _links() -> dict[str, Any]:
    return {
        "type": "dashboards",
        "title": "Penstock",
        "tags": [TAG],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
    }


def _runs() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": RUNS, "refId": "runs"},
        "definition": RUNS,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }
