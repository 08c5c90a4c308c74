"""Cloze tasks made of Python text that no model of ours was trained on.

Text: the running interpreter's own sources, those of them that are held out (`common/documents.py`).

    parameter   a parameter of the function, used in its body
    attribute   an attribute of self that the function has used before
    loop        the variable of a `for`, used in its body
    import      a name that a line above imports, used in a function (the lines between are taken out)
    bracket     the bracket that closes what is open
    quote       the quote that closes a string which stood before in the lines above
    keyword     except, finally, in, as: what the statement that was begun asks for
    assign      from a template: self.x = x for each parameter of __init__

The same interpreter, tokenizer and seed give the same items. Sites are taken from documents (brackets, quotes
and keywords: from kinds of them) in turn, so that no long file decides.
"""

import ast
import io
import random
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from penstock.common.documents import Document, is_held_out, read_documents, standard_library_paths
from penstock.common.errors import UserError
from penstock.trainer.judging.tasks.cloze import Item, Maker

LINES_ABOVE = 6
"""Lines shown above the statement, for tasks that do not begin with a function."""
IMPORTS = 5
"""Import statements shown, at most."""
CHARACTERS_PER_TOKEN = 8
"""More than this many characters per token of room is not worth tokenising."""
OPEN = {"(": ")", "[": "]", "{": "}"}
KEYWORDS = ("except", "finally", "in", "as")

_WORDS = """
name path value index parent width height label color timeout encoding buffer handler callback source target
prefix suffix limit count offset length mode flags level message status result context session config options
default factory loop queue lock stream reader writer parser token node root key data size owner
"""
_CLASSES = "Entry Window Message Server Client Record Buffer Parser Handler Session Widget Request"


@dataclass(frozen=True)
class Site:
    """Where an answer stands: text[cut:], after head + text[start:cut]; sites of a group take turns."""

    text: str
    start: int
    cut: int
    answer: str
    group: str
    head: str = ""


@dataclass(frozen=True)
class Source:
    """A document that parses, with where its lines begin."""

    path: str
    text: str
    tree: ast.Module
    lines: Sequence[int]

    def at(self, line: int, column: int) -> int:
        """Offset of a place, lines from 1; text is ASCII, so that columns count characters."""
        return self.lines[line - 1] + column

    def of(self, statement: ast.stmt) -> str:
        """Its text."""
        end = self.at(statement.end_lineno or statement.lineno, statement.end_col_offset or 0)
        return self.text[self.at(statement.lineno, statement.col_offset) : end]

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        """Python's own; none of text that cannot be taken apart."""
        try:
            return list(tokenize.generate_tokens(io.StringIO(self.text).readline))
        except (tokenize.TokenError, SyntaxError):
            return []

    def above(self, line: int) -> int:
        """Offset of the line that is shown first before this one."""
        return self.lines[max(1, line - LINES_ABOVE) - 1]


def python_items(
    maker: Maker, per_task: int, seed: int, documents: Sequence[Document] | None = None
) -> list[Item]:
    """`per_task` items of each task, or as many as there are.

    Args:
        documents: instead of held-out ones of the running interpreter.

    Raises:
        UserError: a task has none.
    """
    sites: dict[str, list[Site]] = {task: [] for task in _TASKS}
    # one document after the other: what was found of a document's structure is large
    for source in _sources(held_out_documents() if documents is None else documents):
        for task, of in _TASKS.items():
            sites[task] += of(source)
    found: list[Item] = []
    for task, every in sites.items():
        made = _made(task, _in_turn(every, random.Random(f"{seed}:{task}")), maker, per_task)
        if not made:
            raise UserError(f"cloze: this interpreter's sources give no item of task {task!r}; give files")
        found += made
    return found + _made("assign", _assignments(random.Random(f"{seed}:assign")), maker, per_task)


def held_out_documents() -> list[Document]:
    """Held-out sources of the running interpreter, by path."""
    return list(read_documents([pair for pair in standard_library_paths() if is_held_out(pair[0])]))


def _made(task: str, sites: Iterator[Site], maker: Maker, per_task: int) -> list[Item]:
    made: dict[str, Item] = {}
    for site in sites:
        if site.cut - site.start > CHARACTERS_PER_TOKEN * maker.limit:
            continue
        behind = site.cut + len(site.answer)
        end = site.text.find("\n", behind) + 1 or len(site.text)
        prompt = site.head + site.text[site.start : site.cut]
        item = maker.item(task, prompt, site.answer, site.text[behind:end], whole=True)
        if item is not None:
            made.setdefault(item.prompt, item)
        if len(made) == per_task:
            break
    return list(made.values())


def _in_turn(sites: Sequence[Site], generator: random.Random) -> Iterator[Site]:
    """One of each group after the other, in a random order."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site)
    names = sorted(groups)
    generator.shuffle(names)
    for members in groups.values():
        generator.shuffle(members)
    while names:
        for name in names:
            yield groups[name].pop()
        names = [name for name in names if groups[name]]


def _sources(documents: Sequence[Document]) -> Iterator[Source]:
    for document in documents:
        text = document.text
        if not text.isascii() or "\r" in text or "\f" in text:
            continue
        try:
            with warnings.catch_warnings():
                # of no concern here: escapes in strings of somebody else's tests
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        lines = [0]
        for line in text.splitlines(keepends=True):
            lines.append(lines[-1] + len(line))
        yield Source(document.path, text, tree, lines)


def _functions(source: Source) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Functions, with where the line of their `def` begins."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, source.at(node.lineno, 0)


def _loads(body: Sequence[ast.stmt]) -> Iterator[ast.Name]:
    """Names that are read."""
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                yield node


def _parameters(source: Source) -> Iterator[Site]:
    for function, start in _functions(source):
        named = function.args
        every = {one.arg for one in (*named.posonlyargs, *named.args, *named.kwonlyargs)} - {"self", "cls"}
        for name in _loads(function.body):
            if name.id in every:
                yield Site(source.text, start, source.at(name.lineno, name.col_offset), name.id, source.path)


def _attributes(source: Source) -> Iterator[Site]:
    for function, start in _functions(source):
        places: list[tuple[int, str]] = []
        for node in (inner for statement in function.body for inner in ast.walk(statement)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
                and node.end_lineno
                and node.end_col_offset
            ):
                places.append((source.at(node.end_lineno, node.end_col_offset) - len(node.attr), node.attr))
        before: set[str] = set()
        for cut, name in sorted(places):
            if name in before:
                yield Site(source.text, start, cut, name, source.path)
            before.add(name)


def _loops(source: Source) -> Iterator[Site]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            uses = [
                source.at(name.lineno, name.col_offset)
                for name in _loads(node.body)
                if name.id == node.target.id
            ]
            if uses:
                yield Site(source.text, source.above(node.lineno), min(uses), node.target.id, source.path)


def _imports(source: Source) -> Iterator[Site]:
    statements = [s for s in source.tree.body if isinstance(s, ast.Import | ast.ImportFrom)]
    by_name = {alias.asname or alias.name: one for one in statements for alias in one.names}
    for function, start in _functions(source):
        for name in _loads(function.body):
            if name.id not in by_name:
                continue
            needed = by_name[name.id]
            others = [one for one in statements if one is not needed][: IMPORTS - 1]
            shown = sorted([needed, *others], key=lambda one: one.lineno)
            head = "".join(source.of(one) + "\n" for one in shown) + "\n\n"
            cut = source.at(name.lineno, name.col_offset)
            yield Site(source.text, start, cut, name.id, source.path, head)


def _brackets(source: Source) -> Iterator[Site]:
    opened: list[tokenize.TokenInfo] = []
    for token in source.tokens:
        if token.type != tokenize.OP:
            continue
        if token.string in OPEN:
            opened.append(token)
        elif token.string in OPEN.values() and opened:
            begin = opened.pop()
            # an empty pair asks for nothing to be remembered
            if source.at(*token.start) > source.at(*begin.end):
                yield Site(
                    source.text,
                    source.above(begin.start[0]),
                    source.at(*token.start),
                    token.string,
                    token.string,
                )


def _quotes(source: Source) -> Iterator[Site]:
    known: dict[str, int] = {}
    for token in source.tokens:
        if token.type != tokenize.STRING or token.start[0] != token.end[0] or len(token.string) < 4:
            continue
        quote = token.string[-1]
        if token.string[0] != quote or token.string.startswith(quote * 3):
            continue
        begin, line = source.above(token.start[0]), known.get(token.string)
        known[token.string] = source.at(*token.start)
        if line is not None and line >= begin:
            yield Site(source.text, begin, source.at(*token.end) - 1, quote, quote)


def _keywords(source: Source) -> Iterator[Site]:
    for token in source.tokens:
        if token.type == tokenize.NAME and token.string in KEYWORDS:
            start = source.above(token.start[0])
            yield Site(source.text, start, source.at(*token.start), token.string, token.string)


def _assignments(generator: random.Random) -> Iterator[Site]:
    while True:
        names = generator.sample(_WORDS.split(), generator.randint(2, 4))
        text = f"class {generator.choice(_CLASSES.split())}:\n    def __init__(self, {', '.join(names)}):\n"
        text += "".join(f"        self.{name} = {name}\n" for name in names)
        answer = generator.choice(names[1:])
        cut = text.index(f"self.{answer} = ") + len(f"self.{answer} = ")
        yield Site(text, 0, cut, answer, "assign")


_TASKS = {
    "parameter": _parameters,
    "attribute": _attributes,
    "loop": _loops,
    "import": _imports,
    "bracket": _brackets,
    "quote": _quotes,
    "keyword": _keywords,
}
