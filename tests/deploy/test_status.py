"""`penstock status`: fifty runs on three datasets at a glance, with Redis and without."""

import json
import os
import pty
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from penstock.common.redis import Client
from penstock.deploy.config import Config, load_config
from penstock.deploy.status import ago, print_status, status_lines, status_record, survey
from penstock.deploy.survey import Surveyor
from penstock.store.dataset import open_dataset
from penstock.store.layout import head_key
from penstock.store.queue import ChunkQueue, Presence, RunQueue
from services.command import COMMAND, penstock
from services.fleet import CHUNKS, COMMITTED, write_fleet
from services.valkey import valkey_server
from services.waiting import eventually


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        return write_fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def no_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PENSTOCK_REDIS_URL", "PENSTOCK_REDIS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def down(fleet: Path, no_redis: None) -> Config:
    """A config whose Redis does not answer."""
    config = load_config(str(fleet))
    redis = config.redis.model_copy(update={"url": "unix:///nowhere/redis.sock"})
    return config.model_copy(update={"redis": redis})


@pytest.fixture
def up(fleet: Path, redis_url: str, prefix: str, no_redis: None) -> Config:
    config = load_config(str(fleet))
    redis = config.redis.model_copy(update={"url": redis_url, "prefix": prefix})
    return config.model_copy(update={"redis": redis})


def run_id(config: Config, name: str) -> str:
    (found,) = (run.name for run in Path(config.runs_url).iterdir() if run.name.startswith(f"{name}-"))
    return found


def line_of(lines: list[str], start: str) -> str:
    (found,) = (line for line in lines if line.startswith(start))
    return found


def test_with_redis_down_the_store_says_where_everything_is(down: Config) -> None:
    lines = list(status_lines(survey(down)))
    for number, (committed, planned) in enumerate(zip(COMMITTED, CHUNKS, strict=True)):
        told = f": {committed} of {planned} chunks, {200 * committed:,} of {200 * planned:,} rows"
        assert told in line_of(lines, f"dataset {down.directory}/dataset-{number}")
    runs = [line for line in lines if line.startswith("run ")]
    assert len(runs) == 50
    # 1 reads the second dataset, which is complete; 6 the first, of which 25 chunks are there
    told = "running, position 10 of 30, 2,000 of 6,000 rows (33%), 20 chunks to read, head 2 60 min ago"
    assert line_of(lines, "run run-01").endswith(told)
    assert ": running, position 10 of 40, " in line_of(lines, "run run-06")
    assert ", 15 chunks to read" in line_of(lines, "run run-06")
    assert ": pending, position 0 of 40, 0 of 8,000 rows (0%), 25 chunks to read" in line_of(
        lines, "run run-00"
    )
    assert line_of(lines, "run run-03").endswith("head 2 60 min ago, as planned")
    assert [line.split(": ")[1].split(",")[0] for line in runs] == [
        state for state in ("running", "pending", "failed", "cancelled", "done") for _ in range(10)
    ]
    assert "runs: 10 running, 10 pending, 10 failed, 10 cancelled, 10 done; redis is down" in lines[0]
    assert lines[-1].startswith("redis: down: redis.url: no Redis at unix:///nowhere/redis.sock")
    # nobody knows who is at it: nothing is said of it
    assert "waiting for" not in "".join(lines[:-1])
    assert "held by" not in "".join(lines)


def test_who_holds_what_and_who_waits_for_what(up: Config, client: Client) -> None:
    prefix, held = up.redis.prefix, run_id(up, "run-06")
    runs = RunQueue(client, prefix, up.runs_url, "trainer-a", 30.0)
    runs.add(held, 10)
    assert runs.lease() == held
    word = {"kind": "trainer", "run": held, "rows": 2_400, "waiting_for": "chunk 25", "figures": {}}
    Presence(client, prefix, "trainer-a").tell(word)
    url = up.dataset.url
    digest = open_dataset(url).manifest.digest
    address = (client, prefix, url, digest, "producer-b", 30.0)
    queue = ChunkQueue(*address)
    queue.reconcile(CHUNKS[0], set(range(COMMITTED[0])))
    assert queue.claim(CHUNKS[0]) == 25
    ChunkQueue(*address, repairs=True).ask(3)
    word = {"kind": "producer", "dataset": url, "rows_per_second": 100.0, "making": [25], "waiting": ""}
    Presence(client, prefix, "producer-b").tell(word)

    found = survey(up)
    lines = list(status_lines(found))
    told = line_of(lines, f"dataset {url}")
    assert told.endswith("rows, 100 rows/s, 30 s left, 1 being made, 1 to be made again")
    told = line_of(lines, f"run {held}")
    assert "2,400 of 8,000 rows (30%)" in told
    assert told.endswith("held by trainer-a, waiting for chunk 25")
    assert line_of(lines, "run run-01").endswith("waiting for a trainer")
    assert line_of(lines, "worker producer-b").endswith("rows_per_second 100, making 25")
    assert lines[0].endswith("1 producers, 1 trainers")
    assert lines[-1] == "redis: up"

    record = json.loads(json.dumps(status_record(found)))
    assert record["redis"] == {"up": True, "error": None}
    assert record["datasets"][url]["claims"] == {"25": "producer-b"}
    assert record["datasets"][url]["wanted"] == 15 + 1
    assert record["runs"][held]["holder"] == "trainer-a"
    assert record["workers"].keys() == {"trainer-a", "producer-b"}


def test_redis_that_hangs_holds_it_up_for_a_moment_only(fleet: Path, no_redis: None) -> None:
    with valkey_server() as server:
        config = load_config(str(fleet))
        redis = config.redis.model_copy(update={"url": server.url})
        os.kill(server.server_pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            found = survey(config.model_copy(update={"redis": redis}))
            seconds = time.monotonic() - started
        finally:
            os.kill(server.server_pid, signal.SIGCONT)
    assert found.crew is None
    assert "Timeout" in str(found.redis_error)
    assert len(found.runs) == 50
    assert seconds < 8  # one attempt at a worker's patience takes 10


def test_a_rate_is_that_of_the_last_head_or_of_what_was_seen(
    down: Config, fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surveyor = Surveyor(down)
    name = run_id(down, "run-01")
    run = surveyor.look().runs[name]
    assert run.rows_per_second is None  # an hour ago is no rate of now
    monkeypatch.setattr("time.time", lambda: (run.head_time or 0) + 1)
    run = surveyor.look().runs[name]
    assert (run.head_seconds, run.head_rows) == (100.0, 1_000)
    assert run.rows_per_second == pytest.approx(10.0)
    assert run.seconds_left == pytest.approx(400.0)


def test_a_damaged_run_hides_no_other_one(down: Config) -> None:
    name = run_id(down, "run-02")
    head = Path(down.runs_url) / head_key(name, 2)
    whole = head.read_bytes()
    head.write_bytes(whole.replace(b'"position":10', b'"position":11'))
    try:
        found = survey(down)
    finally:
        head.write_bytes(whole)
    assert found.runs[name].state == "unreadable"
    assert "heads/2.json is damaged" in str(found.runs[name].reason)
    assert len(found.runs) == 50


def test_runs_that_are_not_submitted(down: Config) -> None:
    settings = down.runs[0].model_copy(update={"name": "another", "datasets": ["/nowhere"]})
    changed = down.runs[1].model_copy(update={"batch_rows": 7})
    config = down.model_copy(update={"runs": [*down.runs, settings, changed]})
    found = survey(config)
    assert found.runs["another"].state == "not submitted"
    assert found.runs["another"].reason == "no dataset at /nowhere"
    assert found.runs["run-01"].state == "not submitted"  # with these settings
    assert found.datasets["/nowhere"].planned is None
    assert len(found.runs) == 52


def test_json_is_what_a_program_reads(down: Config) -> None:
    said: list[str] = []
    print_status(down, True, said.append)
    record = json.loads("".join(said))
    assert record["redis"]["up"] is False
    assert record["runs"][run_id(down, "run-01")]["position"] == 10
    assert len(record["datasets"]) == 3


def test_the_command_prints_it(fleet: Path, no_redis: None) -> None:
    result = penstock("status", fleet)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1 + 3 + 50 + 1
    record = json.loads(penstock("status", "--json", fleet).stdout)
    assert len(record["runs"]) == 50


def test_watch_prints_sparse_lines_until_it_is_stopped(fleet: Path, no_redis: None) -> None:
    command = [*COMMAND, "status", "--watch", str(fleet)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert "75 of 90 chunks; runs: 10 running" in line
    assert (process.returncode, len(rest.splitlines()) <= 1) == (0, True)


def test_watch_redraws_a_terminal(fleet: Path, no_redis: None) -> None:
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                shown.extend(os.read(ours, 4096))
            except OSError:  # the other end is closed
                return

    command = [*COMMAND, "status", "--watch", str(fleet)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        reader = threading.Thread(target=read)
        reader.start()
        eventually(lambda: b"more lines" in shown or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    reader.join()
    os.close(ours)
    assert process.returncode == 0, bytes(shown)
    assert b"run run-01" in shown
    assert b"redis: down" in shown


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-1, "0 s ago"), (12, "12 s ago"), (600, "10 min ago"), (7_200, "2.0 h ago"), (400_000, "5 days ago")],
)
def test_ago(seconds: float, told: str) -> None:
    assert ago(seconds) == told
