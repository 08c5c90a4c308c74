"""The Dockerfile carried out without an engine: each RUN in a chroot, each COPY from the build's context.

The base image is stood in for by a Debian of debootstrap's: the same distribution, with its own Python. Needs
root. Layers are directories for overlays; `build` returns those of the image, the uppermost first.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from services.compose import ROOT
from services.containers import run
from services.dockerfile import Stage, context_files, line_of, read_dockerfile

PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"


def debian(directory: Path) -> Path:
    """A minimal Debian with Python: what stands for the base image."""
    run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(directory))
    # the base image's Python takes packages; Debian's wants to be asked
    for marker in directory.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    return directory


class Builder:
    """Builds stages of our Dockerfile, each once.

    Args:
        base: root of what stands for the base image.
        directory: for layers; on a file system that takes an overlay's upper layer.
    """

    def __init__(self, base: Path, directory: Path) -> None:
        _, self._stages = read_dockerfile()
        self._base, self._directory = base, directory
        self._built: dict[str, list[Path]] = {}
        self.said: list[str] = []

    def build(self, name: str) -> list[Path]:
        """Layers of a stage, the uppermost first, the base last."""
        layers = [self._base]
        for stage in line_of(self._stages, name):
            if stage.name not in self._built:
                self._built[stage.name] = [self._layer(stage, layers), *layers]
            layers = self._built[stage.name]
        return layers

    def _layer(self, stage: Stage, below: list[Path]) -> Path:
        base = self._directory / stage.name
        upper, work, root = (base / part for part in ("upper", "work", "root"))
        for path in (upper, work, root):
            path.mkdir(parents=True)
        environment = {"PATH": _PATH, "HOME": "/root"}
        workdir = "/"
        lower = ":".join(map(str, below))
        run(
            "mount",
            "-t",
            "overlay",
            "overlay",
            "-o",
            f"lowerdir={lower},upperdir={upper},workdir={work}",
            str(root),
        )
        try:
            # what ARG and ENV of the stages below say holds here, too
            steps = [step for part in line_of(self._stages, stage.name)[:-1] for step in part.steps]
            for word, rest in steps:
                workdir = self._note(word, rest, environment, workdir)
            for word, rest in stage.steps:
                workdir = self._note(word, rest, environment, workdir)
                if word == "WORKDIR":
                    (root / workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)
                elif word == "COPY":
                    self._copy(rest, root, workdir)
                elif word == "RUN":
                    self._run(rest, root, workdir, environment)
        finally:
            run("umount", str(root))
        return upper

    @staticmethod
    def _note(word: str, rest: str, environment: dict[str, str], workdir: str) -> str:
        if word == "ENV":
            for pair in shlex.split(rest):
                name, value = pair.split("=", 1)
                environment[name] = re.sub(r"\$(\w+)", lambda m: environment.get(m[1], ""), value)
        elif word == "ARG":
            name, _, default = rest.partition("=")
            environment[name] = default
        elif word == "WORKDIR":
            return rest
        return workdir

    def _copy(self, rest: str, root: Path, workdir: str) -> None:
        if rest.startswith("--from="):
            stage, source, target = rest.removeprefix("--from=").split()
            layer = self.build(stage)[0]
            # the stage's own layer holds all of /opt/penstock but what its base made of it
            for below in [*reversed(self.build(stage)[1:]), layer]:
                found = below / source.lstrip("/")
                if found.is_dir():
                    shutil.copytree(found, root / target.lstrip("/"), symlinks=True, dirs_exist_ok=True)
            return
        *sources, target = rest.split()
        into = root / workdir.lstrip("/") / target.removeprefix("./")
        for source in sources:
            for path in context_files():
                if path.parts[0] == source:
                    there = into / path if target.endswith("/") else into.joinpath(*path.parts[1:])
                    there.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(ROOT / path, there)

    def _run(self, command: str, root: Path, workdir: str, environment: dict[str, str]) -> None:
        script = "\n".join(
            [
                f"mount -t proc proc {root}/proc",
                f"mount --rbind /dev {root}/dev",
                f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp",
                # only where packages are fetched: the mount points stay behind
                *(_lend(root) if "pip --python" in command else ()),
                f"exec chroot {root} /bin/sh -c {shlex.quote(f'cd {workdir} && {{ {command}; }}')}",
            ]
        )
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--propagation", "private", "sh", "-euc", script],
            env=environment | _index_settings(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        self.said.append(f"{command}\n{done.stdout}{done.stderr}")
        assert done.returncode == 0, self.said[-1][-4000:]


def _lend(root: Path) -> list[str]:
    """What an engine gives to a build of this machine's network: names, and where packages come from."""
    lent = [Path(p) for p in ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs")]
    lent += [Path(p) for p in os.environ.get("PIP_FIND_LINKS", "").split() if Path(p).is_dir()]
    steps = []
    for path in filter(Path.exists, lent):
        make = (
            f"mkdir -p {root}{path}" if path.is_dir() else f"mkdir -p {root}{path.parent}; touch {root}{path}"
        )
        steps.append(f"{make}; mount --bind {path} {root}{path}")
    return steps


def _index_settings() -> dict[str, str]:
    wanted = re.compile(r"PIP_(?!CONFIG)\w+|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|(?i:https?_proxy|no_proxy)")
    return {name: value for name, value in os.environ.items() if wanted.fullmatch(name)}
