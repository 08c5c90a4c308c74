"""`penstock run`: everything on one machine, in order, resumable.

corpus → (embedded Valkey) → producers and trainers side by side → report. Children are separate
processes; one that dies is started again, and the protocol makes that harmless.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from penstock.common.embedded import EmbeddedServer
from penstock.common.errors import ConfigError, PenstockError, Unavailable, UserError
from penstock.common.logs import LOGGER
from penstock.common.process import stop_on_signals
from penstock.common.redis import URL_VARIABLE
from penstock.deploy.config import Config
from penstock.deploy.progress import Progress
from penstock.deploy.state import CONFIG_FILE, REDIS_FILE, State, read_state
from penstock.store.layout import MANIFEST
from penstock.store.objects import open_store

DONE_FILE = "done.json"
"""Written when everything succeeded: the config it was done for."""
POLL_SECONDS = 0.5
RESTARTS = 5
"""Deaths in a row, each soon after a start, before the supervisor gives up."""
QUICK_DEATH_SECONDS = 60.0
STOP_SECONDS = 60.0
"""How long children may take to stop before they are killed."""


@dataclass
class Child:
    """A child process that is kept running until it exits with 0."""

    name: str
    arguments: list[str]
    log: Path
    environment: dict[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    quick_deaths: int = 0
    done: bool = False
    talks: bool = False
    """Its log's last line says how far it is."""
    start_at: float = 0.0

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock.deploy.cli", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | self.environment,
                # a Ctrl-C at the terminal is for the supervisor, which stops its children in order
                start_new_session=True,
            )
        self.started = time.monotonic()

    def check(self) -> None:
        """Notice its end; start it again if it should not have ended.

        Raises:
            UserError: it says that something it was given is wrong.
            PenstockError: it keeps dying at once.
        """
        if self.done:
            return
        if self.process is None:
            if time.monotonic() >= self.start_at:
                self.start()
            return
        code = self.process.poll()
        if code is None:
            return
        if code == 0:
            self.done = True
            return
        if code == UserError.exit_code:
            raise UserError(self.last_words())
        quick = time.monotonic() - self.started < QUICK_DEATH_SECONDS
        self.quick_deaths = self.quick_deaths + 1 if quick else 0
        if self.quick_deaths >= RESTARTS:
            raise PenstockError(f"{self.name} keeps dying (see {self.log}): {self.last_words()}")
        LOGGER.warning("%s ended with %s; starting it again", self.name, describe_exit(code))
        self.process = None
        self.start_at = time.monotonic() + min(30.0, 0.5 * 2**self.quick_deaths)

    def last_words(self) -> str:
        """The last line of its log, without the word 'error:'."""
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return lines[-1].removeprefix("error: ")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def end(self, deadline: float) -> None:
        """Wait until the deadline (monotonic seconds), then kill."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            LOGGER.warning("%s does not stop; killing it", self.name)
            self.process.kill()
            self.process.wait()


def describe_exit(code: int) -> str:
    """'signal SIGKILL' or 'exit code 1'."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def run(config: Config) -> int:
    """Run everything a config describes; returns the exit code. Calling it again resumes."""
    if not config.runs and config.trainers:
        raise ConfigError("runs: no run is configured; add one, or set trainers to 0")
    directory = config.directory
    directory.mkdir(parents=True, exist_ok=True)
    state = read_state(config)
    if state.finished and _same_as_before(config):
        print(_story(state, f"everything is done already; see {directory / 'report.html'}"))
        return 0
    stop = stop_on_signals()
    config_file = directory / CONFIG_FILE
    config_file.write_text(config.model_dump_json(indent=1) + "\n")
    server = None
    environment: dict[str, str] = {}
    if not config.redis.url and not os.environ.get(URL_VARIABLE):
        server = EmbeddedServer(directory / "valkey")
        server.wait_until_ready()
        environment[URL_VARIABLE] = server.url
        (directory / REDIS_FILE).write_text(server.url + "\n")
    children: list[Child] = []

    def child(name: str, *arguments: str, talks: bool = False) -> Child:
        log = directory / "logs" / f"{name}.log"
        # a configured port is the first child's; the others take the following ones
        port = config.metrics.port + len(children) if config.metrics.port > 0 else config.metrics.port
        made = Child(name, ["--metrics-port", str(port), *arguments], log, environment, talks=talks)
        children.append(made)
        return made

    try:
        settings = config.redis.model_copy(update={"url": server.url}) if server else config.redis
        with Progress(config, settings) as progress:
            watch = partial(_watch, children, server, progress, stop)
            corpus = child("corpus", "corpus", str(config_file), talks=True)
            watch(lambda: corpus.done)
            for number in range(config.producers):
                child(f"producer-{number}", "produce", str(config_file))
            if config.runs:
                _submit_when_planned(config, watch, stop)
            for number in range(config.trainers):
                child(f"trainer-{number}", "train", "--drain", str(config_file))
            watch(lambda: all(c.done for c in children))
            if not stop.is_set():
                for name, arguments in _reports(config, config_file).items():
                    child(name, *arguments, talks=True)
                    # one after the other: each loads the model and uses the whole machine
                    watch(lambda: all(c.done for c in children))
    finally:
        _stop_all(children)
        if server is not None:
            server.close()
            (directory / REDIS_FILE).unlink(missing_ok=True)
    if stop.is_set():
        print("stopped; the same command carries on from here")
        return 0
    final = read_state(config)
    if not final.finished:
        failed = [
            f"{run_id} ({r.status}: {r.reason})" for run_id, r in final.runs.items() if r.status != "done"
        ]
        raise PenstockError(f"not everything succeeded: {', '.join(failed) or 'the dataset is incomplete'}")
    (directory / DONE_FILE).write_text(config.model_dump_json() + "\n")
    print(_story(final, f"report: {directory / 'report.html'}"))
    return 0


def _same_as_before(config: Config) -> bool:
    done = config.directory / DONE_FILE
    if not done.is_file() or not (config.directory / "report.html").is_file():
        return False
    return bool(json.loads(done.read_text()) == json.loads(config.model_dump_json()))


def _watch(
    children: list[Child],
    server: EmbeddedServer | None,
    progress: Progress,
    stop: threading.Event,
    finished: Callable[[], bool],
) -> None:
    while not stop.is_set() and not finished():
        if server is not None and server.ensure():
            LOGGER.warning("the embedded Valkey server had ended; started it again")
        for child in children:
            child.check()
        talking = [child for child in children if child.talks and child.process and not child.done]
        progress.note = "; ".join(child.last_words() for child in talking)
        progress.update()
        stop.wait(POLL_SECONDS)


def _submit_when_planned(
    config: Config, watch: Callable[[Callable[[], bool]], None], stop: threading.Event
) -> None:
    """Runs pin the dataset's manifest, which the first producer writes."""
    store = open_store(config.dataset.url)
    if not config.producers and not store.exists(MANIFEST):
        raise Unavailable(f"dataset.url: no dataset at {config.dataset.url}, and producers is 0")
    watch(lambda: store.exists(MANIFEST))
    if not stop.is_set():
        from penstock.deploy.processes import submit

        submit(config)


def _reports(config: Config, config_file: Path) -> dict[str, list[str]]:
    """Arguments of the report child of each finished run.

    The first run's report lies in the work directory, the others' in folders of their own.
    """
    found = {}
    for number, (run_id, run) in enumerate(read_state(config).runs.items()):
        out = config.directory / "reports" / run_id if number else config.directory
        if run.status == "done":
            run_url = f"{config.runs_url}/{run_id}"
            found[f"report-{run_id}"] = ["report", str(config_file), run_url, "--out", str(out)]
    return found


def _stop_all(children: list[Child]) -> None:
    # trainers first: they may be waiting for chunks that producers are still making
    for child in reversed(children):
        child.stop()
    deadline = time.monotonic() + STOP_SECONDS
    for child in reversed(children):
        child.end(deadline)


def _story(state: State, last: str) -> str:
    lines = [f"dataset: {state.committed} of {state.planned} chunks, {state.rows} rows"]
    for run_id, run_state in state.runs.items():
        lines.append(f"run {run_id}: {run_state.status}, {run_state.step} steps, {run_state.rows} rows")
    return "\n".join([*lines, last])
