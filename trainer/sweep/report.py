"""A sweep's page: heatmaps over penalty and size, frontiers, densities; and every plot's data as CSV."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from penstock.trainer import figures as base
from penstock.trainer.figures import COLORS
from penstock.trainer.page import Card, count, number, percent, render
from penstock.trainer.sweep import figures
from penstock.trainer.sweep.cards import basins, heatmap_cards, loss_cards
from penstock.trainer.sweep.layers import Group, across_hooks, by_method, by_penalty
from penstock.trainer.sweep.measure import Record
from penstock.trainer.sweep.tables import all_fields, families, penalty_value, write_csv

DENSITIES = 18
"""Density histograms shown; the CSV has all."""
TABLE = (
    ("mmcs", "MMCS"),
    ("matched_cosine", "Matched"),
    ("duplicates", "Duplicates"),
    ("mmcs_with_larger", "With larger"),
    ("dead_features", "Dead"),
    ("l0", "L0"),
    ("explained_variance", "Expl. var."),
    ("reconstruction_loss", "Loss, train"),
    ("held_out_loss", "Loss, held out"),
)

COUNTS = ("duplicates", "dead_features")


@dataclass(frozen=True)
class SweepReport:
    """The page, and files beside it: name -> text."""

    html: str
    files: Mapping[str, str]


def render_sweep(
    records: Sequence[Record], densities: Mapping[str, Any], about: Mapping[str, Any]
) -> SweepReport:
    """The report of a sweep.

    Args:
        records: as `measure` gives them.
        densities: run/name -> histogram, as `evaluate` gives it; what was not evaluated is not there.
        about: `title`, `runs` (ids), `rows`, `steps`, `batch_rows`, `dataset`, `true_features` (or None).
    """
    written: dict[str, str] = {"dictionaries.csv": write_csv(all_fields(records))}
    groups: list[Group] = []
    for alike in across_hooks(families(records)):
        if len(alike) > 1:
            groups += by_method(alike, written)
            continue
        (family,) = alike
        cards = [*heatmap_cards(family, written), *loss_cards(family, written)]
        groups.append((family.title, by_penalty(family.penalty), cards, basins(family)))
    html = render(
        "sweep.html",
        about=about,
        tiles=_tiles(records, about),
        groups=groups,
        frontiers=_frontiers(records, written),
        densities=_densities(records, densities, written),
        columns=[title for _, title in TABLE],
        rows=[_row(record) for record in records],
        files=sorted(written),
    )
    return SweepReport(html, written)


def _tiles(records: Sequence[Record], about: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    largest = max(records, key=lambda r: r["d_sae"], default=None)
    tiles = [
        ("Dictionaries", count(len(records)), f"in {len(about['runs'])} run{'s'[: len(about['runs']) != 1]}"),
        ("Steps", count(about["steps"]), f"of {count(about['batch_rows'])} rows"),
    ]
    if largest is not None:
        tiles.append(("Largest dictionary tested", count(largest["d_sae"]), "features"))
    for field, label, write in (
        ("mmcs", "MMCS", number),
        ("mmcs_with_larger", "MMCS with larger", number),
        ("explained_variance", "Explained variance", percent),
    ):
        known = [r for r in records if r.get(field) is not None and math.isfinite(r[field])]
        if known:
            best = max(known, key=lambda r: r[field])
            tiles.append((label, write(best[field]), f"best, {best['name']}"))
    return tiles[:6]


def _frontiers(records: Sequence[Record], written: dict[str, str]) -> list[Card]:
    """L0 against explained variance, a line per hook point, kind and size."""
    groups: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    data = []
    for record in records:
        l0 = record["l0"] if record["held_out_l0"] is None else record["held_out_l0"]
        variance = record["explained_variance"]
        where = "held out"
        if variance is None:
            variance, where = record["train_explained_variance"], "in training"
        data.append({k: record[k] for k in ("name", "run", "hook_name", "architecture", "d_sae")})
        data[-1] |= {"l0": l0, "explained_variance": variance, "measured": where}
        if l0 is not None and variance is not None and math.isfinite(variance):
            key = record["hook_name"], record["architecture"], record["d_sae"]
            groups.setdefault(key, []).append((l0, variance))
    written["frontier.csv"] = write_csv(data)
    cards = []
    for hook in dict.fromkeys(key[0] for key in groups):
        chosen = {key: sorted(points) for key, points in groups.items() if key[0] == hook}
        series = list(enumerate(chosen.values()))
        told = f"Explained variance against L0 on {hook}, a line per kind and size"
        axes = ("L0, active features per row", "explained variance")
        svg = figures.lines(f"frontier {hook}", told, series, axes, log_y=False)
        legend = [(f"{kind} {size:,}", f"--s{i % COLORS}", "") for i, (_, kind, size) in enumerate(chosen)]
        rows = [
            [f"{kind} {size:,}", number(l0), number(variance)]
            for (_, kind, size), points in chosen.items()
            for l0, variance in points
        ]
        header = ("Kind and size", "L0", "Explained variance")
        cards.append(
            Card(
                hook,
                "Explained variance over L0, a dot per penalty: up and to the left is better",
                Markup(svg),
                header,
                rows,
                legend,
            )
        )
    return cards


def _densities(
    records: Sequence[Record], densities: Mapping[str, Any], written: dict[str, str]
) -> list[Card]:
    known = [r for r in records if densities.get(f"{r['run']}/{r['name']}")]
    data = []
    for record in known:
        histogram = densities[f"{record['run']}/{record['name']}"]
        edges, never = histogram["log10_edges"], histogram["never_active"]
        about = {"name": record["name"], "run": record["run"]}
        data.append(about | {"log10_from": None, "log10_to": None, "features": never})
        data += [
            about | {"log10_from": low, "log10_to": high, "features": n}
            for low, high, n in zip(edges, edges[1:], histogram["counts"], strict=False)
        ]
    if data:
        written["densities.csv"] = write_csv(data)
    cards = []
    for number_, record in enumerate(base.sampled(_best_of_each_size(known), DENSITIES)):
        histogram = densities[f"{record['run']}/{record['name']}"]
        edges, counts, never = (histogram[k] for k in ("log10_edges", "counts", "never_active"))
        told = f"Histogram of how often the features of {record['name']} are active; {never} never are"
        svg = base.density(f"density {number_}", told, base.series_color(number_), edges, counts, never)
        l0 = record["l0"] if record["held_out_l0"] is None else record["held_out_l0"]
        note = f"{count(record['d_sae'])} features, {count(never)} never active; L0 {number(l0)}"
        rows = [
            ["never", count(never)],
            *([f"{10**e:.2g}", count(n)] for e, n in zip(edges, counts, strict=False)),
        ]
        cards.append(Card(record["name"], note, Markup(svg), ("Share of rows, from", "Features"), rows))
    return cards


def _best_of_each_size(records: Sequence[Record]) -> list[Record]:
    """Of each kind, hook point and size the SAE with the best MMCS or, without truth, of middling penalty."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["hook_name"], record["architecture"], record["d_sae"]), []).append(record)
    chosen = []
    for members in groups.values():
        ordered = sorted(members, key=penalty_value)
        middle = ordered[len(ordered) // 2]
        known = [r for r in members if r["mmcs"] is not None and math.isfinite(r["mmcs"])]
        chosen.append(max(known, key=lambda r: r["mmcs"]) if known else middle)
    return chosen


def _row(record: Record) -> list[str]:
    written = ((count if field in COUNTS else number)(record.get(field)) for field, _ in TABLE)
    return [record["name"], *written]
