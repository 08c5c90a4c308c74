"""Documents, Python's own sources among them, and which documents are held out.

One rule decides what is held out, for the language model that ships with the package, for every
corpus, for every report and for the tasks made of Python text: a hash of the document's relative path
(`is_held_out`).
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 20
"""One document in this many is held out."""

HELD_OUT_RULE = f"sha256('held-out:' + path)[:8] mod {HELD_OUT_ONE_IN} == 0"
"""The rule in words, recorded in every corpus manifest."""

_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__"}
# Written when the interpreter is built: full of paths of the machine that built it.
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Document:
    """One text with the relative POSIX path that names it."""

    path: str
    text: str


def is_held_out(path: str) -> bool:
    """Whether the document at this relative POSIX path is kept from every training."""
    digest = hashlib.sha256(b"held-out:" + path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def standard_library_paths() -> list[tuple[str, Path]]:
    """The running interpreter's own sources as (relative path, file), sorted by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        parts = relative.parts
        if _SKIPPED_DIRECTORIES.intersection(parts):
            continue
        if any(part.startswith(_SKIPPED_PREFIXES) for part in parts):
            continue
        found.append((relative.as_posix(), file))
    return sorted(found)


def read_documents(paths: list[tuple[str, Path]]) -> Iterator[Document]:
    """Read files in the given order. Files that are not UTF-8 or are empty are left out."""
    for relative, file in paths:
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            yield Document(relative, text)
