"""One child process of `penstock run`: kept running until it exits with 0."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from penstock.common.errors import PenstockError, UserError
from penstock.common.logs import LOGGER, last_words
from penstock.common.process import SUPERVISED_VARIABLE

RESTARTS = 5
"""Deaths in a row, each soon after a start, before the supervisor gives up."""
QUICK_DEATH_SECONDS = 60.0
"""A death this soon after its start is a quick one."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
"""Before a start; doubled by each quick death."""


@dataclass
class Child:
    """A child process that is kept running until it exits with 0.

    Its standard input is a pipe that only we hold open, so that it notices if we are killed.
    """

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str]
    talks: bool = False
    """Its log's last line says how far it is."""
    crew: int | None = None
    """An open file that it inherits, and whose lock it thereby holds."""
    process: "subprocess.Popen[bytes] | None" = None
    done: bool = False
    starts: int = 0
    quick_deaths: int = 0
    start_at: float = 0.0
    _started: float = 0.0

    def check(self) -> None:
        """Notice its end; start it (again) if it is to run and its time has come.

        Raises:
            UserError: something that it was given is wrong.
            PenstockError: it keeps dying.
        """
        if self.done:
            return
        if self.process is None:
            if time.monotonic() >= self.start_at:
                self._start()
            return
        code = self.process.poll()
        if code is None:
            return
        self._forget()
        if code == 0:
            self.done = True
        else:
            self._died(code)

    def start_again(self) -> None:
        """It was done; now there is more to do."""
        self.done = False

    def last_words(self) -> str:
        """What the last line of its log says, without the word 'error:'."""
        return last_words(self.log.read_text(errors="replace"))

    def stop(self) -> None:
        """Ask it to stop."""
        if self.process is not None:
            self.process.terminate()

    def kill(self) -> None:
        """End it and whatever it started, without asking."""
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, deadline: float) -> None:
        """Wait until the deadline (monotonic seconds), then kill."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            LOGGER.warning("%s does not stop; killing it", self.name)
            self.kill()
            self.process.wait()
        self._forget()

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=os.environ | self.environment | {SUPERVISED_VARIABLE: "1"},
                pass_fds=() if self.crew is None else (self.crew,),
                # a Ctrl-C at the terminal is for the supervisor, which stops its children in order
                start_new_session=True,
            )
        self.starts += 1
        self._started = time.monotonic()

    def _died(self, code: int) -> None:
        quick = time.monotonic() - self._started < QUICK_DEATH_SECONDS
        # one that worked before was given nothing wrong: a disk is full, a service is down
        if code == UserError.exit_code and quick and self.starts == 1:
            raise UserError(self.last_words())
        self.quick_deaths = self.quick_deaths + 1 if quick else 0
        if self.quick_deaths >= RESTARTS:
            raise PenstockError(f"{self.name} keeps dying (see {self.log}): {self.last_words()}")
        words = f": {self.last_words()}" if code > 0 else ""
        LOGGER.warning("%s ended with %s%s; starting it again", self.name, describe_exit(code), words)
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**self.quick_deaths)
        self.start_at = time.monotonic() + pause

    def _forget(self) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process = None


def describe_exit(code: int) -> str:
    """'signal SIGKILL' or 'exit code 1'."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
