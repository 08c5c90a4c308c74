"""Where a corpus's text comes from: which files, in which order, under which names."""

from pathlib import Path

import pytest

from penstock.common.errors import ConfigError
from penstock.producer.text import file_paths


def test_paths_are_relative_to_the_part_before_the_first_wildcard(tmp_path: Path) -> None:
    for name in ("docs/b/two.txt", "docs/a.txt", "docs/b/c/three.txt", "docs/skipped.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = file_paths([str(tmp_path / "docs" / "**" / "*.txt")])
    assert found == [
        ("a.txt", tmp_path / "docs/a.txt"),
        ("b/c/three.txt", tmp_path / "docs/b/c/three.txt"),
        ("b/two.txt", tmp_path / "docs/b/two.txt"),
    ]
    one_folder = file_paths([str(tmp_path / "d?cs" / "b" / "*.txt")])
    assert [name for name, _ in one_folder] == ["docs/b/two.txt"]
    plain = file_paths([str(tmp_path / "docs" / "b" / "two.txt")])
    assert plain == [("two.txt", tmp_path / "docs/b/two.txt")]


def test_a_file_found_by_two_patterns_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    patterns = [str(tmp_path / "*.txt"), str(tmp_path / "a*")]
    assert file_paths(patterns) == [("a.txt", tmp_path / "a.txt")]


def test_different_files_of_one_relative_path_are_both_kept_or_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(folder)
    patterns = [str(tmp_path / "one" / "*.txt"), str(tmp_path / "two" / "*.txt")]
    with pytest.raises(ConfigError, match=r"corpus\.files.*same\.txt"):
        file_paths(patterns)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "folder").mkdir()
    for pattern in ("*.md", "fold*"):
        with pytest.raises(ConfigError, match=r"corpus\.files: no file matches"):
            file_paths([str(tmp_path / "*.txt"), str(tmp_path / pattern)])
