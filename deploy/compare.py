"""`penstock compare`: evaluations of several models side by side, as a page, a CSV file and lines."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from penstock.common.errors import UserError
from penstock.trainer.figures import COLORS
from penstock.trainer.judging.beside import Judged, read_judged, side_by_side
from penstock.trainer.judging.shown import Shown
from penstock.trainer.page import Card, count, number, render

FILES = ("summary.json", "evaluation.json")


def compare(sources: Sequence[str], out: Path) -> list[str]:
    """Write the page and the CSV files of its figures beside it; gives the table in lines.

    Args:
        sources: a summary.json or evaluation.json, or a directory that holds one; `LABEL=PATH` to name it.

    Raises:
        UserError: one is not there or is something else, or there are fewer than two.
    """
    if len(sources) < 2:
        raise UserError("give two evaluations at least: there is nothing to compare with")
    shown = side_by_side([_read(source) for source in sources])
    out.parent.mkdir(parents=True, exist_ok=True)
    for one in shown:
        (out.parent / f"{one.name}.csv").write_text(_csv(one), encoding="utf-8")
    table, *figures = shown
    labels = table.columns[3:]
    legend = [(label, f"--s{i % COLORS}", "") for i, label in enumerate(labels)]
    cards = [
        Card(one.title, one.note, one.svg, one.columns, [_cells(row) for row in one.rows], legend)
        for one in figures
    ]
    out.write_text(
        render(
            "beside.html", table=table, rows=[_cells(row) for row in table.rows], labels=labels, cards=cards
        ),
        encoding="utf-8",
    )
    return _lines(table)


def _read(source: str) -> Judged:
    label, separator, path = source.partition("=") if not Path(source).exists() else (source, "", "")
    file = Path(path if separator else source).expanduser()
    if file.is_dir():
        there = [file / name for name in FILES if (file / name).is_file()]
        if not there:
            raise UserError(f"{file} holds neither {' nor '.join(FILES)}; `penstock report` writes the first")
        file = there[0]
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; `penstock report` writes a summary.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: it is not JSON") from error
    if not isinstance(record, dict):
        raise UserError(f"{file} is no evaluation: it holds no mapping")
    judged = read_judged(record, str(file))
    return replace(judged, label=label) if separator else judged


def _csv(shown: Shown) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(shown.columns)
    writer.writerows(["" if cell is None else cell for cell in row] for row in shown.rows)
    return text.getvalue()


def _cells(row: Sequence[object]) -> list[str]:
    return [cell if isinstance(cell, str) else _written(cell) for cell in row]


def _written(cell: object) -> str:
    return count(cell) if isinstance(cell, int) else number(cell)


def _lines(table: Shown) -> list[str]:
    cells = [table.columns, *(_cells(row) for row in table.rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(table.columns))]
    return [
        "  ".join(
            c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
