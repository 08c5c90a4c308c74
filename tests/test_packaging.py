"""The rooms: which directories are packages, what each brings along, and who imports whom."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED: dict[str, set[str]] = {
    "common": set(),
    "store": {"common"},
    "producer": {"common", "store"},
    "trainer": {"common", "store"},
    "deploy": {"common", "store", "producer", "trainer"},
}
"""For each room, whom it may import besides itself."""


def setuptools() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return settings


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    parts = (name.split(".") for name in imports(path))
    return {part[1] for part in parts if part[0] == "penstock" and len(part) > 1}


def test_every_package_is_listed() -> None:
    found = {
        "penstock." + str(file.parent.relative_to(ROOT)).replace("/", ".")
        for room in ALLOWED
        for file in (ROOT / room).rglob("__init__.py")
    }
    assert set(setuptools()["packages"]) == found
    assert len(setuptools()["packages"]) == len(found)


def test_every_room_has_its_directory() -> None:
    assert setuptools()["package-dir"] == {f"penstock.{room}": room for room in ALLOWED}


@pytest.mark.parametrize("room", ALLOWED)
def test_no_source_lies_outside_a_package(room: str) -> None:
    for source in sources(room):
        assert (source.parent / "__init__.py").exists(), source


@pytest.mark.parametrize("room", ALLOWED)
def test_every_room_says_that_it_is_typed(room: str) -> None:
    assert (ROOT / room / "py.typed").exists()


@pytest.mark.parametrize("room", ALLOWED)
def test_every_other_file_of_a_package_is_shipped(room: str) -> None:
    patterns = setuptools()["package-data"]["*"]
    packages = [file.parent for file in (ROOT / room).rglob("__init__.py")]
    shipped = {file for package in packages for pattern in patterns for file in package.glob(pattern)}
    kinds = {".lua", ".html", ".css", ".safetensors", ".json", ".typed"}
    others = {
        file for file in (ROOT / room).rglob("*") if file.suffix in kinds and "__pycache__" not in file.parts
    }
    assert others <= shipped


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_those_below_them(room: str) -> None:
    assert sources(room)
    for source in sources(room):
        unwanted = rooms_imported(source) - ALLOWED[room] - {room}
        assert not unwanted, f"{source.relative_to(ROOT)} imports {unwanted}"


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_are_imported_by_their_full_names(room: str) -> None:
    """A bare `import store` finds whatever package of that name is installed."""
    for source in sources(room):
        bare = {name.split(".")[0] for name in imports(source)} & set(ALLOWED)
        assert not bare, f"{source.relative_to(ROOT)} imports {bare}"


def test_the_namespace_leads_to_the_rooms() -> None:
    for room in ALLOWED:
        assert (ROOT / "namespace" / "penstock" / room).resolve() == ROOT / room
    assert not (ROOT / "namespace" / "penstock" / "__init__.py").exists()
