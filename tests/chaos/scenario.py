"""A light experiment whose processes a test starts one by one, against a Redis server of its choice."""

import json
import os
import re
import subprocess
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from chaos.compare import Facts, Verdict, judge
from chaos.light import CHUNK_SECONDS, FILL, PROGRAM, STEP_SECONDS
from chaos.settings import LEASE_SECONDS, light
from chaos.victims import said_name
from penstock.common.process import STOP_SECONDS
from penstock.common.redis import Client, RedisSettings, connect
from penstock.deploy.config import load_config
from penstock.deploy.processes import submit
from penstock.store.dataset import open_dataset
from penstock.store.heads import Head, newest_head
from penstock.store.objects import open_store
from penstock.store.queue import ChunkQueue, Presence, RunQueue
from penstock.trainer.workplace import Workplace
from services.command import write_config
from services.valkey import fresh_prefix

TESTS = Path(__file__).parents[1]
CHUNKS = 24


class Worker:
    """A process of the experiment; its output goes to a file."""

    def __init__(self, log: Path, arguments: list[str], environment: dict[str, str]) -> None:
        self._log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [*PROGRAM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | {"PYTHONPATH": str(TESTS)} | environment,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def name(self) -> str | None:
        """What it calls itself, once it is set up."""
        return said_name(self.said())

    def metrics(self) -> str:
        port = re.search(r"port=(\d+)", self.said())
        assert port, self.said()
        with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/metrics") as answer:
            return str(answer.read().decode())

    def runs(self) -> bool:
        return self.process.poll() is None

    def end(self) -> int:
        """Wait for its exit code."""
        return self.process.wait(STOP_SECONDS)


class Scenario:
    """Two runs of two epochs on a small synthetic dataset; `with` kills what is left at the end.

    Args:
        directory: of everything.
        url: of Redis.
        changes: of both runs.
    """

    def __init__(self, directory: Path, url: str, store: Path | None = None, **changes: Any) -> None:
        self.directory = directory
        settings = light(store or directory / "work", CHUNKS)
        settings["redis"] |= {"url": url, "prefix": fresh_prefix()}
        settings["runs"] = [run | changes for run in settings["runs"]]
        self._stack = ExitStack()
        self._started = 0
        self.file = write_config(directory / "config.yaml", settings)
        self.config = load_config(str(self.file))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def start(
        self,
        *arguments: str,
        chunk_seconds: float = 0.0,
        step_seconds: float = 0.0,
        fill: dict[str, Any] | None = None,
    ) -> Worker:
        """Start `penstock ARGUMENTS CONFIG`, slowed down as wanted."""
        self._started += 1
        environment = {CHUNK_SECONDS: str(chunk_seconds), STEP_SECONDS: str(step_seconds)}
        if fill is not None:
            environment[FILL] = json.dumps(fill)
        log = self.directory / f"{self._started}-{arguments[0]}.log"
        worker = Worker(log, [*arguments, str(self.file)], environment)
        self._stack.callback(worker.process.wait)
        self._stack.callback(worker.process.kill)
        return worker

    def submit(self) -> list[str]:
        """Submit both runs; their ids."""
        return [run_id for run_id, _ in submit(self.config)]

    def place(self, client: Client) -> Workplace:
        """For a worker in this process."""
        return Workplace(
            runs=open_store(self.config.runs_url),
            client=client,
            redis=self.config.redis,
            worker="trainer-here",
            device=torch.device("cpu"),
            threads=1,
            port=-1,
        )

    def head(self, run_id: str) -> Head | None:
        return newest_head(open_store(self.config.runs_url), run_id)

    def position(self, *run_ids: str) -> int:
        """How far these runs are, together."""
        return sum(head.position for run_id in run_ids if (head := self.head(run_id)))

    def is_planned(self) -> bool:
        return open_store(self.config.dataset.url).exists("manifest.json")

    def committed(self) -> set[int]:
        return open_dataset(self.config.dataset.url).committed()

    def judge(self, reference: Facts) -> Verdict:
        return judge(reference, self.config.dataset.url, self.config.runs_url)

    # What Redis says

    def client(self) -> Client:
        return connect(RedisSettings(url=self.config.redis.url))

    def claims(self, client: Client) -> dict[int, str]:
        """Chunk -> worker."""
        dataset = open_dataset(self.config.dataset.url)
        address = (self.config.redis.prefix, dataset.url, dataset.manifest.digest)
        return ChunkQueue(client, *address, "test", LEASE_SECONDS).claims()

    def holder(self, client: Client, run_id: str) -> str | None:
        prefix = self.config.redis.prefix
        return RunQueue(client, prefix, self.config.runs_url, "test", LEASE_SECONDS).holder(run_id)

    def presence(self, client: Client) -> dict[str, dict[str, Any]]:
        """Worker -> what it says of itself."""
        return Presence(client, self.config.redis.prefix, "test").everyone()
