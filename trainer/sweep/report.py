"""A sweep's page: heatmaps over penalty and size, frontiers, densities; and every plot's data as CSV."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from penstock.trainer import figures as base
from penstock.trainer.figures import COLORS
from penstock.trainer.methods.sparsity import basin
from penstock.trainer.page import Card, count, number, percent, render
from penstock.trainer.sweep import figures
from penstock.trainer.sweep.measure import Record
from penstock.trainer.sweep.tables import SYMBOLS, Family, all_fields, families, penalty_value, write_csv

HEATMAPS = (
    # field, title, what it says, whether colours are by the logarithm
    ("mmcs", "MMCS with the true features", "1: each of them is found", False),
    ("matched_cosine", "Matched cosine", "As MMCS, but no feature may stand for two", False),
    ("duplicates", "Duplicates", "Features with a cosine of 0.9 or more to an earlier one", True),
    ("dead_features", "Dead features", "Not active for dead_after_rows rows", True),
    ("dead_minibatches", "Dead features, 10 minibatches", "Not active in the last ten minibatches", True),
    ("reconstruction_loss", "Reconstruction loss", "Squared error of the last window; low is good", True),
    ("l1", "L1", "Mean sum of feature activations", True),
    ("ssll", "SSLL", "Sum of scaled log losses: low where both are, and where L1 vanishes", False),
    ("ssll_weighted", "SSLL with λ", "The same with the L1 as the loss has it, times λ", False),
    ("mmcs_with_larger", "MMCS with larger", "How much of larger dictionaries it holds", False),
    ("found_by_larger", "Found by larger", "How much of it larger dictionaries find again", False),
    ("seed_agreement", "Agreement between seeds", "MMCS with the same from other seeds", False),
    (
        "convergence",
        "Convergence",
        "MMCS between the two newest checkpoints; 1: features have settled",
        False,
    ),
    ("explained_variance", "Explained variance", "On held-out rows", False),
    ("ce_recovered", "CE recovered", "On held-out text", False),
    ("l0", "L0", "Active features per row", True),
)
DENSITIES = 12
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
    groups = []
    for family in families(records):
        cards = [*_heatmaps(family, written), *_losses(family, written)]
        groups.append((family.title, cards, _basins(family)))
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


def _heatmaps(family: Family, written: dict[str, str]) -> list[Card]:
    penalties, sizes = family.penalties, family.sizes
    if len(penalties) * len(sizes) < 2:
        return []
    columns, names = _short_labels(penalties), family.size_names()
    axes = (_penalty_label(family), "features")
    cards = []
    for field, title, note, log in HEATMAPS:
        cells = family.cells(field)
        if all(value is None for line in cells for value in line):
            continue
        told = f"{title} of {family.title} by penalty and size"
        svg = figures.heatmap(f"{family.title} {field}", told, columns, names, cells, axes, log=log)
        data = [
            {"d_sae": size, "penalty": penalty, field: cells[y][x]}
            for y, size in enumerate(sizes)
            for x, penalty in enumerate(penalties)
        ]
        written[_file(family, f"heatmap-{field}")] = write_csv(data)
        lines = [[name, *(number(value) for value in line)] for name, line in zip(names, cells, strict=True)]
        cards.append(Card(title, note, Markup(svg), ("Features", *columns), lines))
    return cards


def _losses(family: Family, written: dict[str, str]) -> list[Card]:
    """Both losses over the penalty, a line per size: where they stick."""
    cards = []
    for field, title in (("reconstruction_loss", "Reconstruction loss"), ("l1", "L1")):
        cells = family.cells(field)
        if len(family.penalties) < 2 or all(value is None for line in cells for value in line):
            continue
        series = [
            (color, [(x, y) for x, y in zip(family.penalties, line, strict=True) if y is not None])
            for color, line in enumerate(cells)
        ]
        told = f"{title} of {family.title} over the penalty, a line per size"
        svg = figures.lines(f"{family.title} {field} lines", told, series, (_penalty_label(family), title))
        rows = [
            {"d_sae": size, "penalty": x, field: y}
            for size, (_, points) in zip(family.sizes, series, strict=True)
            for x, y in points
        ]
        written[_file(family, f"sticky-{field}")] = write_csv(rows)
        legend = [(name, f"--s{color % COLORS}", "") for color, name in enumerate(family.size_names())]
        lines = [[count(row["d_sae"]), number(row["penalty"]), number(row[field])] for row in rows]
        header = ("Features", _penalty_label(family), title)
        cards.append(Card(f"{title} by penalty", "A line per size", Markup(svg), header, lines, legend))
    return cards


def _basins(family: Family) -> list[str]:
    """Where the losses are sticky, in words."""
    said = []
    for field, what in (("reconstruction_loss", "reconstruction loss"), ("l1", "L1")):
        for name, line in zip(family.size_names(), family.cells(field), strict=True):
            known = [(p, v) for p, v in zip(family.penalties, line, strict=True) if v is not None and p > 0]
            found = basin([p for p, _ in known], [v for _, v in known])
            if found is not None:
                first, last = known[found[0]][0], known[found[1]][0]
                symbol = _penalty_label(family)
                said.append(f"{name} features: {what} flat from {symbol} {first:.2g} to {last:.2g}")
    return said


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
        cards.append(Card(hook, "Up and to the left is better", Markup(svg), header, rows, legend))
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
        svg = base.density(f"density {number_}", told, number_ % COLORS, edges, counts, never)
        note = f"{count(record['d_sae'])} features, {count(never)} never active"
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


def _short_labels(values: Sequence[float]) -> list[str]:
    """To two digits, where these tell them apart."""
    labels = [f"{value:.2g}" for value in values]
    return labels if len(set(labels)) == len(values) and max(values) < 100 else [f"{v:g}" for v in values]


def _row(record: Record) -> list[str]:
    return [record["name"], *(number(record.get(field)) for field, _ in TABLE)]


def _penalty_label(family: Family) -> str:
    return SYMBOLS.get(family.penalty or "", family.penalty or "penalty")


def _file(family: Family, what: str) -> str:
    """One name per family and plot."""
    hook = "".join(c if c.isalnum() or c in "._-" else "_" for c in family.hook_name)
    return f"{what}-{family.architecture}-{hook}.csv"
