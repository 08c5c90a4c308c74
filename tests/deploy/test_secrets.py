"""Planted secrets are in nothing that a whole run wrote or said, at debug level with libraries' logs too."""

import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from penstock.common.redis import RedisSettings, connect
from services.command import COMMAND, penstock, write_config
from services.moto_process import MotoProcess
from services.valkey import valkey_server

REDIS_PASSWORD = "planted/redis+password"
SECRET_KEY = "planted/S3+secret/key"
ACCESS_KEY = "PLANTEDACCESSKEY0042"
SESSION_TOKEN = "planted-session-token=="
HUB_TOKEN = "planted-hub-token"
URL_TOKEN = "planted-token-of-a-url"
MARKS = [b"planted", b"PLANTED"]
"""Part of every secret, whatever is done to the rest of it."""

SAE = {"name": "a", "architecture": "topk", "hook_name": "toy", "d_sae": 32, "k": 3, "dead_after_rows": 4000}


@dataclass
class Planted:
    """A finished run: everything that it said and wrote, by where it is."""

    config: Path
    environment: dict[str, str]
    said: dict[str, bytes] = field(default_factory=dict)

    def call(self, *arguments: str | Path, code: int = 0) -> "subprocess.CompletedProcess[str]":
        """A command whose output is kept."""
        result = penstock(*arguments, env=self.environment)
        self.said[f"penstock {' '.join(map(str, arguments))}"] = (result.stdout + result.stderr).encode()
        assert result.returncode == code, result.stdout + result.stderr
        return result


def small_toy(workdir: Path, base: str, redis_url: str) -> dict[str, Any]:
    run = {"name": "toy", "batch_rows": 256, "window_chunks": 2, "saes": [SAE], "head_interval": 1}
    return {
        "workdir": str(workdir),
        "toy": {"d_in": 16, "features": 24, "active": 2.0, "rows_per_sequence": 64},
        "dataset": {
            "url": f"{base}/dataset",
            "hooks": ["toy"],
            "max_rows": 8_000,
            "sequences_per_chunk": 32,
        },
        "runs_url": f"{base}/runs",
        "runs": [run],
        "evaluation": {"sequences": 8},
        "redis": {"url": redis_url, "lease_seconds": 3.0},
        "library_logs": True,
    }


def scrape(workdir: Path, exporter: Path, found: dict[str, bytes], stop: threading.Event) -> None:
    """Whatever processes publish, again and again, while they run."""
    while not stop.wait(0.2):
        for log in [exporter, *workdir.glob("logs/*.log")]:
            for port in set(re.findall(rb'"port": (\d+)', log.read_bytes())):
                with suppress(OSError):
                    url = f"http://127.0.0.1:{port.decode()}/metrics"
                    with urllib.request.urlopen(url, timeout=5) as reply:
                        found[f"metrics of {log.name} {port.decode()}"] = reply.read()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    directory = tmp_path_factory.mktemp("watched")
    workdir = directory / "work"
    workdir.mkdir()
    with MotoProcess() as moto, valkey_server() as server:
        client = connect(RedisSettings(url=server.url))
        client.config_set("requirepass", REDIS_PASSWORD)
        client.close()
        environment = moto.environment(access_key=ACCESS_KEY, secret_key=SECRET_KEY) | {
            "AWS_SESSION_TOKEN": SESSION_TOKEN,
            "HF_TOKEN": HUB_TOKEN,
            "PENSTOCK_LOG_LEVEL": "debug",
            "PENSTOCK_LOG_FORMAT": "json",
        }
        bucket = moto.make_bucket()
        redis_url = server.url.replace("unix://", f"unix://:{quote(REDIS_PASSWORD, safe='')}@")
        config = small_toy(workdir, f"s3://{bucket}/experiment", redis_url)
        it = Planted(write_config(directory / "config.yaml", config), environment)
        log = directory / "exporter.log"
        with log.open("wb") as out:
            exporter = subprocess.Popen(
                [*COMMAND, "exporter", str(it.config)], stdout=out, stderr=out, env=os.environ | environment
            )
        stop = threading.Event()
        scraper = threading.Thread(target=scrape, args=(workdir, log, it.said, stop))
        scraper.start()
        try:
            it.call("run", it.config)
            for arguments in (("status",), ("status", "--json"), ("submit",)):
                it.call("--log-format", "plain", *arguments, it.config)
        finally:
            stop.set()
            scraper.join()
            exporter.terminate()
            assert exporter.wait(timeout=60) == 0
        it.said["exporter.log"] = log.read_bytes()
        for path in workdir.rglob("*"):
            if path.is_file():
                it.said[str(path.relative_to(workdir))] = path.read_bytes()
        for key in moto.keys(bucket):
            it.said[f"{key} in the bucket"] = moto.read(bucket, quote(key))
        yield it


def leaks(said: dict[str, bytes]) -> dict[str, bytes]:
    """Where a secret is, and what stands around it."""
    return {
        where: text[max(0, at - 200) : at + 60]
        for where, text in said.items()
        for at in (text.find(mark) for mark in MARKS)
        if at >= 0
    }


@pytest.mark.long
def test_what_a_run_writes_and_says(planted: Planted) -> None:
    names = "\n".join(planted.said)
    # everything was there to be looked at
    for part in ("logs/producer-0.log", "logs/trainer-0.log", "report.html", "penstock.json", "done.json"):
        assert part in names
    for part in ("manifest.json in", "heads/0.json in", "config.json in", "commits/0/0.json in"):
        assert part in names
    for part in ("metrics of exporter.log", "metrics of producer-0.log", "metrics of trainer-0.log"):
        assert part in names
    # and libraries were heard
    logs = planted.said["logs/trainer-0.log"]
    assert b"Authorization" in logs
    assert b"botocore" in logs
    assert b"***" in logs
    assert leaks(planted.said) == {}


@pytest.mark.long
def test_every_line_of_a_log_is_json(planted: Planted) -> None:
    for name in ("logs/producer-0.log", "logs/trainer-0.log", "logs/report-0.log", "exporter.log"):
        if name not in planted.said:
            continue
        entries = [json.loads(line) for line in planted.said[name].splitlines()]
        assert all({"time", "level", "message"} <= entry.keys() for entry in entries), name
        if "report" not in name:
            kind = name.removeprefix("logs/").split("-")[0].removesuffix(".log")
            assert any(entry.get("role") == kind and entry.get("worker") for entry in entries)
    trainer = [json.loads(line) for line in planted.said["logs/trainer-0.log"].splitlines()]
    heads = [entry for entry in trainer if entry["message"].startswith("head ")]
    assert heads
    assert all(entry["run"].startswith("toy-") for entry in heads)
    producer = [json.loads(line) for line in planted.said["logs/producer-0.log"].splitlines()]
    assert {entry["chunk"] for entry in producer if "committed" in entry["message"]} >= {0, 1, 2}


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", f"s3://bucket/dataset?token={URL_TOKEN}"),
        ("inspect", f"s3://user:{URL_TOKEN}@bucket/dataset"),
        ("inspect", f"https://user:{URL_TOKEN}@127.0.0.1:1/dataset"),
        ("inspect", f"https://{URL_TOKEN}@127.0.0.1:1/dataset"),
        ("inspect", f"https://127.0.0.1:1/dataset?access_token={URL_TOKEN}"),
        ("inspect", f"nothing://host/dataset?sig={URL_TOKEN}"),
        ("inspect", "s3://bucket/dataset", f"--token={URL_TOKEN}"),
    ],
)
@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_a_refused_url_is_told_without_its_token(arguments: tuple[str, ...], log_format: str) -> None:
    result = penstock("--log-format", log_format, *arguments)
    assert result.returncode == 2
    assert result.stderr
    assert URL_TOKEN not in result.stdout + result.stderr


def test_a_wrong_redis_password_is_not_told(tmp_path: Path) -> None:
    with valkey_server() as server:
        client = connect(RedisSettings(url=server.url))
        client.config_set("requirepass", "another one")
        client.close()
        config = small_toy(tmp_path / "work", str(tmp_path), server.url)
        file = write_config(tmp_path / "config.yaml", config)
        for log_format in ("plain", "json"):
            wrong = {"PENSTOCK_REDIS_PASSWORD": REDIS_PASSWORD}
            result = penstock("--log-format", log_format, "train", file, env=wrong)
            assert result.returncode == 2
            assert "no Redis at unix://" in result.stderr
            assert leaks({"output": (result.stdout + result.stderr).encode()}) == {}


CRASH = """
import os, threading, warnings
from penstock.deploy import cli

@cli.cli.command()
def crash():
    def fail():
        raise RuntimeError(os.environ["PENSTOCK_REDIS_PASSWORD"])
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    warnings.warn(os.environ["AWS_SECRET_ACCESS_KEY"])
    try:
        fail()
    except RuntimeError as error:
        raise ValueError("redis://:" + os.environ["PENSTOCK_REDIS_PASSWORD"] + "@host") from error

cli.main()
"""


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_a_crash_is_told_without_secrets(log_format: str) -> None:
    environment = {"PENSTOCK_REDIS_PASSWORD": REDIS_PASSWORD, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    result = subprocess.run(
        [sys.executable, "-c", CRASH, "--log-format", log_format, "crash"],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.count("RuntimeError: ***") >= 2
    assert "ValueError: redis://" in result.stderr
    assert "UserWarning: ***" in result.stderr
    assert leaks({"output": (result.stdout + result.stderr).encode()}) == {}
    if log_format == "json":
        assert all(json.loads(line)["level"] for line in result.stderr.splitlines())
