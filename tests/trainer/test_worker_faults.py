"""Whatever happens to workers on the way, the weights are the same."""

import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.common.embedded import EmbeddedServer
from penstock.common.errors import Fenced
from penstock.common.redis import Client
from penstock.store.dataset import Dataset
from penstock.store.objects import open_store
from penstock.trainer.group import Group
from penstock.trainer.lineage import load_history, take_over
from penstock.trainer.observer import RunObserver
from services.command import COMMAND
from services.runs import Bench, digests, standard, topk
from services.synthetic import (
    CHUNKS,
    MLP,
    RESID,
    ROWS,
    write_dataset,
)
from services.training import Batches, Killed, interrupted, sample, stored_rows, working
from services.valkey import fresh_prefix
from services.waiting import eventually

WINDOWS = 6


class TestDisturbed:
    @pytest.mark.parametrize(
        ("how", "most"),
        [
            ("stop", 40),
            ("killed in a step", 40),
            ("killed while storing", 2),
            ("killed before a head", 3),
            ("killed after a head", 3),
        ],
    )
    def test_workers_that_come_and_go_change_nothing(
        self,
        bench: Bench,
        dataset: Dataset,
        reference: Callable[..., dict[str, str]],
        monkeypatch: pytest.MonkeyPatch,
        how: str,
        most: int,
    ) -> None:
        batches = Batches(monkeypatch)
        config = bench.submit(dataset, epochs=2)
        chance = random.Random(how)
        workers = 0
        while not bench.ended(config):
            workers += 1
            assert workers < 60, "no progress"
            stop = threading.Event()
            with suppress(Killed), interrupted(how, chance.randint(1, most), stop):
                bench.work(stop)
        assert workers >= 4
        assert digests(bench.head(config)) == reference(epochs=2)
        for hook in (RESID, MLP):
            trained = batches.trained(config, hook)
            assert (
                Counter(trained[: sum(ROWS)]) == Counter(trained[sum(ROWS) :]) == stored_rows(dataset, hook)
            )
        assert sorted(int(Path(key).stem) for key in bench.all_heads(config)) == list(
            range(bench.head(config).n + 1)
        )
        history = load_history(bench.runs, config.run_id, bench.head(config))
        steps = [point["step"] for point in history]
        assert len(steps) == 2 * WINDOWS
        assert steps == sorted(set(steps))

    def test_redis_that_forgets_everything_changes_nothing(
        self,
        bench: Bench,
        tmp_path: Path,
        reference: Callable[..., dict[str, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        dataset = write_dataset(tmp_path / "dataset", indices=range(8))
        config = bench.submit(dataset)
        ended = RunObserver.window_ended

        def forget(observer: RunObserver, group: Group, seconds: float) -> None:
            ended(observer, group, seconds)
            for key in list(bench.client.scan_iter(f"{bench.redis.prefix}:*")):
                bench.client.delete(key)
            if group.position == 6:
                write_dataset(tmp_path / "dataset", indices=range(8, CHUNKS))

        monkeypatch.setattr(RunObserver, "window_ended", forget)
        bench.work()
        assert digests(bench.head(config)) == reference()
        assert len(bench.heads(config)) == 4, "nobody took the run over"

    def test_a_replaced_worker_stops_and_what_it_did_is_discarded(
        self,
        bench: Bench,
        dataset: Dataset,
        reference: Callable[..., dict[str, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        config = bench.submit(dataset)
        ended = RunObserver.window_ended
        replaced: list[int] = []

        def freeze(observer: RunObserver, group: Group, seconds: float) -> None:
            ended(observer, group, seconds)
            if group.position == 9 and not replaced:
                lineage = take_over(bench.runs, config.run_id, bench.head(config).environment)
                assert lineage is not None
                replaced.append(lineage.head.n)

        monkeypatch.setattr(RunObserver, "window_ended", freeze)
        fenced, takeovers = sample("sae_fenced_total"), sample("sae_takeovers_total")
        bench.work()
        assert sample("sae_fenced_total") == fenced + 1
        assert sample("sae_takeovers_total") == takeovers + 1
        heads = bench.heads(config)
        assert replaced == [2]
        assert [(h.n, h.kind, h.position) for h in heads] == [
            (0, "takeover", 0),
            (1, "progress", 6),
            (2, "takeover", 6),
            (3, "takeover", 6),
            (4, "progress", 12),
            (5, "progress", 16),
        ]
        assert digests(heads[-1]) == reference()

    def test_two_workers_at_once_share_one_lineage(
        self, bench: Bench, dataset: Dataset, reference: Callable[..., dict[str, str]]
    ) -> None:
        configs = [bench.submit(dataset, name=name) for name in ("a", "b", "c")]
        workers = [threading.Thread(target=bench.work, daemon=True) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for config in configs:
            assert digests(bench.head(config)) == reference()

    def test_a_damaged_checkpoint_costs_work_and_nothing_else(
        self, bench: Bench, dataset: Dataset, reference: Callable[..., dict[str, str]]
    ) -> None:
        config = bench.submit(dataset, head_interval=1)
        stop = threading.Event()
        with interrupted("stop", 35, stop):
            bench.work(stop)
        head = bench.head(config)
        assert head.position == 9
        bench.runs.put(f"{config.run_id}/{head.checkpoint['optimizer/l1'].key}", b"nothing")
        bench.work()
        takeover = bench.heads(config)[3]
        assert (takeover.kind, takeover.parent, takeover.position) == ("takeover", head.n - 1, 6)
        assert str(takeover.reason).startswith(f"fell back from head {head.n}")
        assert digests(bench.head(config)) == reference(head_interval=1)


class TestHandingOver:
    @pytest.mark.parametrize("submitted", ["together", "later"])
    def test_a_waiting_worker_goes_to_the_run_that_lies_behind(
        self,
        bench: Bench,
        tmp_path: Path,
        reference: Callable[..., dict[str, str]],
        submitted: str,
    ) -> None:
        dataset = write_dataset(tmp_path / "dataset", indices=range(10))
        first = bench.submit(dataset, name="first", head_interval=5)
        together = bench.submit(dataset, name="second") if submitted == "together" else None
        with working(bench):
            if together is None:
                eventually(lambda: bench.position(first) == 0)
                time.sleep(0.5)
            second = together or bench.submit(dataset, name="second")
            eventually(lambda: (bench.position(first), bench.position(second)) == (9, 6))
            assert bench.head(first).kind == "progress"
            assert len(load_history(bench.runs, first.run_id, bench.head(first))) == 3
            write_dataset(tmp_path / "dataset")
            eventually(lambda: bench.ended(first) and bench.ended(second))
        assert digests(bench.head(first)) == reference(head_interval=5)
        assert digests(bench.head(second)) == reference()

    def test_a_run_that_lies_ahead_does_not_take_the_worker_away(
        self, bench: Bench, tmp_path: Path, dataset: Dataset
    ) -> None:
        ahead = bench.submit(dataset, name="ahead", head_interval=1)
        stop = threading.Event()
        with interrupted("stop", 35, stop):
            bench.work(stop)
        assert bench.position(ahead) == 9
        unfinished = write_dataset(tmp_path / "unfinished", indices=range(4))
        behind = bench.submit(unfinished, name="behind", head_interval=1)
        with working(bench):
            eventually(lambda: bench.position(behind) == 3)
            time.sleep(1.2)
        assert bench.position(ahead) == 9
        assert [head.kind for head in bench.heads(behind)] == ["takeover", "progress"]


class TestStopping:
    def test_a_stop_while_waiting_commits_what_was_done(self, bench: Bench, tmp_path: Path) -> None:
        dataset = write_dataset(tmp_path / "dataset", indices=range(4))
        config = bench.submit(dataset, name="waiting")
        with working(bench) as stop:
            eventually(lambda: sample("sae_data_wait_seconds_total", run=config.run_id) > 0.7)
            assert bench.position(config) == 0
            started = time.monotonic()
            stop.set()
        assert time.monotonic() - started < 5
        assert bench.position(config) == 3
        assert not bench.head(config).terminal

    def test_a_stop_within_a_window_discards_it(self, bench: Bench, dataset: Dataset) -> None:
        config = bench.submit(dataset, head_interval=1)
        stop = threading.Event()
        with interrupted("stop", 13, stop):
            bench.work(stop)
        assert bench.head(config).position == 3
        assert list(bench.client.scan_iter(f"{bench.redis.prefix}:*:lease:*")) == []


@pytest.mark.long
class TestKilledProcess:
    def test_another_process_carries_on_to_the_same_bits(
        self,
        client: Client,
        valkey: EmbeddedServer,
        dataset: Dataset,
        tmp_path: Path,
    ) -> None:
        """`penstock train` is killed with SIGKILL in the middle of its steps."""
        changes: dict[str, Any] = {
            "batch_rows": 4,
            "window_chunks": 1,
            "head_interval": 1,
            "epochs": 2,
            "saes": [topk(), standard()],
        }
        prefix = fresh_prefix()
        bench = Bench(open_store(str(tmp_path / "runs")), client, prefix)
        config = bench.submit(dataset, **changes)
        settings = {
            "workdir": str(tmp_path),
            "runs_url": bench.runs.url,
            "dataset": {"url": dataset.url, "hooks": [RESID, MLP]},
            "redis": {"url": valkey.url, "prefix": prefix, "lease_seconds": 1.0},
            "metrics": {"port": -1},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        arguments = [*COMMAND, "train", "--drain", str(tmp_path / "config.yaml")]

        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen(arguments, stdout=log, stderr=log)
            try:
                eventually(lambda: process.poll() is not None or bench.position(config) >= 5, 60)
            finally:
                process.kill()
                process.wait()
            killed_at = bench.head(config)
            assert 5 <= killed_at.position < 2 * CHUNKS, (tmp_path / "log").read_text()
            subprocess.run(arguments, stdout=log, stderr=log, check=True, timeout=120)

        heads = bench.heads(config)
        assert heads[-1].status == "done"
        assert [h.position for h in heads if h.kind == "takeover"] == [0, killed_at.position]
        undisturbed = Bench(open_store(str(tmp_path / "undisturbed")), client, fresh_prefix())
        again = undisturbed.submit(dataset, **changes)
        undisturbed.work()
        expected = {head.position: digests(head) for head in undisturbed.heads(again)}
        differing = [head.position for head in heads if digests(head) != expected[head.position]]
        assert differing == []


def test_a_fenced_lineage_raises(bench: Bench, dataset: Dataset) -> None:
    config = bench.submit(dataset)
    old = take_over(bench.runs, config.run_id, {})
    take_over(bench.runs, config.run_id, {})
    assert old is not None
    with pytest.raises(Fenced):
        old.end("cancelled", "too late")
