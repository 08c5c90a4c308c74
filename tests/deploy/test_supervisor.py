"""`penstock run` keeps its children running, ends in order, and leaves nothing behind however it ends.

Most tests use small programs in place of the real children.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.common.errors import PenstockError, UserError
from penstock.common.process import SUPERVISED_VARIABLE
from penstock.common.redis import RedisSettings
from penstock.deploy import child as child_module
from penstock.deploy import supervisor as supervisor_module
from penstock.deploy.child import RESTARTS, Child
from penstock.deploy.config import load_config
from penstock.deploy.supervisor import Repairs, Supervisor
from services.command import COMMAND, assert_one_clear_line, penstock, small_config, write_config
from services.processes import free_port
from services.synthetic import write_dataset
from services.valkey import connected, fresh_prefix, valkey_server
from services.waiting import eventually


def stat(pid: int) -> list[str]:
    """State, parent, … of a process; empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [] if fields[0] == "Z" else fields


def running(pid: int) -> bool:
    return bool(stat(pid))


def family(root: int) -> set[int]:
    """A process and everything below it."""
    parents = {int(e.name): stat(int(e.name)) for e in Path("/proc").iterdir() if e.name.isdigit()}
    found = {root}
    while more := {pid for pid, s in parents.items() if s and int(s[1]) in found} - found:
        found |= more
    return found


# One child


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses worth speaking of between starts."""
    monkeypatch.setattr(child_module, "FIRST_PAUSE_SECONDS", 0.001)


@contextmanager
def child_of(tmp_path: Path, code: str) -> Iterator[Child]:
    """A child that runs a piece of Python; `n` is how often it was started before."""
    count = (
        "import sys, time; from pathlib import Path; starts = Path(sys.argv[1])\n"
        "n = starts.stat().st_size if starts.exists() else 0; starts.open('a').write('x')\n"
    )
    command = [sys.executable, "-c", count + code, str(tmp_path / "starts")]
    child = Child("worker", command, tmp_path / "logs" / "worker.log", {})
    try:
        yield child
    finally:
        child.kill()
        child.end(time.monotonic() + 20)


def carry_on(child: Child) -> None:
    """Check it until it is done."""

    def checked() -> bool:
        child.check()
        return child.done

    eventually(checked)


@pytest.mark.usefixtures("impatient")
def test_a_child_that_dies_is_started_again(tmp_path: Path) -> None:
    with child_of(tmp_path, "sys.exit(1 if n < 3 else 0)") as child:
        carry_on(child)
    assert child.starts == 4


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("code", [1, 2])
def test_a_child_that_keeps_dying_is_given_up_with_its_last_words(tmp_path: Path, code: int) -> None:
    """Also by exit code 2, which at its first start would mean something else."""
    program = f"sys.stderr.write('one thing\\nerror: out of luck\\n'); sys.exit({code} if n else 1)"
    with child_of(tmp_path, program) as child, pytest.raises(PenstockError) as caught:
        carry_on(child)
    assert child.starts == RESTARTS
    assert str(caught.value) == f"worker keeps dying (see {child.log}): out of luck"
    assert not isinstance(caught.value, UserError)


def test_exit_code_2_at_the_first_start_ends_everything_at_once(tmp_path: Path) -> None:
    program = (
        "sys.exit('error: dataset.hooks: no such hook') if n else print('error: x.y: wrong'); sys.exit(2)"
    )
    with child_of(tmp_path, program) as child, pytest.raises(UserError, match=r"^x\.y: wrong$"):
        carry_on(child)
    assert child.starts == 1


@pytest.mark.usefixtures("impatient")
def test_exit_code_2_after_a_while_is_a_death_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child_module, "QUICK_DEATH_SECONDS", 0.0)
    with child_of(tmp_path, "n or print('error: the disk is full'); sys.exit(0 if n else 2)") as child:
        carry_on(child)
    assert child.starts == 2
    assert "worker ended with exit code 2: the disk is full; starting it again" in caplog.text


@pytest.mark.usefixtures("impatient")
def test_exit_code_2_of_one_that_was_started_before_is_a_death_like_others(tmp_path: Path) -> None:
    with child_of(tmp_path, "sys.exit([1, 2, 2, 0][n])") as child:
        carry_on(child)
    assert (child.starts, child.quick_deaths) == (4, 3)


@pytest.mark.usefixtures("impatient")
def test_a_long_life_makes_up_for_quick_deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "QUICK_DEATH_SECONDS", 0.0)
    with child_of(tmp_path, "sys.exit(1 if n < 8 else 0)") as child:
        child.quick_deaths = RESTARTS - 1
        carry_on(child)
    assert (child.starts, child.quick_deaths) == (9, 0)


def test_pauses_between_starts_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "FIRST_PAUSE_SECONDS", 100.0)
    monkeypatch.setattr(child_module, "LONGEST_PAUSE_SECONDS", 500.0)
    pauses = []
    with child_of(tmp_path, "sys.exit(1)") as child:
        for _ in range(4):
            child.start_at = 0.0
            child.check()
            assert child.process is not None
            child.process.wait()
            child.check()
            pauses.append(child.start_at - time.monotonic())
            starts = child.starts
            child.check()
            assert child.starts == starts, "not before its time"
    assert pauses == pytest.approx([200, 400, 500, 500], abs=1)


def test_a_killed_child_takes_its_own_children_along(tmp_path: Path) -> None:
    program = "import subprocess; p = subprocess.Popen(['sleep', '1000']); print(p.pid, flush=True); p.wait()"
    with child_of(tmp_path, program) as child:
        child.check()
        eventually(lambda: child.last_words().isdigit())
        below = int(child.last_words())
        child.kill()
        eventually(lambda: not running(below))


# Repairs


@pytest.fixture
def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A supervisor of children that run until their file appears, each with a list of its starts."""
    monkeypatch.setattr(supervisor_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(supervisor_module, "REPAIR_SECONDS", 0.05)
    config = load_config(str(write_config(tmp_path / "config.yaml", small_config(tmp_path / "work"))))
    wait = (
        "import sys, time\nfrom pathlib import Path\nwhile not Path(sys.argv[-1]).exists(): time.sleep(0.01)"
    )
    made = []

    def make(producers: int, wanted: Any) -> Supervisor:
        supervisor = Supervisor(
            config=config,
            command=[sys.executable, "-c", wait],
            environment={},
            crew=None,
            server=None,
            progress=SimpleNamespace(note="", update=lambda: None),  # type: ignore[arg-type]
            repairs_wanted=wanted,
            stop=threading.Event(),
        )
        supervisor.producers = [
            supervisor.add(f"producer-{n}", str(tmp_path / f"producer-{n}")) for n in range(producers)
        ]
        supervisor.trainers = [supervisor.add("trainer-0", str(tmp_path / "trainer-0"))]
        made.append(supervisor)
        return supervisor

    yield make
    for supervisor in made:
        for child in supervisor.children:
            child.kill()
            child.end(time.monotonic() + 20)


def test_a_producer_is_started_again_for_a_repair(supervise: Any, tmp_path: Path) -> None:
    supervisor = supervise(2, lambda: True)
    for number in range(2):
        (tmp_path / f"producer-{number}").touch()
    first, second = supervisor.producers
    supervisor.watch(lambda: first.starts == 3)
    assert second.starts == 1
    assert supervisor.trainers[0].starts == 1


def test_nobody_asks_while_a_producer_runs(supervise: Any, tmp_path: Path) -> None:
    supervisor = supervise(2, lambda: pytest.fail("asked"))
    (tmp_path / "producer-0").touch()
    rounds = iter(range(30))
    supervisor.watch(lambda: supervisor.producers[0].done and next(rounds, None) is None)
    assert supervisor.producers[1].process is not None


def test_nobody_asks_when_the_trainers_are_done(supervise: Any, tmp_path: Path) -> None:
    """The trainer ends first: from the moment that the producer has ended, nobody is left to ask for."""
    supervisor = supervise(1, lambda: pytest.fail("asked"))
    (tmp_path / "trainer-0").touch()
    supervisor.watch(lambda: supervisor.trainers[0].done)
    (tmp_path / "producer-0").touch()
    rounds = iter(range(30))
    supervisor.watch(lambda: supervisor.producers[0].done and next(rounds, None) is None)


def test_without_producers_nobody_asks(supervise: Any) -> None:
    supervisor = supervise(0, lambda: pytest.fail("asked"))
    rounds = iter(range(30))
    supervisor.watch(lambda: next(rounds, None) is None)


def test_it_is_asked_now_and_then_only(
    supervise: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "REPAIR_SECONDS", 1000.0)
    asked: list[float] = []
    supervisor = supervise(1, lambda: asked.append(time.monotonic()))
    (tmp_path / "producer-0").touch()
    rounds = iter(range(30))
    supervisor.watch(lambda: supervisor.producers[0].done and next(rounds, None) is None)
    assert len(asked) == 1
    assert supervisor.producers[0].starts == 1, "nothing is wanted"


def test_the_question_goes_to_the_queue_of_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PENSTOCK_REDIS_URL", raising=False)
    from penstock.store.queue import ChunkQueue

    settings = small_config(tmp_path / "work", redis={"prefix": fresh_prefix()})
    config = load_config(str(write_config(tmp_path / "config.yaml", settings)))
    with valkey_server() as server:
        repairs = Repairs(config, RedisSettings(url=server.url))
        assert not repairs.wanted(), "no dataset yet"
        dataset = write_dataset(tmp_path / "work" / "dataset")
        assert not repairs.wanted()
        client = connected(server)
        place = (config.redis.prefix, dataset.url, dataset.manifest.digest, "worker", 30.0)
        ChunkQueue(client, *place, repairs=True).ask(3)
        assert repairs.wanted()
        client.close()
    assert not repairs.wanted(), "Redis is gone, which is no reason to end"
    assert not Repairs(config, RedisSettings(url=server.url)).wanted()


# A whole run, with stand-ins for its children

DRIVER = """
import sys
from penstock.common.errors import PenstockError
from penstock.common.logs import set_up_logging
from penstock.deploy import child
from penstock.deploy.config import load_config
from penstock.deploy.supervisor import run
child.FIRST_PAUSE_SECONDS = 0.001
set_up_logging()
try:
    sys.exit(run(load_config(sys.argv[1]), program=sys.argv[2:]))
except PenstockError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""

STAND_IN = """
import os, signal, sys, time
from pathlib import Path
from penstock.common.process import follow_supervisor, stop_on_signals
here = Path(sys.argv[1])
def note(event):
    with open(here / "events", "a") as file:
        file.write(f"{event} {os.getpid()}\\n")
"""


class Stage:
    """A work directory and a program in place of `penstock corpus`, which every run starts first."""

    def __init__(self, path: Path, program: str, **changes: Any) -> None:
        self.path, self.workdir = path, path / "work"
        settings = small_config(self.workdir, runs=[], trainers=0, **changes)
        self.config = write_config(path / "config.yaml", settings)
        (path / "child.py").write_text(STAND_IN + program)
        self.supervisors: list[subprocess.Popen[str]] = []

    def start(self) -> "subprocess.Popen[str]":
        program = [sys.executable, str(self.path / "child.py"), str(self.path)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
        supervisor = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(self.config), *program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.supervisors.append(supervisor)
        return supervisor

    def run(self) -> "subprocess.CompletedProcess[str]":
        supervisor = self.start()
        out, err = supervisor.communicate(timeout=60)
        return subprocess.CompletedProcess(supervisor.args, supervisor.returncode, out, err)

    def events(self, name: str = "") -> list[int]:
        """Process ids of those who noted an event, in order."""
        file = self.path / "events"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [int(line.split()[1]) for line in lines if line.startswith(name)]

    def socket_directory(self) -> Path:
        return Path((self.workdir / "redis-url").read_text().strip().removeprefix("unix://")).parent

    def end(self) -> None:
        for supervisor in self.supervisors:
            supervisor.kill()
            supervisor.communicate()
        for pid in self.events():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Any]:
    made = []

    def make(program: str, **changes: Any) -> Stage:
        made.append(Stage(tmp_path, program, **changes))
        return made[-1]

    yield make
    for one in made:
        one.end()


STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
note("up")
time.sleep(1000)
"""
OBEDIENT = """
stop = stop_on_signals()
follow_supervisor()
note("up")
stop.wait()
import redis
with redis.Redis.from_url(os.environ["PENSTOCK_REDIS_URL"]) as client:
    client.ping()
note("down")
"""
SLOW_TO_FINISH = """
stop = stop_on_signals()
follow_supervisor()
note("up")
stop.wait()
note("finishing")
while not (here / "finish").exists():
    time.sleep(0.01)
time.sleep(0.5)
note("down")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_everything_in_order(stage: Any, number: signal.Signals) -> None:
    it = stage(OBEDIENT)
    supervisor = it.start()
    eventually(lambda: it.events("up"))
    socket = it.socket_directory()
    everyone = family(supervisor.pid)
    assert len(everyone) == 4, "supervisor, child, guard, server"
    supervisor.send_signal(number)
    out, err = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 0, err
    assert out.splitlines()[-1] == "stopped; the same command carries on from here"
    assert "Traceback" not in err
    assert it.events("down") == it.events("up"), "the server outlives the children"
    assert not any(map(running, everyone))
    assert not socket.exists()
    assert not (it.workdir / "redis-url").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_kills_everything_at_once(stage: Any, number: signal.Signals) -> None:
    it = stage(STUBBORN)
    supervisor = it.start()
    eventually(lambda: it.events("up"))
    socket, everyone = it.socket_directory(), family(supervisor.pid)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.stderr is not None
    assert supervisor.stderr.readline() == "stopping; a second signal kills everything at once\n"
    assert all(map(running, everyone))
    supervisor.send_signal(number)
    began = time.monotonic()
    _, err = supervisor.communicate(timeout=30)
    assert time.monotonic() - began < 15
    assert supervisor.returncode == 130
    assert err == "killed; the same command carries on from here\n"
    assert not any(map(running, everyone))
    assert not socket.exists()


def test_a_second_run_is_refused(stage: Any) -> None:
    it = stage(OBEDIENT)
    supervisor = it.start()
    eventually(lambda: it.events("up"))
    assert_one_clear_line(it.run(), f"workdir: {it.workdir} is in use", f"process {supervisor.pid}")
    assert len(it.events("up")) == 1
    supervisor.terminate()
    assert supervisor.wait(30) == 0
    after = it.start()
    eventually(lambda: len(it.events("up")) == 2)
    after.terminate()
    assert after.wait(30) == 0
    assert (it.workdir / "lock").read_text() == f"{after.pid}\n"


def test_a_child_that_keeps_dying_ends_the_run_with_its_last_words(stage: Any) -> None:
    it = stage("note('up'); sys.exit('error: out of luck')")
    result = it.run()
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last == f"error: corpus keeps dying (see {it.workdir}/logs/corpus.log): out of luck"
    assert len(it.events("up")) == RESTARTS


def test_what_a_child_says_of_its_input_ends_the_run(stage: Any) -> None:
    it = stage("note('up'); print('error: corpus.files: none'); sys.exit(2)")
    assert_one_clear_line(it.run(), "corpus.files: none")
    assert len(it.events("up")) == 1


def test_a_killed_server_is_started_again(stage: Any) -> None:
    it = stage(OBEDIENT)
    supervisor = it.start()
    eventually(lambda: it.events("up"))
    everyone = family(supervisor.pid)
    (server,) = [pid for pid in everyone if Path(f"/proc/{pid}/exe").resolve().name == "valkey-server"]
    os.kill(server, signal.SIGKILL)
    assert supervisor.stderr is not None
    assert "the embedded Valkey server had ended; started it again" in supervisor.stderr.readline()
    supervisor.terminate()
    supervisor.communicate(timeout=30)
    assert it.events("down"), "it answers"


def test_children_of_a_killed_supervisor_stop_and_the_next_run_does_not_wait(stage: Any) -> None:
    it = stage(SLOW_TO_FINISH)
    supervisor = it.start()
    eventually(lambda: it.events("up"))
    socket, everyone = it.socket_directory(), family(supervisor.pid)
    (old,) = it.events("up")
    supervisor.kill()
    successor = it.start()
    eventually(lambda: len(it.events("up")) == 2)
    eventually(lambda: it.events("finishing") == [old])
    assert not any(map(running, everyone - {old, supervisor.pid})), "the old server is gone"
    assert not socket.exists()
    (it.path / "finish").touch()
    eventually(lambda: it.events("down") == [old])
    successor.terminate()
    assert successor.wait(30) == 0


def test_with_fixed_ports_the_next_run_waits_until_they_are_free(stage: Any) -> None:
    it = stage(SLOW_TO_FINISH, metrics={"port": free_port()})
    supervisor = it.start()
    eventually(lambda: it.events("up"))
    (old,) = it.events("up")
    socket = it.socket_directory()
    supervisor.kill()
    successor = it.start()
    # written just before it starts children or waits for the others
    eventually(lambda: it.socket_directory() != socket)
    (it.path / "finish").touch()
    eventually(lambda: len(it.events("up")) == 2)
    assert it.events("down") == [old]
    successor.terminate()
    assert successor.wait(30) == 0


@pytest.mark.parametrize("command", ["corpus", "report"])
def test_phases_without_a_stop_event_end_with_the_supervisor(tmp_path: Path, command: str) -> None:
    config = write_config(tmp_path / "config.yaml", small_config(tmp_path / "work"))
    arguments = [*COMMAND, command, str(config), *(["somewhere"] if command == "report" else [])]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, env=os.environ | {SUPERVISED_VARIABLE: "1"})
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == -signal.SIGTERM


# The real thing


@pytest.mark.long
def test_a_killed_supervisor_leaves_nothing_and_the_next_run_finishes(
    small_run: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "work"
    file = write_config(tmp_path / "config.yaml", small_config(workdir, producers=2))
    supervisor = subprocess.Popen([*COMMAND, "run", str(file)], stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: len(list(workdir.glob("runs/*/heads/*.json"))) >= 2, 120)
        everyone = family(supervisor.pid)
        assert len(everyone) >= 4, "supervisor, trainer, guard, server, and producers unless they are done"
        socket = Path((workdir / "redis-url").read_text().strip().removeprefix("unix://"))
    finally:
        supervisor.kill()
        supervisor.wait()
    eventually(lambda: not any(map(running, everyone)), 60)
    assert not socket.parent.exists()
    log = (workdir / "logs" / "trainer-0.log").read_text()
    assert "the supervisor has ended; stopping" in log
    assert re.search(r"run small-\w+: stopped at position", log), "as if it had been told to"
    result = penstock("run", file)
    assert result.returncode == 0, result.stdout + result.stderr
    assert weights_of(workdir) == weights_of(small_run)


def weights_of(workdir: Path) -> dict[str, str]:
    summary: dict[str, Any] = json.loads((workdir / "summary.json").read_text())
    return {sae["name"]: sae["weights_sha256"] for sae in summary["saes"]}
