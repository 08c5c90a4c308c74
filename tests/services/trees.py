"""Comparing what is stored, byte by byte."""

import hashlib
from pathlib import Path


def tree_digests(root: Path, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below `root`, except below the named folders."""
    found = {}
    for file in sorted(root.rglob("*")):
        relative = file.relative_to(root)
        if file.is_file() and relative.parts[0] not in leave_out:
            found[relative.as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found
