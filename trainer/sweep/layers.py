"""The same grid on several hook points: a panel for each of them, method by method.

Methods are those of the interim report "Taking features out of superposition with sparse autoencoders" that
need no true features: dead features, sticky losses, and dictionaries compared with larger ones.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from penstock.trainer.page import Card
from penstock.trainer.sweep.cards import HEATMAPS, basins, heatmap_card, loss_cards
from penstock.trainer.sweep.tables import Family

Group = tuple[str, str, Sequence[Card], Sequence[str]]
"""Title, what it says, cards, and lines about them."""

ALIKE = 3
"""Hook points with the same grid from which on the page goes by method instead of by hook point."""
MEANING = {
    "alpha": " α is the penalty of a loss that divides the reconstruction error by the width of rows and the "
    "L1 by the number of features.",
    "l1_coefficient": " λ is the penalty that was trained with.",
}
METHODS = {
    "dead_features": "Method 1: ",
    "dead_minibatches": "Method 1: ",
    "reconstruction_loss": "Method 2: ",
    "l1": "Method 2: ",
    "ssll": "Method 2: ",
    "mmcs_with_larger": "Method 3: ",
}
"""Figures of the report's methods; they come first."""


def by_penalty(penalty: str | None) -> str:
    """What the axes of heatmaps are."""
    return f"By penalty and size; the mean where several seeds were trained.{MEANING.get(penalty or '', '')}"


def across_hooks(families: Sequence[Family]) -> list[list[Family]]:
    """Families by themselves, or together where enough hook points have the same grid of the same kind."""
    grids: dict[tuple[object, ...], list[Family]] = {}
    for family in families:
        grid = family.architecture, family.penalty, tuple(family.penalties), tuple(family.sizes)
        grids.setdefault(grid, []).append(family)
    groups: list[list[Family]] = []
    for alike in grids.values():
        groups += [alike] if len(alike) >= ALIKE else [[family] for family in alike]
    return groups


def by_method(alike: Sequence[Family], written: dict[str, str]) -> list[Group]:
    """A group for each figure, with a panel per hook point; all heatmaps of a group share their colours."""
    kind = alike[0].architecture
    groups: list[Group] = []
    for which in sorted(HEATMAPS, key=lambda heatmap: METHODS.get(heatmap[0], "Z")):
        field, what, note, _ = which
        among = _values(alike, field)
        cards = [heatmap_card(family, which, family.hook_name, written, among) for family in alike]
        # what a figure says stands above all of its panels
        panels = [replace(card, note="") for card in cards if card is not None]
        if panels:
            axes = by_penalty(alike[0].penalty)
            said = f"{note}. A panel for each hook point, with the same colours in all of them. {axes}"
            groups.append((f"{METHODS.get(field, '')}{what}, {kind}", said, panels, []))
    return groups[: _after_method_2(groups)] + _sticky(alike, written) + groups[_after_method_2(groups) :]


def _values(alike: Sequence[Family], field: str) -> list[float]:
    """Those of a figure on all hook points."""
    cells = (value for family in alike for line in family.cells(field) for value in line)
    return [value for value in cells if value is not None and math.isfinite(value)]


def _after_method_2(groups: Sequence[Group]) -> int:
    return sum(title < "Method 3" for title, *_ in groups if title.startswith("Method"))


def _sticky(alike: Sequence[Family], written: dict[str, str]) -> list[Group]:
    """Both losses over the penalty, and where they are flat."""
    by_hook = [(family, loss_cards(family, written)) for family in alike]
    groups: list[Group] = []
    for title in dict.fromkeys(card.title for _, cards in by_hook for card in cards):
        panels = [
            replace(card, title=family.hook_name)
            for family, cards in by_hook
            for card in cards
            if card.title == title
        ]
        what = title.split(" by ")[0].lower()
        said = [
            f"{family.hook_name}, {line}"
            for family in alike
            for line in basins(family)
            if f": {what} flat" in line.lower()
        ]
        note = "A line per size, a panel for each hook point. Penalties over which it is flat are good ones."
        groups.append((f"Method 2: {title}, {alike[0].architecture}", note, panels, said))
    return groups
