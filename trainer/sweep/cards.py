"""The cards of a family: heatmaps over penalty and size, losses by penalty, and where these are sticky."""

from collections.abc import Sequence

from markupsafe import Markup

from penstock.trainer.figures import COLORS
from penstock.trainer.methods.sparsity import basin
from penstock.trainer.page import Card, count, number
from penstock.trainer.sweep import figures
from penstock.trainer.sweep.tables import SYMBOLS, Family, write_csv

Heatmap = tuple[str, str, str, bool]

HEATMAPS: tuple[Heatmap, ...] = (
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


def heatmap_cards(family: Family, written: dict[str, str]) -> list[Card]:
    """Every figure of a family that has values, as a heatmap; their data go into `written`."""
    cards = (heatmap_card(family, which, which[1], written) for which in HEATMAPS)
    return [card for card in cards if card is not None]


def heatmap_card(
    family: Family,
    which: Heatmap,
    title: str,
    written: dict[str, str],
    among: Sequence[float] | None = None,
) -> Card | None:
    """One figure of a family; None where there is nothing to show.

    Args:
        title: of the card.
        among: what colours reach over, where several heatmaps are to be compared; else its own values.
    """
    field, what, note, log = which
    penalties, sizes = family.penalties, family.sizes
    cells = family.cells(field)
    if len(penalties) * len(sizes) < 2 or all(value is None for line in cells for value in line):
        return None
    columns, names = _short_labels(penalties), family.size_names()
    told, axes = f"{what} of {family.title} by penalty and size", (_penalty_label(family), "features")
    svg = figures.heatmap(f"{family.title} {field}", told, columns, names, cells, axes, log=log, among=among)
    data = [
        {"d_sae": size, "penalty": penalty, field: cells[y][x]}
        for y, size in enumerate(sizes)
        for x, penalty in enumerate(penalties)
    ]
    written[_file(family, f"heatmap-{field}")] = write_csv(data)
    lines = [[name, *(number(value) for value in line)] for name, line in zip(names, cells, strict=True)]
    return Card(title, note, Markup(svg), ("Features", *columns), lines)


def loss_cards(family: Family, written: dict[str, str]) -> list[Card]:
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


def basins(family: Family) -> list[str]:
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


def _short_labels(values: Sequence[float]) -> list[str]:
    """To two digits, where these tell them apart."""
    labels = [f"{value:.2g}" for value in values]
    return labels if len(set(labels)) == len(values) and max(values) < 100 else [f"{v:g}" for v in values]


def _penalty_label(family: Family) -> str:
    return SYMBOLS.get(family.penalty or "", family.penalty or "penalty")


def _file(family: Family, what: str) -> str:
    """One name per family and plot."""
    hook = "".join(c if c.isalnum() or c in "._-" else "_" for c in family.hook_name)
    return f"{what}-{family.architecture}-{hook}.csv"
