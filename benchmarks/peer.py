"""Contenders that run in other libraries' own environment, as processes that work when told to.

`make interop` makes that environment; where it is missing, benchmarks leave these contenders out and say so.
"""

import subprocess
from pathlib import Path
from types import TracebackType

PYTHON = Path(".venv-interop/bin/python")
"""Its interpreter, from the repository's root."""
SCRIPTS = Path(__file__).parent / "peers"


class Peer:
    """A script of `benchmarks/peers`: says `ready`, then does one round per line and prints its seconds."""

    def __init__(self, script: str, *arguments: object) -> None:
        command = [str(PYTHON), str(SCRIPTS / script), *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._expect("ready")

    @staticmethod
    def available() -> bool:
        return PYTHON.exists()

    def round(self) -> float:
        """Do one round; its seconds as the process itself measured them."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._expect())

    def _expect(self, word: str = "") -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line or (word and line != word):
            raise RuntimeError(f"{self._process.args!r} ended, or said {line!r}")
        return line

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
