"""Scripted faults on real processes: each promise about them, one by one."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from chaos.compare import Facts
from chaos.light import light_plan
from chaos.scenario import CHUNKS, Scenario, Worker
from chaos.victims import runs
from penstock.common.embedded import EmbeddedServer
from penstock.common.redis import Client
from penstock.deploy.state import CONFIG_FILE
from services.command import write_config
from services.synthetic import write_dataset
from services.valkey import connected, kill_server
from services.waiting import eventually

POSITIONS = 2 * CHUNKS
"""Of one run: two epochs."""


def planned(scenario: Scenario, producer: Worker) -> list[str]:
    """Wait for a producer's plan and submit the runs; their ids."""
    eventually(lambda: scenario.is_planned() or not producer.runs(), 60)
    assert scenario.is_planned(), producer.said()
    return scenario.submit()


def make_everything(scenario: Scenario) -> None:
    """Write the whole dataset, here."""
    write_dataset(Path(scenario.config.dataset.url), light_plan(scenario.config.dataset), indexed=True)


# Redis forgets


@pytest.mark.long
def test_redis_wiped_three_times_and_rolled_back_changes_nothing(
    tmp_path: Path, scenario_facts: Facts
) -> None:
    """Nobody is started again: the processes that begin are those that end."""
    server = EmbeddedServer(tmp_path / "valkey")
    files, older = tmp_path / "valkey" / "appendonlydir", tmp_path / "older"
    with Scenario(tmp_path, server.url) as scenario:
        try:
            server.wait_until_ready()
            workers = [scenario.start("produce", chunk_seconds=0.15)]
            run_ids = planned(scenario, workers[0])
            workers += [scenario.start("train", "--drain", step_seconds=0.02) for _ in run_ids]

            def further(position: int) -> None:
                """Wait until the runs are this far, and no process has ended."""
                eventually(lambda: scenario.position(*run_ids) >= position, 120)
                assert scenario.position(*run_ids) < 2 * POSITIONS
                # the producer ends by itself once every chunk is made
                assert all(worker.runs() for worker in workers[1:]), workers[1].said()

            with connected(server) as client:
                further(4)
                client.flushall()
                further(12)
                shutil.copytree(files, older)
                further(20)
                client.flushall()
                further(32)
                client.flushall()
                further(44)
            kill_server(server)
            shutil.rmtree(files)
            shutil.copytree(older, files)
            server.ensure()
            assert [worker.end() for worker in workers] == [0, 0, 0], workers[1].said()
        finally:
            server.close()
        found = scenario.judge(scenario_facts)
    assert found.clean, found


# A worker that is only slow


@pytest.mark.long
def test_a_frozen_trainer_that_was_replaced_stops_by_itself(
    scenario: Scenario, scenario_facts: Facts, valkey: EmbeddedServer
) -> None:
    make_everything(scenario)
    run_ids = scenario.submit()
    with connected(valkey) as client:
        slow = scenario.start("train", step_seconds=0.02)
        held = _run_held_by(scenario, client, slow, run_ids)
        eventually(lambda: scenario.position(held) >= 8, 60)
        os.kill(slow.pid, signal.SIGSTOP)
        number = _head(scenario, held)
        other = scenario.start("train", "--drain")
        # one head takes the run over, the next one takes it further
        eventually(lambda: _head(scenario, held) >= number + 2, 60)
        assert "sae_fenced_total" not in other.said()
        os.kill(slow.pid, signal.SIGCONT)
        eventually(lambda: "sae_fenced_total 1.0" in slow.metrics().splitlines(), 60)
        assert "was committed by another worker; stopping" in slow.said()
        assert other.end() == 0, other.said()
        slow.process.terminate()
        assert slow.end() == 0, slow.said()
    found = scenario.judge(scenario_facts)
    assert found.clean, found


def _run_held_by(scenario: Scenario, client: Client, worker: Worker, run_ids: list[str]) -> str:
    def held() -> list[str]:
        name = worker.name()
        return [run_id for run_id in run_ids if name and scenario.holder(client, run_id) == name]

    eventually(held, 60)
    return held()[0]


def _head(scenario: Scenario, run_id: str) -> int:
    head = scenario.head(run_id)
    return -1 if head is None else head.n


# SIGTERM


def test_sigterm_lets_a_producer_finish_its_chunk_and_give_back_the_rest(
    scenario: Scenario, valkey: EmbeddedServer
) -> None:
    with connected(valkey) as client:
        producer = scenario.start("produce", chunk_seconds=0.3)
        eventually(scenario.is_planned, 60)
        eventually(lambda: scenario.claims(client) and scenario.committed(), 60)
        held = set(scenario.claims(client))
        producer.process.terminate()
        assert producer.end() == 0, producer.said()
        assert held <= scenario.committed()
        assert len(scenario.committed()) < CHUNKS
        assert scenario.claims(client) == {}
        assert scenario.presence(client) == {}
        todo = client.zcard(_keys(client, scenario, "*:todo")[0])
        assert todo == CHUNKS - len(scenario.committed())


def _keys(client: Client, scenario: Scenario, pattern: str) -> list[str]:
    return sorted(client.scan_iter(f"{scenario.config.redis.prefix}:{pattern}"))


@pytest.mark.long
def test_sigterm_lets_a_trainer_give_its_run_back(scenario: Scenario, valkey: EmbeddedServer) -> None:
    """In the middle of a window, which the next worker begins again."""
    make_everything(scenario)
    run_ids = scenario.submit()
    with connected(valkey) as client:
        trainer = scenario.start("train", step_seconds=0.05)
        held = _run_held_by(scenario, client, trainer, run_ids)
        eventually(lambda: scenario.position(held) >= 4, 60)
        trainer.process.terminate()
        assert trainer.end() == 0, trainer.said()
        assert "stopped at position" in trainer.said()
        assert _keys(client, scenario, "runs:*:lease:*") == []
        assert scenario.presence(client) == {}
        head = scenario.head(held)
        assert head is not None
        assert head.status == "running"


def test_sigterm_at_a_window_boundary_commits_what_was_done(tmp_path: Path, valkey: EmbeddedServer) -> None:
    """The next chunk is not there, and no head would be due for long."""
    with Scenario(tmp_path, valkey.url, head_interval=1000) as scenario, connected(valkey) as client:
        plan = light_plan(scenario.config.dataset)
        write_dataset(Path(scenario.config.dataset.url), plan, range(8))
        run_ids = scenario.submit()
        trainer = scenario.start("train")
        held = _run_held_by(scenario, client, trainer, run_ids)

        def waits() -> bool:
            word = scenario.presence(client).get(trainer.name() or "", {})
            return word.get("waiting_for") == "chunk 8" and word.get("run") == held

        eventually(waits, 60)
        trainer.process.terminate()
        assert trainer.end() == 0, trainer.said()
        head = scenario.head(held)
        assert head is not None
        assert (head.kind, head.position) == ("progress", 8)
        assert head.checkpoint
        assert _keys(client, scenario, "runs:*:lease:*") == []


@pytest.mark.long
def test_sigterm_ends_a_supervisor_and_everything_below_it(scenario: Scenario, tmp_path: Path) -> None:
    """With a server of its own, whose files then say that nobody holds anything."""
    scenario.file.unlink()
    settings: dict[str, Any] = scenario.config.model_dump(mode="json")
    settings["redis"]["url"] = None
    settings["producers"] = settings["trainers"] = 1
    write_config(scenario.file, settings)
    supervisor = scenario.start("run", chunk_seconds=0.3, step_seconds=0.05)
    eventually(scenario.is_planned, 60)
    run_ids = scenario.submit()
    eventually(lambda: scenario.position(*run_ids) >= 4, 60)
    workers = _pids_with(str(scenario.config.directory / CONFIG_FILE))
    assert len(workers) == 2
    supervisor.process.terminate()
    assert supervisor.end() == 0, supervisor.said()
    assert "stopped; the same command carries on from here" in supervisor.said()
    assert not any(runs(pid) for pid in workers)
    server = EmbeddedServer(scenario.config.directory / "valkey")
    try:
        server.wait_until_ready()
        with connected(server) as client:
            for pattern in ("runs:*:lease:*", "dataset:*:claimed", "dataset:*:owners", "presence:*"):
                assert _keys(client, scenario, pattern) == []
            assert _keys(client, scenario, "runs:*:pending")
    finally:
        server.close()


def _pids_with(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if text in line.split("\0"):
                found.append(int(entry.name))
    return found
