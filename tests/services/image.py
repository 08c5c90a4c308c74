"""Our image, built by Debian's buildah in chroots: no engine and no registry, but root.

The base image is stood in for by a Debian of debootstrap's: the same distribution, with its own Python.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from services.compose import ROOT
from services.containers import run
from services.dockerfile import DOCKERFILE, read_dockerfile

PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"


def debian(directory: Path) -> Path:
    """A minimal Debian with Python: what stands for the base image."""
    run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(directory))
    # the base image's Python takes packages; Debian's wants to be asked
    for marker in directory.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    return directory


class Buildah:
    """Images and containers of one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def make_base(self, root: Path) -> None:
        """Let a directory be the image that our Dockerfile begins with."""
        _, stages = read_dockerfile()
        (name,) = {stage.base for stage in stages.values() if stage.base not in stages}
        container = self._call("from", "scratch")
        self._call("add", "--quiet", container, str(root), "/")
        self._call("commit", "--quiet", container, f"docker.io/library/{name}")
        self._call("rm", container)

    def build(self, target: str) -> str:
        """Build a target of our Dockerfile; the image's name."""
        name = f"localhost/penstock:{target}"
        lent = [f"--volume={source}:{inside}:ro" for source, inside in _lent()]
        index = f"--build-arg=TORCH_INDEX_URL={os.environ.get('TORCH_CPU_INDEX_URL', '')}"
        self._call(
            *("bud", "--isolation=chroot", "--format=docker", "--pull-never", *lent, index),
            *(f"--file={DOCKERFILE}", f"--target={target}", f"--tag={name}", str(ROOT)),
        )
        return name

    def config(self, image: str) -> dict[str, Any]:
        """What an image says: User, Env, Entrypoint, Healthcheck, …"""
        told = json.loads(self._call("inspect", "--type=image", image))
        found: dict[str, Any] = told["Docker"]["config"]
        return found

    def root(self, image: str) -> Path:
        """An image's files, as a directory."""
        return Path(self._call("mount", self._call("from", "--pull-never", image)))

    def close(self) -> None:
        """Unmount what `root` mounted."""
        self._call("umount", "--all")

    def _call(self, command: str, *arguments: str) -> str:
        done = subprocess.run(
            [
                *("buildah", f"--root={self._directory / 'store'}", f"--runroot={self._directory / 'run'}"),
                *("--storage-driver=overlay", command, *arguments),
            ],
            env=os.environ | {"BUILDAH_ISOLATION": "chroot"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()


def _lent() -> list[tuple[Path, str]]:
    """What a build needs to know of this machine to get its packages: (here, inside)."""
    here = [Path("/etc/ssl/certs"), Path("/etc/pip.conf")]
    here += [Path(path) for path in os.environ.get("PIP_FIND_LINKS", "").split() if Path(path).is_dir()]
    found = [(path, str(path)) for path in here if path.exists()]
    own = Path("~/.config/pip").expanduser()
    return [*found, *([(own, "/root/.config/pip")] if own.exists() else [])]
