"""docs/kinds.md to the letter: its kind, added to a copy of the code, passes what every kind must."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "store", "producer", "trainer", "deploy")


def blocks() -> list[str]:
    """The page's code, in order: the file, import, registry line, settings, formats without it."""
    page = (ROOT / "docs" / "kinds.md").read_text(encoding="utf-8")
    return re.findall(r"```(?:python|text)\n(.*?)```", page, re.DOTALL)


def copied(into: Path) -> Path:
    """A copy of the code and its tests, imported from there."""
    for room in ROOMS:
        shutil.copytree(
            ROOT / room, into / "namespace" / "penstock" / room, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copytree(ROOT / "tests", into / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", into)
    return into


def put_in(file: Path, line_before: str, text: str) -> None:
    code = file.read_text(encoding="utf-8")
    assert code.count(line_before) == 1, f"{file} has no place for it"
    file.write_text(code.replace(line_before, line_before + text), encoding="utf-8")


@pytest.mark.long
def test_the_pages_kind_passes_what_every_kind_must(tmp_path: Path) -> None:
    kind, import_line, registry_line, settings_line, formats = blocks()
    copy = copied(tmp_path)
    kinds = copy / "namespace" / "penstock" / "trainer" / "kinds"
    (kinds / "absolute.py").write_text(kind, encoding="utf-8")
    put_in(kinds / "__init__.py", "from pydantic import Field\n\n", import_line)
    put_in(kinds / "__init__.py", "    for kind in (\n", registry_line)
    put_in(
        copy / "tests" / "services" / "dictionaries.py",
        "SETTINGS: dict[str, dict[str, Any]] = {\n",
        settings_line,
    )
    put_in(copy / "tests" / "interop" / "__main__.py", "CANNOT: set[tuple[str, str]] = {\n", formats)
    environment = os.environ | {"PYTHONPATH": f"{copy / 'namespace'}{os.pathsep}{copy / 'tests'}"}
    tests = [f"tests/trainer/test_{name}.py" for name in ("kinds", "kinds_training", "export")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
    command += ["-k", "absolute or settings_to_be_tested_with or killed_at_a_random"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 13, done.stdout
    code = (
        "import sys; from penstock.trainer.config import RunSettings;"
        "run = RunSettings.model_validate({'name': 'r', 'saes': [dict(name='a', architecture='absolute', "
        "hook_name='h', d_sae=8, l1_coefficient=1)]});"
        "print(run.saes[0].margin, 'torch' in sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["0.5", "False"]
