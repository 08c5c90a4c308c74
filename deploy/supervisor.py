"""`penstock run`: everything on one machine, in order, resumable.

corpus → (embedded Valkey) → producers and trainers side by side → report. Children are separate
processes; one that dies is started again, and the protocol makes that harmless.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import redis

from penstock.common.embedded import EmbeddedServer
from penstock.common.errors import ConfigError, PenstockError, Unavailable, UserError
from penstock.common.logs import LOGGER
from penstock.common.process import STOP_SECONDS, stop_on_signals, try_lock
from penstock.common.redis import URL_VARIABLE, Client, RedisSettings, connect
from penstock.deploy.child import Child
from penstock.deploy.config import Config
from penstock.deploy.progress import Progress
from penstock.deploy.state import CONFIG_FILE, REDIS_FILE, State, has_text, read_state
from penstock.store.layout import MANIFEST
from penstock.store.objects import open_store

PROGRAM = (sys.executable, "-m", "penstock.deploy.cli")
"""What children run."""
LOG_SETTINGS = {"json_logs", "log_level", "library_logs"}
DONE_FILE = "done.json"
"""Written when everything succeeded: the config it was done for."""
LOCK_FILE = "lock"
"""Locked by the supervisor of a work directory; holds its process id."""
CREW_FILE = "logs/lock"
"""Locked by the children of a work directory together, where their ports are configured."""
POLL_SECONDS = 0.5
REPAIR_SECONDS = 2.0
"""Pause between questions whether something is to be repaired."""


def run(config: Config, program: Sequence[str] = PROGRAM) -> int:
    """Run everything a config describes; returns the exit code. Calling it again resumes.

    Args:
        program: what children run; called with the arguments of the command line.

    Raises:
        UserError: it is being run already, or something given is wrong.
        PenstockError: a child keeps dying, or not everything succeeded.
    """
    if not config.runs and config.trainers:
        raise ConfigError("runs: no run is configured; add one, or set trainers to 0")
    directory = config.directory
    directory.mkdir(parents=True, exist_ok=True)
    state = read_state(config)
    if state.finished and _same_as_before(config):
        print(_story(state, f"everything is done already; see {directory / 'report.html'}"))
        return 0
    _check_stores(config)
    with _alone_in(directory):
        children: list[Child] = []
        stop = stop_on_signals(again=lambda: _kill_all(children))
        _supervise(config, program, children, stop)
    if stop.is_set():
        print("stopped; the same command carries on from here")
        return 0
    final = read_state(config)
    if not final.finished:
        failed = [
            f"{run_id} ({r.status}: {r.reason})" for run_id, r in final.runs.items() if r.status != "done"
        ]
        raise PenstockError(f"not everything succeeded: {', '.join(failed) or 'the dataset is incomplete'}")
    (directory / DONE_FILE).write_text(config.encode())
    print(_story(final, f"report: {directory / 'report.html'}"))
    return 0


def _check_stores(config: Config) -> None:
    """Refuse stores that cannot be written before hours are spent; the corpus' maker checks its own."""
    urls = [config.dataset.url] if config.producers else []
    urls += [config.runs_url] if config.runs else []
    for url in urls:
        open_store(url).probe()


def _supervise(config: Config, program: Sequence[str], children: list[Child], stop: threading.Event) -> None:
    """Everything up, through all phases, and everything down again, whatever happens."""
    redis_settings, environment = config.redis, dict[str, str]()
    with ExitStack() as stack:
        server = None
        if not config.redis.url and not os.environ.get(URL_VARIABLE):
            server = stack.enter_context(_embedded_server(config.directory))
            environment[URL_VARIABLE] = server.url
            redis_settings = config.redis.model_copy(update={"url": server.url})
        elif config.redis.url and URL_VARIABLE not in os.environ:
            # children's config file is without its password
            environment[URL_VARIABLE] = config.redis.url
        crew = stack.enter_context(_crew(config, stop))
        stack.callback(_stop_all, children, stop)
        supervisor = Supervisor(
            config=config,
            command=list(program),
            environment=environment,
            crew=crew,
            server=server,
            progress=stack.enter_context(Progress(config, redis_settings)),
            repairs_wanted=Repairs(config, redis_settings).wanted,
            stop=stop,
            children=children,
        )
        supervisor.carry_out()


@dataclass
class Supervisor:
    """Starts children phase by phase and keeps them, and their server, running."""

    config: Config
    command: list[str]
    environment: dict[str, str]
    crew: int | None
    server: EmbeddedServer | None
    progress: Progress
    repairs_wanted: Callable[[], bool]
    stop: threading.Event
    children: list[Child] = field(default_factory=list)
    producers: list[Child] = field(default_factory=list)
    trainers: list[Child] = field(default_factory=list)
    _asked: float = float("-inf")

    def carry_out(self) -> None:
        """All phases, or until `stop` is set."""
        config = self.config
        file = str(config.directory / CONFIG_FILE)
        Path(file).write_text(config.encode())
        if has_text(config):
            corpus = self.add("corpus", "corpus", file, talks=True)
            self.watch(lambda: corpus.done)
        self.producers = [self.add(f"producer-{n}", "produce", file) for n in range(config.producers)]
        if config.runs and not self.stop.is_set():
            self._submit_when_planned()
        self.trainers = [self.add(f"trainer-{n}", "train", "--drain", file) for n in range(config.trainers)]
        self.watch(self._all_done)
        if not self.stop.is_set():
            for name, arguments in _reports(config, file).items():
                self.add(name, *arguments, talks=True)
                # one after the other: each loads the model and uses the whole machine
                self.watch(self._all_done)

    def add(self, name: str, *arguments: str, talks: bool = False) -> Child:
        """A new child, which `watch` starts."""
        config = self.config
        log = config.directory / "logs" / f"{name}.log"
        # a configured port is the first child's; the others take the following ones
        port = config.metrics.port + (len(self.children) if config.metrics.port > 0 else 0)
        command = [*self.command, "--metrics-port", str(port), *arguments]
        child = Child(name, command, log, self.environment, talks, self.crew)
        self.children.append(child)
        return child

    def watch(self, finished: Callable[[], bool]) -> None:
        """Keep everything running until `finished()` or `stop`."""
        while not self.stop.is_set() and not finished():
            if self.server is not None and self.server.ensure():
                LOGGER.warning("the embedded Valkey server had ended; started it again")
            for child in self.children:
                child.check()
            self._start_repairs()
            talking = [child for child in self.children if child.talks and child.process]
            self.progress.note = "; ".join(child.last_words() for child in talking)
            self.progress.update()
            self.stop.wait(POLL_SECONDS)

    def _all_done(self) -> bool:
        return all(child.done for child in self.children)

    def _start_repairs(self) -> None:
        """Producers end with a complete dataset; a chunk that turns out damaged needs one again."""
        idle = self.producers and all(child.done for child in self.producers)
        wait = self._asked + REPAIR_SECONDS - time.monotonic()
        if not idle or wait > 0 or all(child.done for child in self.trainers):
            return
        self._asked = time.monotonic()
        if self.repairs_wanted():
            LOGGER.info("starting %s again for a repair", self.producers[0].name)
            self.producers[0].start_again()

    def _submit_when_planned(self) -> None:
        """Runs pin the dataset's manifest, which the first producer writes."""
        url = self.config.dataset.url
        store = open_store(url)
        if not self.producers and not store.exists(MANIFEST):
            raise Unavailable(f"dataset.url: no dataset at {url}, and producers is 0")
        self.watch(lambda: store.exists(MANIFEST))
        if not self.stop.is_set():
            from penstock.deploy.processes import submit

            submit(self.config)


class Repairs:
    """Whether a trainer waits for a chunk of a config's dataset to be made again."""

    def __init__(self, config: Config, redis_settings: RedisSettings) -> None:
        self._config = config
        self._settings = redis_settings
        self._client: Client | None = None

    def wanted(self) -> bool:
        from penstock.store.dataset import open_dataset
        from penstock.store.queue import repairs_wanted

        try:
            self._client = self._client or connect(self._settings)
            dataset = open_dataset(self._config.dataset.url)
            prefix = self._config.redis.prefix
            return repairs_wanted(self._client, prefix, dataset.url, dataset.manifest.digest)
        except (redis.RedisError, PenstockError):
            return False  # asked again soon


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """The only supervisor of a work directory.

    Raises:
        UserError: another one is at it.
    """
    with open(directory / LOCK_FILE, "a+") as file:
        if not try_lock(file.fileno()):
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise UserError(
                f"workdir: {directory} is in use by another penstock run (process {pid}); wait for it, "
                "stop it, or choose another workdir"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextmanager
def _embedded_server(directory: Path) -> Iterator[EmbeddedServer]:
    with closing(EmbeddedServer(directory / "valkey")) as server:
        server.wait_until_ready()
        (directory / REDIS_FILE).write_text(server.url + "\n")
        try:
            yield server
        finally:
            (directory / REDIS_FILE).unlink(missing_ok=True)


@contextmanager
def _crew(config: Config, stop: threading.Event) -> Iterator[int]:
    """A lock that all children inherit, so that a supervisor sees those of one that was killed.

    They may finish what is in hand beside their successors, unless both need the same ports.
    """
    path = config.directory / CREW_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        deadline = time.monotonic() + STOP_SECONDS
        while config.metrics.port > 0 and not try_lock(file.fileno()):
            if stop.wait(0.1) or time.monotonic() > deadline:
                break
        yield file.fileno()


def _reports(config: Config, config_file: str) -> dict[str, list[str]]:
    """Arguments of the report child of each finished run.

    The first run's report lies in the work directory, the others' in folders of their own.
    """
    found = {}
    for number, (run_id, run) in enumerate(read_state(config).runs.items()):
        if run.status == "done":
            run_url, out = f"{config.runs_url}/{run_id}", report_folder(config, number, run_id)
            found[f"report-{run_id}"] = ["report", config_file, run_url, "--out", str(out)]
    return found


def report_folder(config: Config, number: int, run_id: str) -> Path:
    """Where the report of a config's run lies."""
    return config.directory / "reports" / run_id if number else config.directory


def _stop_all(children: list[Child], stop: threading.Event) -> None:
    if stop.is_set() and any(child.process for child in children):
        print("stopping; a second signal kills everything at once", file=sys.stderr, flush=True)
    # trainers first: they may be waiting for chunks that producers are still making
    for child in reversed(children):
        child.stop()
    deadline = time.monotonic() + STOP_SECONDS
    for child in reversed(children):
        child.end(deadline)


def _kill_all(children: list[Child]) -> NoReturn:
    """At the second signal; what is left to do, the server among it, follows on the way out."""
    for child in children:
        child.kill()
    children.clear()
    os.write(2, b"killed; the same command carries on from here\n")
    raise SystemExit(130)


def _same_as_before(config: Config) -> bool:
    done = config.directory / DONE_FILE
    if not done.is_file() or not (config.directory / "report.html").is_file():
        return False
    return _but_logs(done.read_text()) == _but_logs(config.encode())


def _but_logs(config: str) -> dict[str, object]:
    """A config without how it logs: that changes nothing of what is done."""
    settings: dict[str, object] = json.loads(config)
    return {name: value for name, value in settings.items() if name not in LOG_SETTINGS}


def _story(state: State, last: str) -> str:
    lines = [f"dataset: {state.committed} of {state.planned} chunks, {state.rows} rows"]
    for run_id, run_state in state.runs.items():
        lines.append(f"run {run_id}: {run_state.status}, {run_state.step} steps, {run_state.rows} rows")
    return "\n".join([*lines, last])
