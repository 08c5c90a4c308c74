"""The page and the files that an evaluation leaves. The same evaluation gives the same bytes."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.trainer.figures import sampled
from penstock.trainer.judging.experiments import Experiment
from penstock.trainer.judging.shown import Shown
from penstock.trainer.page import Card, count, finite, number, or_dash, render

TABLE_ROWS = 60
"""At most, in the data under a figure and in tables; the CSV has all."""
FOLDED_ROWS = 16
"""Tables with more rows are folded up."""


@dataclass(frozen=True)
class Part:
    """A figure or table as the page shows it, and how many of its rows there are."""

    card: Card
    file: str
    rows: int
    numeric: list[bool]
    wide: bool
    folded: bool


def shown_by(
    experiments: Sequence[Experiment], records: Mapping[str, dict[str, Any]]
) -> list[tuple[Experiment, list[Shown]]]:
    """What experiments with a record show, in order."""
    return [(one, one.show(records[one.name])) for one in experiments if one.name in records]


def render_evaluation(
    evaluation: Mapping[str, Any], sections: Sequence[tuple[Experiment, list[Shown]]]
) -> str:
    """The page of an evaluation: one HTML file that asks nothing of a network."""
    return render(
        "evaluation.html",
        evaluation=evaluation,
        subject=evaluation["subject"],
        environment=evaluation["environment"],
        warnings=evaluation["warnings"],
        tiles=_tiles(evaluation),
        sections=[(one, [_part(shown) for shown in all_shown]) for one, all_shown in sections],
    )


def csv_files(sections: Sequence[tuple[Experiment, list[Shown]]]) -> dict[str, str]:
    """File name -> CSV of each figure and table. None is an empty cell, numbers keep all their digits."""
    files = {}
    for _, all_shown in sections:
        for shown in all_shown:
            out = io.StringIO()
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(shown.columns)
            writer.writerows(shown.rows)
            files[file_name(shown.name)] = out.getvalue()
    return files


def file_name(name: str) -> str:
    """The CSV of what is shown under a name; names of dictionaries may hold anything."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name) + ".csv"


def cell(value: object) -> str:
    """A value as a table shows it."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return or_dash(value)
    if isinstance(value, int):
        # a number that names something is no quantity, but both read well up to four digits
        return count(value) if abs(value) >= 10_000 else str(value)
    return "0" if value == 0 else number(value)


def _part(shown: Shown) -> Part:
    drawn = str(shown.svg).lstrip()
    rows = [[cell(value) for value in row] for row in sampled(shown.rows, TABLE_ROWS)]
    numeric = [_is_numeric([row[i] for row in shown.rows]) for i in range(len(shown.columns))]
    return Part(
        Card(shown.title, shown.note, shown.svg, shown.columns, rows),
        file_name(shown.name),
        len(shown.rows),
        numeric,
        # a plain table, or anything but one drawing, takes the whole width
        wide=not drawn.startswith("<svg"),
        folded=not drawn and len(shown.rows) > FOLDED_ROWS,
    )


def _is_numeric(values: Sequence[object]) -> bool:
    return all(value is None or finite(value) is not None for value in values)


def _tiles(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    subject = evaluation["subject"]
    text, judged = subject["text"], evaluation["experiments"].get("overview", {}).get("dictionaries", {})
    tiles = [
        ("Dictionaries", count(len(subject["dictionaries"])), "judged together"),
        ("Held-out sequences", count(text["sequences"]), f"of {text['context']:,} tokens"),
        ("Trained at", count(subject["trained_context"]), "tokens per sequence"),
    ]
    for field, label, rank in (
        ("ce_recovered", "CE recovered", "highest"),
        ("kl", "KL", "lowest"),
    ):
        known = {name: one[field] for name, one in judged.items() if one[field] is not None}
        if known:
            best = (max if rank == "highest" else min)(known, key=lambda name: known[name])
            l0 = number(judged[best]["l0"])
            tiles.append((label, number(known[best]), f"{rank}: {best}, L0 {l0}"))
    if judged:
        clean = next(iter(judged.values()))["ce_clean"]
        tiles.append(("CE of the model", number(clean), "nats per token, nothing replaced"))
    return tiles
