"""The failure table of ARCHITECTURE.md names tests; they exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_row_of_the_failure_table_names_tests_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    section = text.split("## What happens when")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 25
    there = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rsplit(" | ", 1)[1])
        assert named, f"no test shows: {row}"
        assert set(named) <= there, f"{set(named) - there} does not exist"
