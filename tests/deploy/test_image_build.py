"""The image, built from our Dockerfile by buildah, runs as nobody on a read-only root and answers /livez."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from penstock.common.embedded import EmbeddedServer
from services.compose import ROOT, HealthCheck
from services.containers import Container, Networks, Spec, need_containers, run, scratch
from services.image import Buildah, debian
from services.processes import need
from services.waiting import eventually

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]


@dataclass
class Image:
    """A built image: its files, and what it says."""

    root: Path
    config: dict[str, Any]

    @property
    def packages(self) -> Path:
        (found,) = (self.root / "opt" / "penstock" / "lib").glob("python3*/site-packages")
        return found

    def spec(self, *arguments: str, volumes: Path) -> Spec:
        """A container of it, as `docker run --read-only` would make one."""
        uid, gid = map(int, self.config["User"].split(":"))
        environment = dict(pair.split("=", 1) for pair in self.config["Env"])
        mounts = []
        for number, target in enumerate(self.config["Volumes"]):
            source = volumes / f"volume{number}"
            source.mkdir()
            shutil.chown(source, uid, gid)
            mounts.append((source, target, False))
        return Spec(
            name="image",
            command=[*self.config["Entrypoint"], *arguments],
            environment=environment,
            uid=uid,
            gid=gid,
            root=self.root,
            mounts=mounts,
            tmpfs=["/tmp", f"{environment['HOME']}:uid={uid},gid={gid}"],
            workdir=self.config["WorkingDir"],
        )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    need_containers()
    need("buildah", "debootstrap")
    directory = tmp_path_factory.mktemp("image")
    buildah = Buildah(directory)
    try:
        buildah.make_base(debian(directory / "base"))
        name = buildah.build("cpu")
        yield Image(buildah.root(name), buildah.config(name))
    finally:
        buildah.close()
        run("rm", "-rf", "--one-file-system", str(directory))


def test_it_runs_as_nobody_on_a_read_only_root(image: Image, valkey: EmbeddedServer) -> None:
    socket = valkey.socket
    with scratch() as directory, Networks(["outside"]) as networks:
        spec = image.spec("--metrics-port", "9464", "train", "/etc/penstock/toy.yaml", volumes=directory)
        spec.mounts += [
            (ROOT / "examples" / "toy.yaml", "/etc/penstock/toy.yaml", True),
            (socket.parent, "/run/valkey", False),
        ]
        spec.networks = {networks.bridge("outside"): networks.address("outside")}
        spec.environment["PENSTOCK_REDIS_URL"] = f"unix:///run/valkey/{socket.name}"
        # another user than the server's
        socket.parent.chmod(0o755)
        socket.chmod(0o777)
        try:
            with Container(spec, directory) as container:
                kind, *check = image.config["Healthcheck"]["Test"]
                assert kind == "CMD"
                eventually(
                    lambda: container.exit_code is not None or container.healthy(HealthCheck(), check), 120.0
                )
                assert container.exit_code is None, container.log.read_text()
                assert container.call("id", "-un").stdout.strip() == "penstock"
                assert "CapBnd:\t0000000000000000" in container.call("cat", "/proc/self/status").stdout
                assert container.call("touch", "/opt/penstock/here").returncode != 0
                assert container.stop(60.0) == 0
                made_by_us = {"etc/hosts", "etc/resolv.conf", "etc/penstock/toy.yaml"}
                assert container.written() <= made_by_us, container.written()
        finally:
            socket.chmod(0o700)
            socket.parent.chmod(0o700)


def test_it_says_what_it_is(image: Image) -> None:
    assert image.config["Entrypoint"] == ["penstock"]
    assert list(image.config["ExposedPorts"]) == ["9464/tcp"]
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.title"] == "Penstock"
    assert labels["org.opencontainers.image.version"] == "0.1.0"


def test_versions_are_those_of_the_constraints(image: Image) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    pinned = {canonicalize_name(name): version for name, version in pairs}
    wrong = []
    for directory in image.packages.glob("*.dist-info"):
        name, version = directory.name.removesuffix(".dist-info").split("-")
        name = canonicalize_name(name)
        if name != "penstock" and pinned.get(name) != version.split("+")[0]:
            wrong.append((name, version, pinned.get(name)))
    assert wrong == [], wrong


def test_no_tools_and_no_caches_are_left(image: Image) -> None:
    # setuptools is there: torch requires it
    for name in ("pip", "wheel"):
        assert not (image.packages / name).exists()
    for name in ("src", "root/.cache", "home/penstock/.cache"):
        assert not (image.root / name).exists(), name
    assert not list((image.root / "tmp").iterdir())
