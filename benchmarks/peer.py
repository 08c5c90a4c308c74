"""Contenders that run in other libraries' own environment, as processes that work when told to.

`make interop` makes that environment; where it is missing, benchmarks leave these contenders out and say so.
"""

import subprocess
from pathlib import Path
from types import TracebackType

PYTHON = Path(".venv-interop/bin/python")
"""Its interpreter, from the repository's root."""


class Peer:
    """A module of `benchmarks.peers`: says `ready`, then works for each line that it is told."""

    def __init__(self, script: str, *arguments: object) -> None:
        command = [str(PYTHON), "-m", script, *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._expect("ready")

    @staticmethod
    def available() -> bool:
        return PYTHON.exists()

    def round(self) -> float:
        """Do one round; its seconds as the process itself measured them."""
        return float(self.tell(""))

    def tell(self, line: str, answer: str = "") -> str:
        """Say a line, and wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._expect(answer)

    def _expect(self, word: str = "") -> str:
        """The next line; with a word, the next that is this one: libraries print things, too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not word or line.strip() == word:
                return line.strip()
        raise RuntimeError(f"{self._process.args!r} ended")

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
