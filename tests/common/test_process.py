"""Processes stop when they are told to, and when whoever looks after them is gone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.common.process import SUPERVISED_VARIABLE, try_lock
from services.waiting import eventually

STOPPED_BY_SIGTERM = -signal.SIGTERM


def start(code: str, supervised: bool = True) -> "subprocess.Popen[str]":
    """A process that says something when it has set itself up."""
    environment = {key: value for key, value in os.environ.items() if key != SUPERVISED_VARIABLE}
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys, threading, time\nfrom penstock.common.process import *\n{code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | ({SUPERVISED_VARIABLE: "1"} if supervised else {}),
    )


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def leave(process: "subprocess.Popen[str]") -> None:
    """What the system does to the pipe when the supervisor is killed."""
    assert process.stdin is not None
    process.stdin.close()


def test_one_without_a_stop_event_ends_with_its_supervisor() -> None:
    with start("follow_supervisor(); print('up', flush=True); time.sleep(1000)") as process:
        assert said(process) == "up"
        leave(process)
        assert process.wait(20) == STOPPED_BY_SIGTERM


def test_one_with_a_stop_event_finishes_what_is_in_hand() -> None:
    code = "follow_supervisor(); s = stop_on_signals(); print('up', flush=True); s.wait(); print('finished')"
    with start(code) as process:
        assert said(process) == "up"
        leave(process)
        assert process.wait(20) == 0
        assert said(process) == "finished"


def test_a_supervisor_that_is_gone_before_one_looks_is_noticed() -> None:
    with start(
        "print('up', flush=True); sys.stdin.readline(); follow_supervisor(); time.sleep(1000)"
    ) as process:
        assert said(process) == "up"
        leave(process)
        assert process.wait(20) == STOPPED_BY_SIGTERM


def test_one_that_does_not_stop_in_time_exits() -> None:
    with start(
        "follow_supervisor(0.2); stop_on_signals(); print('up', flush=True)\nwhile 1: time.sleep(1)"
    ) as p:
        assert said(p) == "up"
        leave(p)
        assert p.wait(20) == 1


def test_without_a_supervisor_standard_input_means_nothing() -> None:
    with start(
        "follow_supervisor(); print(threading.active_count(), flush=True)", supervised=False
    ) as process:
        assert said(process) == "1"
        assert process.wait(20) == 0


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_is_told_apart(first: signal.Signals, second: signal.Signals) -> None:
    code = """
def again():
    print("again", flush=True)
    raise SystemExit(7)
stop = stop_on_signals(again)
print("up", flush=True)
stop.wait()
print("stopping", flush=True)
time.sleep(1000)
"""
    with start(code) as process:
        assert said(process) == "up"
        process.send_signal(first)
        assert said(process) == "stopping"
        process.send_signal(second)
        assert said(process) == "again"
        assert process.wait(20) == 7


def test_further_signals_do_no_harm_where_nothing_waits_for_them() -> None:
    with start("stop = stop_on_signals(); print('up', flush=True); stop.wait(); input()") as process:
        assert said(process) == "up"
        for _ in range(3):
            process.terminate()
        process.communicate("\n")
        assert process.returncode == 0


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "ab") as ours, open(tmp_path / "lock", "ab") as theirs:
        assert try_lock(ours.fileno())
        assert not try_lock(theirs.fileno())
        ours.close()
        assert try_lock(theirs.fileno())


def test_who_inherits_a_lock_holds_it_until_it_ends(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "ab") as theirs:
        with open(tmp_path / "lock", "ab") as ours:
            assert try_lock(ours.fileno())
            heir = subprocess.Popen(["sleep", "1000"], pass_fds=(ours.fileno(),))
        assert not try_lock(theirs.fileno())
        heir.kill()
        heir.wait()
        eventually(lambda: try_lock(theirs.fileno()))


def test_file_systems_without_locks_are_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with open(tmp_path / "lock", "ab") as file:
        assert try_lock(file.fileno())
    assert "no file locks here (Function not implemented)" in caplog.text
