"""Documents: where text comes from, in a fixed order, and which documents are held out.

One rule decides what is held out, for the language model that ships with the package, for every
corpus and for every report: a hash of the document's relative path (`is_held_out`).
"""

import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from penstock.common.errors import ConfigError

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


def file_paths(patterns: list[str]) -> list[tuple[str, Path]]:
    """Files matching glob patterns (** for any depth) as (relative path, file), sorted.

    Paths are relative to the part of the pattern before its first wildcard.

    Raises:
        ConfigError: a pattern matches nothing, or two files have the same relative path.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        root = Path(*_plain_parts(Path(pattern)))
        matches = [Path(name) for name in glob.glob(pattern, recursive=True)]
        files = [file for file in matches if file.is_file()]
        if not files:
            raise ConfigError(f"corpus.files: no file matches {pattern}; check the path")
        for file in files:
            relative = file.name if file == root else file.relative_to(root).as_posix()
            other = found.setdefault(relative, file)
            if other != file:
                raise ConfigError(
                    f"corpus.files: {other} and {file} would both be called {relative}; use one pattern "
                    "that begins above both"
                )
    return sorted(found.items())


def _plain_parts(pattern: Path) -> list[str]:
    parts = []
    for part in pattern.parts:
        if any(character in part for character in "*?["):
            break
        parts.append(part)
    return parts
