"""Documents: Python's own sources, and which documents are held out."""

import hashlib
import sysconfig
from pathlib import Path

import pytest

from penstock.common.documents import (
    HELD_OUT_RULE,
    Document,
    is_held_out,
    read_documents,
    standard_library_paths,
)


@pytest.mark.parametrize(
    ("path", "held_out"),
    [
        ("getopt.py", True),
        ("numbers.py", True),
        ("tokenize.py", True),
        ("asyncio/threads.py", True),
        ("row-000000010", True),
        ("abc.py", False),
        ("ast.py", False),
        ("json/decoder.py", False),
        ("row-000000000", False),
    ],
)
def test_the_held_out_rule_never_changes(path: str, held_out: bool) -> None:
    assert is_held_out(path) is held_out


def test_the_rule_in_words_is_the_rule() -> None:
    assert HELD_OUT_RULE == "sha256('held-out:' + path)[:8] mod 20 == 0"
    for number in range(200):
        path = f"paket/größe-{number}.py"
        digest = hashlib.sha256(("held-out:" + path).encode("utf-8")).hexdigest()
        assert is_held_out(path) == (int(digest[:16], 16) % 20 == 0)


def test_about_one_document_in_twenty_is_held_out() -> None:
    share = sum(is_held_out(f"document-{number}") for number in range(20_000)) / 20_000
    assert 0.045 < share < 0.055


def test_the_standard_library_is_sources_only() -> None:
    paths = standard_library_paths()
    names = [name for name, _ in paths]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    root = Path(sysconfig.get_paths()["stdlib"])
    for name, file in paths:
        assert file == root / name
        assert name.endswith(".py")
        parts = name.split("/")
        assert not {"site-packages", "dist-packages", "__pycache__"}.intersection(parts)
        assert not any(part.startswith(("_sysconfigdata", "config-")) for part in parts)


def test_what_lies_beside_the_standard_library_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "a.py",
        "b/c.py",
        "b/notes.txt",
        "site-packages/other/d.py",
        "dist-packages/e.py",
        "b/__pycache__/f.py",
        "config-3.11-x86_64-linux-gnu/g.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [name for name, _ in standard_library_paths()] == ["a.py", "b/c.py"]


def test_files_that_are_not_utf8_or_empty_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("größe".encode("latin-1"))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "good").write_bytes("größe\r\n".encode())
    paths = [(name, tmp_path / name) for name in ("latin", "good", "empty", "good")]
    assert list(read_documents(paths)) == [Document("good", "größe\r\n")] * 2
