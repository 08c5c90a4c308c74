"""Where a corpus's text comes from: files in a fixed order, under names that hold on any machine."""

import glob
from pathlib import Path

from penstock.common.errors import ConfigError


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
