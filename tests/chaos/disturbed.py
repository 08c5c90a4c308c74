"""One experiment under `penstock run`, disturbed at random moments until it is finished."""

import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from chaos.light import CHUNK_SECONDS, STEP_SECONDS
from chaos.settings import CHUNKS, experiment, program
from chaos.stores import Begin, Place, Trouble
from chaos.victims import Process, Victims, runs, tell
from chaos.wipes import Queue
from penstock.common.errors import PenstockError
from penstock.common.process import STOP_SECONDS
from penstock.common.redis import PASSWORD_VARIABLE, URL_VARIABLE
from penstock.store.heads import head_numbers, newest_head
from penstock.store.layout import commit_key
from penstock.store.objects import open_store
from penstock.trainer.config import run_ids
from services.command import write_config

TESTS = Path(__file__).parents[1]
LOOK_SECONDS = 0.1
STUCK_SECONDS = 300.0
"""Without a new commit or head for so long a round has failed."""
REPORT_SECONDS = 15.0
"""Faults go on for so long when only reports are left to be made."""
RUNS = 2
FREEZE_SECONDS = 20.0
"""The longest a process is frozen if nobody takes its work over."""
PACE = {CHUNK_SECONDS: "0.45", STEP_SECONDS: "0.03"}
"""A light experiment then takes most of a minute by itself."""

Say = Callable[[str], None]


class Failed(Exception):
    """An experiment did not come to its end."""


@dataclass
class Frozen:
    """A stopped process: continued once somebody has its work, or when its time is over."""

    process: Process
    until: float
    replaced: Callable[[], bool]


@dataclass
class Tally:
    """What was done to an experiment and what it said."""

    kills: int = 0
    restarts: int = 0
    fenced: int = 0
    left_behind: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What is run, where, and how badly it is treated.

    Attributes:
        kills: how many faults at most.
        pace: environment that slows a light experiment down.
        trainers: how many; drawn if None.
        chunks: of a light dataset.
    """

    source: str
    kills: int
    pace: dict[str, str] = field(default_factory=lambda: dict(PACE))
    trainers: int | None = None
    chunks: int = CHUNKS


class Disturbed:
    """Runs one experiment to its end. `random` draws the faults, their victims and the pauses."""

    def __init__(
        self, directory: Path, name: str, plan: Plan, place: Place, draw: random.Random, say: Say
    ) -> None:
        self.directory = directory / name
        self.workdir = self.directory / "work"
        base = place.base(name)
        self.dataset_url = f"{base or self.workdir}/dataset"
        self.runs_url = f"{base or self.workdir}/runs"
        self.tally = Tally()
        self._plan, self._place, self._draw, self._say = plan, place, draw, say
        self.trainers = plan.trainers or draw.choice([1, 2, 2])
        config = experiment(plan.source, self.workdir, base, self.trainers, plan.chunks)
        self._config = write_config(self.directory / "config.yaml", config)
        self._victims = Victims(self.directory, self._config)
        self._queue = Queue(self.workdir, self.directory / "copies")
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._frozen: list[Frozen] = []
        self._trouble: tuple[float, Trouble] | None = None
        self._patience = {kind: self._new_patience() for kind in ("producer", "trainer", "supervisor")}
        self._rested = dict.fromkeys(("kill valkey", "flushall", "trouble"), (False, 0.0))
        self._started = self._start_at = self._moved = self._looked = 0.0
        self._ended = math.inf
        self._progress: tuple[int, ...] = ()
        self._running: list[Process] = []
        self._actions: dict[str, tuple[int, Callable[[float], str | None]]] = {
            "kill producer": (5, partial(self._kill, "producer")),
            "kill trainer": (6, partial(self._kill, "trainer")),
            "freeze producer": (2, partial(self._freeze, "producer")),
            "freeze trainer": (6, partial(self._freeze, "trainer")),
            "kill supervisor": (2, self._kill_supervisor),
            "kill valkey": (3, self._kill_valkey),
            "flushall": (3, self._wipe),
            "roll redis back": (1, self._roll_back),
        }
        for trouble, (weight, begin) in place.troubles().items():
            self._actions[trouble] = weight, partial(self._begin, begin)

    # From start to end

    def carry_out(self) -> Tally:
        """Start it, disturb it, let it finish.

        Raises:
            Failed: it does not finish.
        """
        (self.directory / "tmp").mkdir()
        self._moved = time.monotonic()
        next_fault = self._moved + self._draw.uniform(2.0, 6.0)
        next_copy = self._moved
        try:
            while not self._look_after():
                now = time.monotonic()
                if now >= next_copy and self._queue.pid() is not None:
                    self._queue.copy()
                    next_copy = now + self._draw.uniform(3.0, 12.0)
                if self._may_strike(now) and now >= next_fault and self._strike(now):
                    next_fault = time.monotonic() + self._draw.uniform(0.3, 3.0)
                time.sleep(LOOK_SECONDS)
            self._wind_up()
        finally:
            self._end_everything()
        return self.tally

    def _may_strike(self, now: float) -> bool:
        """Once everything is trained only reports are left: faults go on for a while, then it may end."""
        return self.tally.kills < self._plan.kills and now < self._ended + REPORT_SECONDS

    def tails(self, lines: int = 15) -> str:
        """The last lines of every log."""
        logs = [self.directory / "penstock.log", *sorted((self.workdir / "logs").glob("*.log"))]
        shown = []
        for log in logs:
            text = log.read_text(errors="replace").splitlines() if log.is_file() else []
            shown += [f"--- {log.name}", *text[-lines:]]
        return "\n".join(shown)

    def _look_after(self) -> bool:
        """Keep the supervisor running and end what is over; whether the experiment is finished."""
        now = time.monotonic()
        self._running = self._victims.look(now)
        for frozen in list(self._frozen):
            if not runs(frozen.process.pid) or now > frozen.until or self._is_replaced(frozen):
                self._thaw(frozen)
        if self._trouble and now >= self._trouble[0]:
            self._end_trouble()
        self._watch_progress(now)
        if self._supervisor is None:
            if now >= self._start_at:
                self._start()
            return False
        code = self._supervisor.poll()
        if code is None:
            return False
        self._supervisor = None
        if code == 0:
            return True
        said = self._last_words()
        if "not everything succeeded" in said:
            raise Failed(said)
        self.tally.restarts += 1
        self._say(f"penstock run ended with {code}: {said}")
        return False

    def _start(self) -> None:
        unwanted = (URL_VARIABLE, PASSWORD_VARIABLE)
        environment = {name: value for name, value in os.environ.items() if name not in unwanted}
        environment |= self._place.environment | self._plan.pace
        environment |= {
            "PYTHONPATH": str(TESTS),
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(self.directory / "tmp"),
        }
        guarded = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        command = [*guarded, *program(self._plan.source), "run", str(self._config)]
        with open(self.directory / "penstock.log", "ab") as log:
            self._supervisor = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        self._started = time.monotonic()

    def _last_words(self) -> str:
        lines = (self.directory / "penstock.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    def _watch_progress(self, now: float) -> None:
        if now - self._looked < 3.0 or self._trouble:
            return
        self._looked = now
        try:
            progress = self._positions()
        except PenstockError:
            return
        if progress != self._progress:
            self._progress, self._moved = progress, now
        elif now - self._moved > STUCK_SECONDS:
            raise Failed(f"no commit and no head for {STUCK_SECONDS:.0f} s, at {progress}")

    def _positions(self) -> tuple[int, ...]:
        """Committed chunks, and each run's position."""
        store = open_store(self.runs_url)
        heads = [newest_head(store, run_id) for run_id in run_ids(store)]
        if len(heads) == RUNS and all(head is not None and head.terminal for head in heads):
            self._ended = min(self._ended, time.monotonic())
        commits = sum(1 for _ in open_store(self.dataset_url).list("commits/"))
        return commits, *(head.position if head else -1 for head in heads)

    def _wind_up(self) -> None:
        """After the end: everybody must go by themselves, and leave nothing lying about."""
        for frozen in list(self._frozen):
            self._thaw(frozen)
        deadline = time.monotonic() + STOP_SECONDS + 15.0
        while (left := self._victims.everything()) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        self.tally.left_behind += [f"process {pid} still runs" for pid in left]
        self.tally.left_behind += [
            # sockets; torch keeps a folder of its own here
            f"{path} still exists"
            for path in (self.directory / "tmp").glob("penstock-*")
        ]
        for log in (self.workdir / "logs").glob("trainer-*.log"):
            text = log.read_text(errors="replace")
            self.tally.fenced += text.count("was committed by another worker")

    def _end_everything(self) -> None:
        if self._trouble:
            self._end_trouble()
        deadline = time.monotonic() + 20.0
        while (left := self._victims.everything()) and time.monotonic() < deadline:
            for pid in left:
                tell(pid, signal.SIGKILL)
            time.sleep(LOOK_SECONDS)
        if self._supervisor is not None:
            self._supervisor.wait()

    # Faults

    def _strike(self, now: float) -> bool:
        """One fault of those that are possible now, by chance and weight."""
        left = dict(self._actions)
        while left:
            (name,) = self._draw.choices(list(left), [weight for weight, _ in left.values()])
            what = left.pop(name)[1](now)
            if what is not None:
                self.tally.kills += 1
                self._say(f"{self.tally.kills:3d} {name}: {what}")
                return True
        return False

    def _kill(self, kind: str, now: float) -> str | None:
        victim = self._choose(kind, now)
        if victim is None or not tell(victim.pid, signal.SIGKILL):
            return None
        self._patience[kind] = self._new_patience()
        return f"SIGKILL to {victim.pid}"

    def _freeze(self, kind: str, now: float) -> str | None:
        if any(frozen.process.kind == kind for frozen in self._frozen):
            return None  # somebody must be left to take the work over
        victim = self._choose(kind, now)
        if victim is None:
            return None
        work, replaced = self._held_by(victim)
        if not work or not tell(victim.pid, signal.SIGSTOP):
            return None
        self._patience[kind] = self._new_patience()
        self._frozen.append(Frozen(victim, now + FREEZE_SECONDS, replaced))
        return f"SIGSTOP to {victim.pid}, which holds {work}"

    def _held_by(self, victim: Process) -> tuple[str, Callable[[], bool]]:
        """What a process works on, and how to see that somebody else has done it."""
        word = self._queue.word(victim.pid)
        if run_id := word.get("run"):
            store = open_store(self.runs_url)
            # taking over is a head; another one shows that the work goes on
            last = max(head_numbers(store, run_id), default=-1)
            return f"run {run_id}", lambda: max(head_numbers(store, run_id), default=-1) >= last + 2
        held, dataset = word.get("making", []), open_store(self.dataset_url)
        made = [commit_key(index) for index in held]
        return " ".join(f"chunk {index}" for index in held), lambda: all(map(dataset.exists, made))

    def _is_replaced(self, frozen: Frozen) -> bool:
        # a store in trouble cannot be asked
        if self._trouble is not None:
            return False
        try:
            return frozen.replaced()
        except PenstockError:
            return False

    def _thaw(self, frozen: Frozen) -> None:
        self._frozen.remove(frozen)
        why = "replaced" if self._is_replaced(frozen) else "not replaced"
        if tell(frozen.process.pid, signal.SIGCONT):
            self._say(f"    SIGCONT to {frozen.process.kind} {frozen.process.pid}: {why}")

    def _kill_supervisor(self, now: float) -> str | None:
        if not self._supervisor_is_rested(now):
            return None
        return self._end_supervisor(self._draw.uniform(0.0, 2.0))

    def _supervisor_is_rested(self, now: float) -> bool:
        """Whether it, or the first of its workers, has had its time."""
        early, seconds = self._patience["supervisor"]
        since = self._started if early else self._at_work_since()
        return self._supervisor is not None and now - since >= seconds

    def _at_work_since(self) -> float:
        """When the first worker of this supervisor was set up; for ever from now if none is."""
        seen, ready = self._victims.seen, self._victims.ready
        times = [since for pid, since in ready.items() if seen.get(pid, 0.0) > self._started]
        return min(times, default=float("inf"))

    def _end_supervisor(self, pause: float) -> str:
        assert self._supervisor is not None
        self._patience["supervisor"] = self._new_patience()
        pid = self._supervisor.pid
        self._supervisor.kill()
        self._supervisor.wait()
        self._supervisor = None
        self._start_at = time.monotonic() + pause
        return f"SIGKILL to {pid}, started again after {pause:.1f} s"

    def _kill_valkey(self, now: float) -> str | None:
        if not self._may("kill valkey", now) or (pid := self._queue.pid()) is None:
            return None
        self._rest("kill valkey", now)
        return f"SIGKILL to {pid}" if tell(pid, signal.SIGKILL) else None

    def _wipe(self, now: float) -> str | None:
        if not self._may("flushall", now) or not self._queue.wipe():
            return None
        self._rest("flushall", now)
        return "FLUSHALL"

    def _may(self, name: str, now: float) -> bool:
        """Whether a fault of this name has been long ago and finds, most of the time, workers at work."""
        early, until = self._rested[name]
        return now >= until and (early or self._at_work_since() <= now)

    def _rest(self, name: str, now: float) -> None:
        self._rested[name] = self._draw.random() < 0.2, now + self._draw.uniform(3.0, 12.0)

    def _roll_back(self, now: float) -> str | None:
        """As if the machine had crashed and come up with an older state of Redis's disk."""
        server = self._queue.pid()
        if server is None or not self._queue.has_copies() or not self._supervisor_is_rested(now):
            return None
        what = self._end_supervisor(0.0)
        self._queue.roll_back(self._draw, server)
        self._start()
        return f"{what}, with an older append-only file"

    def _begin(self, begin: Begin, now: float) -> str | None:
        if self._trouble is not None or not self._may("trouble", now):
            return None
        trouble = begin(self._draw)
        self._trouble = (now + trouble.seconds, trouble)
        return trouble.what

    def _end_trouble(self) -> None:
        assert self._trouble is not None
        _, trouble = self._trouble
        self._trouble = None
        trouble.end()
        self._rest("trouble", time.monotonic())

    # Victims

    def _choose(self, kind: str, now: float) -> Process | None:
        """A process that had the chance to get further since it, or the one before it, was hit."""
        early, seconds = self._patience[kind]
        since = self._victims.seen if early else self._victims.ready
        frozen = [frozen.process for frozen in self._frozen]
        rested = [
            process
            for process in self._running
            if process.kind == kind and process not in frozen and now - since.get(process.pid, now) >= seconds
        ]
        return self._draw.choice(rested) if rested else None

    def _new_patience(self) -> tuple[bool, float]:
        """Seconds after its start, now and then, or else seconds of work; then a process may be hit."""
        early = self._draw.random() < 0.2
        return early, self._draw.uniform(0.3, 4.0) if early else self._draw.uniform(2.0, 8.0)
