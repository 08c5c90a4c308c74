"""Containers without an engine: what a Compose service says, made of Linux's own parts.

A container has namespaces of its own for network, mounts and processes. Its root is an overlay of a lower
directory, read-only where the service says so; volumes and files are mounted where it says, as the user, with
the environment, the capabilities and the command that it says. Networks are bridges, names are in /etc/hosts.
Needs root.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import pytest

from services.compose import ROOT, HealthCheck
from services.processes import need

_NEEDED = ("chroot", "ip", "mount", "nsenter", "setpriv", "unshare")


def need_containers() -> None:
    """Skip (fail on CI) where containers cannot be made."""
    need(*_NEEDED)
    made = os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "--net", "true"]).returncode == 0
    if not made:
        reason = "containers need root and namespaces"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def run(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"


@dataclass
class Spec:
    """One container.

    Attributes:
        root: what lies below its file system; never written.
        programs: name -> script, put into /opt/penstock/bin: what stands for the image's programs.
        shown: directories of this machine that can be read at the same path.
        mounts: (source, target, read-only), files and directories.
        tmpfs: as Compose has them, options included.
        networks: network -> address.
        hosts: name -> address.
        name_server: address of one, if there is any.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    uid: int
    gid: int
    root: Path = Path("/")
    programs: dict[str, str] = field(default_factory=dict)
    shown: list[Path] = field(default_factory=list)
    mounts: list[tuple[Path, str, bool]] = field(default_factory=list)
    tmpfs: list[str] = field(default_factory=list)
    networks: dict[str, str] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    name_server: str | None = None
    read_only: bool = True
    workdir: str = "/"


class Container:
    """A running container; its output is in `log`."""

    def __init__(self, spec: Spec, directory: Path) -> None:
        self.spec = spec
        self.log = directory / f"{spec.name}.log"
        self._net = f"pst-{uuid.uuid4().hex[:8]}"
        self._directory = directory / f"{spec.name}-{uuid.uuid4().hex[:6]}"
        for part in ("upper", "work", "root"):
            (self._directory / part).mkdir(parents=True)
        run("ip", "netns", "add", self._net)
        run("ip", "-n", self._net, "link", "set", "lo", "up")
        for network, address in spec.networks.items():
            self._plug(network, address)
        with self.log.open("ab") as output:
            # the namespace of mounts is private, so all of them go with the last process in it; each of these
            # commands becomes the next, so the first is told when whoever started it is gone
            self.process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "--"),
                    *("ip", "netns", "exec", self._net),
                    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"),
                    *("sh", "-euc", self._script()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=spec.environment | {"PATH": spec.environment.get("PATH", os.defpath)},
                start_new_session=True,
            )

    def __enter__(self) -> "Container":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def healthy(self, check: HealthCheck, image_check: list[str]) -> bool:
        """Run the health check once, inside, as the container's user."""
        if self.exit_code is not None or self._inner() is None:
            return False
        kind, *words = check.test or ["CMD", *image_check]
        command = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        try:
            return self.call(*command, timeout=check.timeout).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def call(self, *command: str, timeout: float = 60) -> "subprocess.CompletedProcess[str]":
        """Run a command inside, as `docker exec` does."""
        inner = self._inner()
        assert inner is not None, f"{self.spec.name} does not run: {self.log.read_text()}"
        return subprocess.run(
            [
                *("nsenter", "--target", str(inner), "--mount", "--net", "--pid", "--root", "--wd"),
                *(*self._as_user(), *command),
            ],
            env=self.spec.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def stop(self, grace: float) -> int:
        """SIGTERM to the container's first process, as `docker stop` does; its exit code.

        Fails if it has to be killed.
        """
        inner = self._inner()
        if inner is not None:
            os.kill(inner, signal.SIGTERM)
        return self.process.wait(timeout=grace)

    def kill(self) -> None:
        """SIGKILL to the container's first process; the system ends the others with it."""
        inner = self._inner()
        if inner is None:
            self.process.kill()
        else:
            # unshare would tell it, but what changes its user is told no more
            os.kill(inner, signal.SIGKILL)
        self.process.wait()

    def remove(self) -> None:
        """End it, whatever it does, and take everything away but volumes and its log."""
        if self.exit_code is None:
            self.kill()
        subprocess.run(["ip", "netns", "delete", self._net], check=False)
        shutil.rmtree(self._directory, ignore_errors=True)

    def written(self) -> set[str]:
        """What lies in the layer above the root: nothing but what we put there, if it was read-only."""
        upper = self._directory / "upper"
        return {str(path.relative_to(upper)) for path in upper.rglob("*") if path.is_file()}

    def _plug(self, network: str, address: str) -> None:
        outer, inner = f"p{uuid.uuid4().hex[:8]}", f"p{uuid.uuid4().hex[:8]}"
        run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", self._net)
        run("ip", "link", "set", outer, "master", network, "up")
        run("ip", "-n", self._net, "address", "add", f"{address}/24", "dev", inner)
        # from the address, as Docker makes it: neighbours find the next container at once, too
        hardware = ":".join(["02", "42", *(f"{int(part):02x}" for part in address.split("."))])
        run("ip", "-n", self._net, "link", "set", inner, "address", hardware, "up")

    def _inner(self) -> int | None:
        """The container's first process, once it is the command and no longer our script."""
        # ip executes unshare in its own place; unshare's child is the container
        pid = self.process.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        entered = (self._directory / "entered").exists()
        return int(children[0]) if children and entered else None

    def _as_user(self) -> list[str]:
        spec = self.spec
        return [
            *("setpriv", f"--reuid={spec.uid}", f"--regid={spec.gid}", "--clear-groups"),
            *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--"),
        ]

    def _script(self) -> str:
        """Makes the file system, then becomes the command."""
        spec, base = self.spec, self._directory
        root = base / "root"
        upper = base / "upper"
        steps = [
            f"mount -t overlay overlay "
            f"-o lowerdir={spec.root},upperdir={upper},workdir={base / 'work'} {root}",
        ]
        steps += [
            f"mkdir -p {root}/proc {root}/dev {root}/tmp",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
            f"cp {self._file('hosts', self._hosts())} {root}/etc/hosts",
            f"rm -f {root}/etc/resolv.conf; cp {self._file('resolv.conf', self._resolver())} {root}/etc",
            f"mkdir -p {root}/opt/penstock/bin {root}{spec.workdir}",
        ]
        for name, script in spec.programs.items():
            target = f"{root}/opt/penstock/bin/{name}"
            steps.append(f"cp {self._file(name, script)} {target}; chmod 755 {target}")
        for source, target, read_only in spec.mounts:
            make = (
                f"mkdir -p {root}{target}"
                if source.is_dir()
                else f"mkdir -p {root}{Path(target).parent}; touch {root}{target}"
            )
            steps.append(f"{make}; mount --bind {shlex.quote(str(source))} {root}{target}")
            if read_only:
                steps.append(f"mount -o remount,bind,ro {root}{target}")
        for entry in spec.tmpfs:
            target, _, options = entry.partition(":")
            mode = "" if "mode=" in options else ("mode=1777" if target == "/tmp" else "mode=755")
            steps.append(f"mkdir -p {root}{target}")
            asked = ",".join(filter(None, ("nosuid,nodev,noexec", mode, options)))
            steps.append(f"mount -t tmpfs -o {asked} tmpfs {root}{target}")
        in_memory = [Path(entry.partition(":")[0]) for entry in spec.tmpfs]
        for path in spec.shown:
            if spec.root != Path("/") or any(path.is_relative_to(target) for target in in_memory):
                steps.append(f"mkdir -p {root}{path}; mount --bind {path} {root}{path}")
            # in the layer above: nothing changes on this machine
            steps += [f"chmod a+x {root}{parent}" for parent in list(path.parents)[:-1]]
        if spec.read_only:
            steps.append(f"mount -o remount,ro {root}")
        command = shlex.join([*self._as_user(), *spec.command])
        enter = f"cd {spec.workdir}; exec {command}"
        steps.append(f"touch {base / 'entered'}")
        steps.append(f"exec chroot {root} /bin/sh -euc {shlex.quote(enter)}")
        return "\n".join(steps)

    def _hosts(self) -> str:
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.spec.hosts.items())]
        return "\n".join(lines) + "\n"

    def _resolver(self) -> str:
        return f"nameserver {self.spec.name_server}\n" if self.spec.name_server else ""

    def _file(self, name: str, text: str) -> Path:
        path = self._directory / name
        path.write_text(text)
        path.chmod(0o644)
        return path


class Networks:
    """Bridges for Compose's networks, and addresses on them; the first of each is this machine's."""

    def __init__(self, names: list[str]) -> None:
        self._stack = ExitStack()
        self._bridges: dict[str, str] = {}
        self._used = dict.fromkeys(names, 1)
        # a range that hardly anything uses, different for runs beside each other
        block = uuid.uuid4().int % 50 * 4
        self._subnets = {name: f"10.213.{block + number}" for number, name in enumerate(names)}

    def __enter__(self) -> "Networks":
        for name, subnet in self._subnets.items():
            bridge = f"b{uuid.uuid4().hex[:8]}"
            run("ip", "link", "add", bridge, "type", "bridge")
            self._stack.callback(run, "ip", "link", "delete", bridge)
            run("ip", "address", "add", f"{subnet}.1/24", "dev", bridge)
            run("ip", "link", "set", bridge, "up")
            self._bridges[name] = bridge
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def bridge(self, name: str) -> str:
        return self._bridges[name]

    def gateway(self, name: str) -> str:
        """This machine's own address on a network."""
        return f"{self._subnets[name]}.1"

    def address(self, name: str) -> str:
        """A new address on a network."""
        self._used[name] += 1
        return f"{self._subnets[name]}.{self._used[name]}"


def penstock_programs() -> dict[str, str]:
    """The image's programs, as this interpreter has them."""
    path = f"{ROOT / 'namespace'}"
    python = f"#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} "
    return {"penstock": python + '-m penstock.deploy.cli "$@"\n', "python": python + '"$@"\n'}


def shown_paths() -> list[Path]:
    """What `penstock_programs` need to read."""
    wanted = [ROOT, Path(sys.prefix), Path(sys.base_prefix), *map(Path, _site_paths())]
    found: list[Path] = []
    for path in sorted({path.resolve() for path in wanted}):
        if not any(path.is_relative_to(other) for other in found) and not path.is_relative_to("/usr"):
            found.append(path)
    return found


def _site_paths() -> list[str]:
    return [path for path in sys.path if path.endswith("site-packages")]


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory for containers: the layers of an overlay must not lie below one another."""
    with tempfile.TemporaryDirectory(prefix="penstock-containers-") as directory:
        run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", directory)
        try:
            yield Path(directory)
        finally:
            run("umount", "--lazy", directory)
