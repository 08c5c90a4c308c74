"""The Dockerfile's own steps, carried out in a chroot; what comes out runs as nobody on a read-only root."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.common.embedded import EmbeddedServer
from services.compose import ROOT, HealthCheck
from services.containers import Container, Networks, Spec, need_containers, run, scratch
from services.dockerfile import effective, environment, health_command, read_dockerfile
from services.image import Builder, debian
from services.processes import need
from services.waiting import eventually

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]

_, STAGES = read_dockerfile()
_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Image:
    """A built image: its layers, uppermost first, and what its instructions say."""

    layers: list[Path]

    def spec(self, name: str, *arguments: str, workdir_of: Path | None = None) -> Spec:
        """A container of it, as `docker run --read-only` would make one."""
        found = environment(STAGES, "cpu")
        uid, gid = map(int, effective(STAGES, "cpu", "USER").split(":"))
        volumes = json.loads(effective(STAGES, "cpu", "VOLUME"))
        mounts = []
        if workdir_of is not None:
            for number, target in enumerate(volumes):
                source = workdir_of / f"volume{number}"
                source.mkdir(exist_ok=True)
                shutil.chown(source, uid, gid)
                mounts.append((source, target, False))
        return Spec(
            name=name,
            command=[*json.loads(effective(STAGES, "cpu", "ENTRYPOINT")), *arguments],
            environment=found | {"PATH": found["PATH"].replace("$PATH", _PATH)},
            uid=uid,
            gid=gid,
            root=Path(":".join(map(str, self.layers))),
            mounts=mounts,
            tmpfs=["/tmp", f"{found['HOME']}:uid={uid},gid={gid}"],
            workdir=effective(STAGES, "cpu", "WORKDIR"),
        )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    need_containers()
    need("debootstrap")
    directory = tmp_path_factory.mktemp("image")
    try:
        yield Image(Builder(debian(directory / "base"), directory / "layers").build("cpu"))
    finally:
        run("rm", "-rf", "--one-file-system", str(directory))


def test_it_starts_as_nobody_on_a_read_only_root(image: Image, valkey: EmbeddedServer) -> None:
    with scratch() as directory, Networks(["outside"]) as networks:
        spec = image.spec("whole", "run", "/etc/penstock/penstock.yaml", workdir_of=directory)
        config = directory / "penstock.yaml"
        config.write_text((ROOT / "examples" / "toy.yaml").read_text())
        spec.mounts.append((config, "/etc/penstock/penstock.yaml", True))
        spec.networks = {networks.bridge("outside"): networks.address("outside")}
        spec.command = ["penstock", "--metrics-port", "9464", "train", "/etc/penstock/penstock.yaml"]
        socket = valkey.socket
        spec.mounts.append((socket.parent, "/run/valkey", False))
        spec.environment["PENSTOCK_REDIS_URL"] = f"unix:///run/valkey/{socket.name}"
        # others' users may use the socket for as long as this lasts
        socket.parent.chmod(0o755)
        socket.chmod(0o777)
        try:
            with Container(spec, directory) as container:
                check, image_check = HealthCheck(), health_command(STAGES, "cpu")
                eventually(
                    lambda: container.exit_code is not None or container.healthy(check, image_check), 120.0
                )
                assert container.exit_code is None, container.log.read_text()
                assert container.call("id", "-u").stdout.strip() == "10001"
                assert "CapBnd:\t0000000000000000" in container.call("cat", "/proc/self/status").stdout
                assert container.call("touch", "/opt/penstock/here").returncode != 0
                assert container.stop(60.0) == 0
                # the config is a mount point's
                made_by_us = {"etc/hosts", "etc/resolv.conf", "etc/penstock/penstock.yaml"}
                assert container.written() <= made_by_us, container.written()
        finally:
            socket.chmod(0o700)
            socket.parent.chmod(0o700)


def test_versions_are_those_of_the_constraints(image: Image) -> None:
    found = {path.name.split("-")[0].lower(): path.name for path in packages(image).glob("*.dist-info")}
    wrong = []
    pinned = dict(
        line.lower().replace("-", "_").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for name, directory in found.items():
        version = directory.removesuffix(".dist-info").split("-")[1].split("+")[0]
        if name != "penstock" and pinned.get(name.replace("-", "_").replace(".", "_")) != version.lower():
            wrong.append((name, version, pinned.get(name)))
    assert wrong == [], wrong


def test_no_tools_and_no_caches_are_left(image: Image) -> None:
    own = image.layers[0]
    assert not (packages(image) / "pip").exists()
    # setuptools is there: torch requires it
    assert not (packages(image) / "wheel").exists()
    for layer in image.layers[:-1]:
        for name in ("root/.cache", "src", "var/lib/apt/lists", "tmp"):
            assert not any((layer / name).rglob("*")) if (layer / name).exists() else True, (layer, name)
    assert {path.name for path in own.iterdir()} == {"opt"}


def packages(image: Image) -> Path:
    (found,) = (image.layers[0] / "opt" / "penstock" / "lib").glob("python3*/site-packages")
    return found
