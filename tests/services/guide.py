"""What the documents tell operators to type and to look for, as data."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "store", "producer", "trainer", "deploy")
OPERATORS = [
    *(ROOT / "docs" / f"{name}.md" for name in ("operations", "observability", "dashboards", "planning")),
    ROOT / "docs" / "object-storage.md",
    *sorted((ROOT / "docs" / "runbooks").glob("*.md")),
]
"""The pages that operators work from."""

_FENCED = re.compile(r"^ *```(?:sh)?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_ANY_FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^\n)((?:^    \S.*\n)+)", re.MULTILINE)
_SPAN = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Line:
    """A command of a page, split as a shell does. `exact` if it is shown to be typed as it stands."""

    page: str
    words: tuple[str, ...]
    exact: bool

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"

    def after(self, *start: str) -> tuple[str, ...] | None:
        """The words that follow, if it begins so."""
        return self.words[len(start) :] if self.words[: len(start)] == start else None


def commands(page: Path) -> Iterator[Line]:
    """Every line of its blocks, and every span of code that begins as a command does."""
    text = page.read_text()
    for block in [*_FENCED.findall(text), *_INDENTED.findall(text)]:
        for line in block.replace("\\\n", " ").splitlines():
            if words := _split(line):
                yield Line(page.name, words, exact=True)
    for span in spans(page):
        if re.match(r"(penstock|docker|kubectl) \w", span) and (words := _split(span)):
            yield Line(page.name, words, exact=False)


def spans(page: Path) -> list[str]:
    """What stands between backquotes outside blocks, in one line each."""
    return [" ".join(span.split()) for span in _SPAN.findall(_ANY_FENCED.sub("", page.read_text()))]


def _split(line: str) -> tuple[str, ...]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quotation that goes on, as in a loop: no command of ours is in it
        return ()
    for end in ("|", "&&", ";"):
        if end in words:
            words = words[: words.index(end)]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return tuple(words)


def said() -> list[str]:
    """Every text in the product's code; what is put in at run time is `…`."""
    found = []
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            nodes = list(ast.walk(ast.parse(file.read_text())))
            # docstrings are said to nobody
            silent = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            found += [_text(node) for node in nodes if id(node) not in silent]
    return [text for text in found if text]


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "…"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", "…", node.value)
    return ""


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _ANY_FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Targets within the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", _SPAN.sub("", _ANY_FENCED.sub("", page.read_text())))
    return [target for target in found if "://" not in target]
