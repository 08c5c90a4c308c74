"""The Dockerfile, without building it."""

import json
import re
import subprocess
import sys

from penstock.common.health import STALLED_AFTER_SECONDS, Health, HealthServer
from services.compose import ROOT
from services.dockerfile import (
    DOCKERFILE,
    context_files,
    effective,
    environment,
    health_command,
    line_of,
    read_dockerfile,
)

ARGUMENTS, STAGES = read_dockerfile()
IMAGES = ("cpu", "cuda")


def test_every_base_is_a_stage_or_pinned_to_the_patch() -> None:
    for stage in STAGES.values():
        assert stage.base in STAGES or re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", stage.base)


def test_the_last_stage_is_the_one_that_needs_no_gpu() -> None:
    assert list(STAGES)[-1] == "cpu"


def test_versions_are_those_of_the_constraints() -> None:
    for name in ("build-cpu", "build-cuda"):
        installs = [run for run in STAGES[name].all("RUN") if "pip" in run]
        assert len(installs) == 3
        for run in installs:
            assert "--constraint constraints.txt" in run or "--no-deps ." in run
    assert not [run for stage in STAGES.values() for run in stage.all("RUN") if "apt" in run]


def test_both_images_are_made_alike() -> None:
    cpu, cuda = ([step for step in STAGES[f"build-{name}"].steps if step[0] != "ARG"] for name in IMAGES)
    assert cpu[0] != cuda[0]  # torch
    assert cpu[1:] == cuda[1:]


def test_images_run_as_nobody_in_particular_and_start_penstock_itself() -> None:
    for name in IMAGES:
        uid, gid = effective(STAGES, name, "USER").split(":")
        assert int(uid) >= 10_000
        assert int(gid) >= 10_000
        assert json.loads(effective(STAGES, name, "ENTRYPOINT")) == ["penstock"]
        assert isinstance(json.loads(effective(STAGES, name, "CMD")), list)
        account = next(run for run in STAGES["runtime"].all("RUN") if "useradd" in run)
        assert f"--uid {uid} " in account
        assert f"--gid {gid} " in account
        assert f"--home-dir {environment(STAGES, name)['HOME']} " in account


def test_images_get_nothing_of_the_build_but_the_packages() -> None:
    for name in IMAGES:
        copied = [rest for stage in line_of(STAGES, name) for rest in stage.all("COPY")]
        assert copied == [f"--from=build-{name} /opt/penstock /opt/penstock"]
    assert "--without-pip" in STAGES["build"].all("RUN")[0]
    assert any(
        "uninstall" in run and run.endswith("setuptools wheel pip") for run in STAGES["runtime"].all("RUN")
    )


def test_there_are_labels() -> None:
    labels = " ".join(STAGES["runtime"].all("LABEL"))
    for word in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{word}=" in labels


def test_nothing_secret_is_named() -> None:
    assert not re.search(r"(?i)password|secret|token|access_key", DOCKERFILE.read_text())


def test_what_is_copied_is_in_the_context_and_whole() -> None:
    context = context_files()
    copied: set[str] = set()
    for stage in STAGES.values():
        for rest in stage.all("COPY"):
            if not rest.startswith("--from"):
                copied |= set(rest.split()[:-1])
    for source in copied:
        assert any(path.parts[0] == source for path in context), source
    # the other way round: nothing is sent that is not used
    assert {path.parts[0] for path in context} == copied
    rooms = {
        path.relative_to(ROOT)
        for room in ("common", "store", "producer", "trainer", "deploy")
        for path in (ROOT / room).rglob("*.py")
    }
    assert rooms <= context


def test_the_context_holds_no_secrets_and_no_leftovers() -> None:
    planted = ROOT / "deploy" / "compose" / ".env"
    existed = planted.exists()
    if not existed:
        planted.write_text("VALKEY_PASSWORD=planted\n")
    try:
        context = context_files()
    finally:
        if not existed:
            planted.unlink()
    for path in context:
        assert not path.name.startswith(".env")
        assert path.suffix != ".pyc"
        assert path.parts[0] not in ("tests", ".git", "docs")
        assert path.parts[:2] not in [("deploy", "compose"), ("deploy", "kubernetes"), ("deploy", "images")]


def test_the_health_check_is_that_of_a_real_process() -> None:
    command = health_command(STAGES, "cpu")
    assert health_command(STAGES, "cuda") == command
    assert command[0] == "python"
    port = effective(STAGES, "cpu", "EXPOSE")
    health = Health()
    server = HealthServer(health, "127.0.0.1", 0)
    try:
        here = [sys.executable, *(word.replace(f":{port}/", f":{server.port}/") for word in command[1:])]
        assert here[1:] != command[1:]
        assert subprocess.run(here, timeout=30, capture_output=True).returncode == 0
        health._last_beat -= STALLED_AFTER_SECONDS
        assert subprocess.run(here, timeout=30, capture_output=True).returncode != 0
    finally:
        server.close()
    assert subprocess.run(here, timeout=30, capture_output=True).returncode != 0
