"""The page and the files that an evaluation leaves. The same evaluation gives the same bytes."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.trainer.figures import sampled
from penstock.trainer.judging.experiments import Experiment
from penstock.trainer.judging.headings import heading
from penstock.trainer.judging.shown import AT_ONCE, Shown, Table
from penstock.trainer.page import Card, count, finite, number, or_dash, render

TABLE_ROWS = 60
"""At most, in tables; the CSV has all."""
FIGURE_ROWS = 20
"""At most, in the data under a figure."""
_WRITTEN = re.compile(r"[−—]?[\d.]* (±|[^\w\s])")


@dataclass(frozen=True)
class Part:
    """A figure or table as the page shows it, and how many rows the page's table could have."""

    card: Card
    rows: int
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
        return count(value) if abs(value) >= 10_000 else str(value).replace("-", "\N{MINUS SIGN}")
    return "0" if value == 0 else number(value)


def _part(shown: Shown) -> Part:
    drawn = str(shown.svg).lstrip()
    columns, rows = (shown.columns, shown.rows) if shown.table is None else _both(shown.table)
    some = sampled(rows, FIGURE_ROWS if drawn else TABLE_ROWS)
    cells = [[cell(value) for value in row] for row in some]
    numeric = [_is_numeric([row[i] for row in rows]) for i in range(len(columns))]
    file = file_name(shown.name)
    told = f"{count(len(some))} of {count(len(rows))} rows" if len(some) < len(rows) else ""
    source = f"{told}; all in {file}" if told else f"All in {file}"
    headings = [heading(column) for column in columns]
    return Part(
        Card(shown.title, shown.note, shown.svg, headings, cells, shown.legend, numeric, source),
        len(rows),
        # a plain table, or anything but one drawing, takes the whole width
        wide=not drawn.startswith("<svg"),
        folded=not drawn and (shown.folded or len(rows) > AT_ONCE),
    )


def _both(table: Table) -> tuple[list[str], list[list[object]]]:
    return table.columns, table.rows


def _is_numeric(values: Sequence[object]) -> bool:
    """Numbers, written ones among them; they stand to the right."""
    return all(
        value is None
        or finite(value) is not None
        or (isinstance(value, str) and _WRITTEN.match(value) is not None)
        for value in values
    )


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
