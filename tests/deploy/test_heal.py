"""Any single damage to any object is found, named with its remedy, and put right to the very bytes."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.deploy.config import load_config
from penstock.deploy.heal import Repair, faults
from services.command import penstock, small_config, write_config

FLIPS = 1000

Damage = Callable[[Path, random.Random], None]


def flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(bytes(data))


def truncate(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data))])


def remove(file: Path, draw: random.Random) -> None:
    file.unlink()


@pytest.fixture(scope="module")
def work(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the small experiment's work directory; tests leave it as they found it."""
    copy = tmp_path_factory.mktemp("heal") / "work"
    for part in ("corpus", "dataset", "runs"):
        shutil.copytree(small_run / part, copy / part)
    write_config(copy.parent / "config.yaml", small_config(copy))
    return copy


@pytest.fixture(scope="module")
def files(work: Path) -> dict[Path, bytes]:
    """Every stored object and its bytes."""
    found = (f for part in ("corpus", "dataset", "runs") for f in sorted((work / part).rglob("*")))
    return {file: file.read_bytes() for file in found if file.is_file()}


def url_of(work: Path, file: Path) -> str:
    parts = file.relative_to(work).parts
    return str(work.joinpath(*parts[: 2 if parts[0] == "runs" else 1]))


def found_at(url: str) -> list[str]:
    return [str(fault) for fault in faults(url)[1]]


def kind(work: Path, file: Path) -> str:
    """`dataset/commits`, `runs/heads` and so on."""
    parts = [part for part in file.relative_to(work).parts[:-1] if not part.startswith("small-")]
    return "/".join([*parts[:2], file.suffix])


def test_every_kind_of_object_is_among_them(work: Path, files: dict[Path, bytes]) -> None:
    kinds = {kind(work, file) for file in files}
    for wanted in (
        *("corpus/.json", "corpus/.copy", "corpus/corpus.zarr/", "corpus/corpus.zarr/.json"),
        *("dataset/.json", "dataset/.copy", "dataset/commits/.json", "dataset/activations.zarr/"),
        *("dataset/activations.zarr/.json", "dataset/provenance/.json", "dataset/readers/.json"),
        "dataset/index/.safetensors",
        *("runs/.json", "runs/.copy", "runs/heads/.json", "runs/heads/.copy"),
        *("runs/history/.json", "runs/checkpoints/.safetensors"),
    ):
        assert wanted in kinds, sorted(kinds)


@pytest.mark.long
def test_a_thousand_flipped_bits_are_found(work: Path, files: dict[Path, bytes]) -> None:
    draw = random.Random(0)
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        by_kind.setdefault(kind(work, file), []).append(file)
    for _ in range(FLIPS):
        file = draw.choice(by_kind[draw.choice(sorted(by_kind))])
        flip(file, draw)
        found = found_at(url_of(work, file))
        file.write_bytes(files[file])
        assert len(found) == 1, (file, found)
        assert file.name in found[0]
    assert not any(found_at(str(work / part)) for part in ("corpus", "dataset"))


@pytest.mark.parametrize("damage", [truncate, remove])
def test_a_cut_or_lost_object_is_found(work: Path, files: dict[Path, bytes], damage: Damage) -> None:
    draw = random.Random(1)
    for file, data in files.items():
        damage(file, draw)
        found = found_at(url_of(work, file))
        file.write_bytes(data)
        assert len(found) == 1, (file, found)
        assert file.name in found[0]


@pytest.mark.parametrize(
    "damage", [flip, *(pytest.param(d, marks=pytest.mark.long) for d in (truncate, remove))]
)
def test_repair_brings_the_very_bytes_back(work: Path, files: dict[Path, bytes], damage: Damage) -> None:
    """Half of all objects at once, but never a record together with its copy."""
    draw = random.Random(2)
    for _ in range(2):
        victims: list[Path] = []
        for file in draw.sample(sorted(files), len(files) // 2):
            twins = {file.with_suffix(".json"), file.with_suffix(".copy")}
            if file.suffix not in (".json", ".copy") or not twins & set(victims):
                victims.append(file)
        for file in victims:
            damage(file, draw)
        said: list[str] = []
        repair = Repair(load_config(str(work.parent / "config.yaml")), said.append)
        repair.everything()
        assert repair.left == 0, said
        assert len(said) > len(victims) / 4
        assert {file: file.read_bytes() for file in files} == files


@pytest.mark.long
def test_the_commands_say_what_is_wrong_and_put_it_right(work: Path, files: dict[Path, bytes]) -> None:
    victim = next(f for f in files if f.match("acts/blocks.1.hook_resid_post/c/3/0"))
    flip(victim, random.Random(3))
    config = work.parent / "config.yaml"
    result = penstock("verify", work / "dataset")
    assert result.returncode == 1
    assert "c/3/0 is damaged" in result.stdout
    assert "repair makes chunk 3 again" in result.stdout
    assert "1 faults" in result.stdout
    result = penstock("repair", config)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "chunk 3: made again" in result.stdout
    assert penstock("verify", work / "dataset").returncode == 0
    assert victim.read_bytes() == files[victim]
    assert penstock("repair", config).stdout == "everything is whole\n"


def test_what_cannot_be_repaired_is_said(work: Path, files: dict[Path, bytes]) -> None:
    """Both a record and its copy: nothing can tell any more what they said."""
    heads = [f for f in files if f.parent.name == "heads" and f.stem == "3"]
    for file in heads:
        file.write_bytes(b"{}")
    result = penstock("repair", work.parent / "config.yaml")
    for file in heads:
        file.write_bytes(files[file])
    assert result.returncode == 1
    assert "not repaired" in result.stdout
    assert "its copy is gone, too" in result.stdout
    assert "1 faults are left" in result.stdout


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_a_damaged_manifest_or_config_is_refused(
    work: Path, files: dict[Path, bytes], name: str, tmp_path: Path
) -> None:
    victims = [f for f in files if f.name == name and "corpus" not in f.parts]
    for victim in victims:
        flip(victim, random.Random(4))
    result = penstock("run", work.parent / "config.yaml")
    for victim in victims:
        victim.write_bytes(files[victim])
    assert result.returncode != 0
    assert "is damaged" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
