"""The processes of one experiment, found by what their command lines say."""

import os
import re
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from penstock.deploy.state import CONFIG_FILE

KINDS = {"produce": "producer", "train": "trainer", "run": "supervisor"}


@dataclass(frozen=True)
class Process:
    pid: int
    kind: str


@dataclass
class Victims:
    """Processes of the experiment in a directory, and since when they have been at work.

    Attributes:
        directory: of everything; `work` in it is the work directory.
        config: the file that the supervisor was given.
        seen: when each was first seen, by process id.
        ready: when each had first said that it is set up.
    """

    directory: Path
    config: Path
    seen: dict[int, float] = field(default_factory=dict)
    ready: dict[int, float] = field(default_factory=dict)
    _read: dict[Path, int] = field(default_factory=dict)

    @property
    def _workdir(self) -> Path:
        return self.directory / "work"

    def look(self, now: float) -> list[Process]:
        """Producers, trainers and supervisors that run now."""
        found = [process for pid in _pids() if (process := self._process(pid))]
        for process in found:
            self.seen.setdefault(process.pid, now)
        self._read_logs(now)
        return found

    def everything(self) -> list[int]:
        """Process ids of all processes that speak of the directory in their command line."""
        return [pid for pid in _pids() if any(f"{self.directory}/" in word for word in _words(pid))]

    def _process(self, pid: int) -> Process | None:
        words = _words(pid)
        # the supervisor's file, or the one that it gives to its children
        if str(self.config) not in words and str(self._workdir / CONFIG_FILE) not in words:
            return None
        kinds = [KINDS[word] for word in words if word in KINDS]
        return Process(pid, kinds[0]) if kinds else None

    def _read_logs(self, now: float) -> None:
        """A worker's first line names it, and its name holds its process id: kind-host-pid-random."""
        for log in (self._workdir / "logs").glob("*.log"):
            with open(log, errors="replace") as file:
                file.seek(self._read.get(log, 0))
                text = file.read()
                self._read[log] = file.tell()
            for line in text.splitlines():
                if (name := said_name(line)) is not None:
                    self.ready.setdefault(int(name.rsplit("-", 2)[1]), now)


def said_name(text: str) -> str | None:
    """What a worker calls itself in its log, once it is set up."""
    found = re.search(r"(?:producing|training runs of) \S+ as (\S+)", text)
    return found[1] if found else None


def tell(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _words(pid: int) -> list[str]:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return line.split("\0")
