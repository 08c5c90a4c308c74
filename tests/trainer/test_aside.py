"""Runs that cannot be carried on: the worker goes on with others, and says in the end what was wrong."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import (
    ConfigError,
    DamagedObject,
    DataError,
    ObjectMissing,
    OtherFormat,
    RunFailed,
)
from penstock.store.dataset import Dataset
from penstock.store.layout import ARRAYS, FORMAT_VERSION, config_key, head_key
from penstock.trainer import mending, worker
from penstock.trainer.config import RunConfig
from penstock.trainer.lineage import take_over
from penstock.trainer.pending import unfinished_runs
from penstock.trainer.worker import Aside, backoff_seconds
from services.runs import Bench, digests
from services.synthetic import MLP, write_dataset
from services.waiting import eventually

KEY = f"{ARRAYS}/acts/{MLP}/c/7/0"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No producer comes, and nobody waits long for one."""
    monkeypatch.setattr(mending, "ALONE_SECONDS", 0.05)


@pytest.fixture
def broken(tmp_path: Path) -> Dataset:
    """A dataset with an object missing in chunk 7."""
    dataset = write_dataset(tmp_path / "broken")
    dataset.store.delete(KEY)
    return dataset


def begun_elsewhere(bench: Bench, dataset: Dataset, name: str) -> RunConfig:
    """A strict run with a checkpoint by another version of torch."""
    config = bench.submit(dataset, name=name)
    lineage = take_over(bench.runs, config.run_id, {"torch": "1.0", "threads": 1})
    assert lineage is not None
    lineage.commit(position=3, step=1, rows=1, checkpoint={"sae/topk": b""}, history=[], metrics={})
    return config


def takeovers(bench: Bench, config: RunConfig) -> int:
    return sum(head.kind == "takeover" for head in bench.heads(config))


class TestOtherRunsGoOn:
    def test_when_a_chunk_cannot_be_mended(
        self, bench: Bench, dataset: Dataset, broken: Dataset, alone: None
    ) -> None:
        bad = bench.submit(broken, name="bad", head_interval=1)
        good = bench.submit(dataset, name="good")
        with pytest.raises(ObjectMissing, match=r"c/7/0 is missing; no producer .*`penstock repair CONFIG`"):
            bench.work()
        assert bench.head(good).status == "done"
        assert (bench.head(bad).status, bench.head(bad).position) == ("running", 6)
        assert takeovers(bench, bad) == worker.TRIES == 3, "so often, and then the draining worker ends"
        assert list(bench.client.scan_iter(f"{bench.redis.prefix}:*:lease:*")) == []

    def test_when_a_strict_run_began_elsewhere(self, bench: Bench, dataset: Dataset) -> None:
        bad = begun_elsewhere(bench, dataset, "bad")
        good = bench.submit(dataset, name="good")
        with pytest.raises(ConfigError, match=r"strict and began elsewhere: torch was 1\.0"):
            bench.work()
        assert bench.head(good).status == "done"
        assert takeovers(bench, bad) == 1, "it must not be taken over"

    def test_when_the_newest_head_is_damaged(self, bench: Bench, dataset: Dataset) -> None:
        bad = begun_elsewhere(bench, dataset, "bad")
        good = bench.submit(dataset, name="good")
        key = head_key(bad.run_id, 1)
        whole = bench.runs.get(key)
        bench.runs.put(key, whole.replace(b'"step":1', b'"step":2'))
        with pytest.raises(DamagedObject, match=rf"{bad.run_id}/heads/1\.json"):
            bench.work()
        assert bench.head(good).status == "done"
        unfinished = unfinished_runs(bench.runs)
        assert unfinished.positions == {}
        assert list(unfinished.damaged) == [bad.run_id]
        bench.runs.put(key, whole)
        assert unfinished_runs(bench.runs).positions == {bad.run_id: 3}

    def test_when_a_config_is_damaged(self, bench: Bench, dataset: Dataset) -> None:
        bad = bench.submit(dataset, name="bad")
        good = bench.submit(dataset, name="good")
        key = config_key(bad.run_id)
        bench.runs.put(key, bench.runs.get(key)[:-5])
        with pytest.raises(DamagedObject, match=r"config\.json"):
            bench.work()
        assert bench.head(good).status == "done"

    @pytest.mark.parametrize("what", ["config", "head"])
    def test_when_a_newer_version_wrote_it(self, bench: Bench, dataset: Dataset, what: str) -> None:
        bad = begun_elsewhere(bench, dataset, "bad") if what == "head" else bench.submit(dataset, name="bad")
        good = bench.submit(dataset, name="good")
        key = config_key(bad.run_id) if what == "config" else head_key(bad.run_id, 1)
        bench.runs.put_guarded(key, bench.runs.get_record(key) | {"format_version": FORMAT_VERSION + 1})
        with pytest.raises(OtherFormat, match="upgrade penstock"):
            bench.work()
        assert bench.head(good).status == "done"

    def test_the_worker_tries_again_later(
        self, bench: Bench, broken: Dataset, alone: None, reference: Any
    ) -> None:
        """One that is not draining stays, and carries the run on once the chunk is there."""
        config = bench.submit(broken)
        stop = threading.Event()
        working = threading.Thread(target=bench.work, args=(stop, False), daemon=True)
        working.start()
        eventually(lambda: bench.position(config) >= 0 and takeovers(bench, config) > worker.TRIES + 1)
        whole = write_dataset(Path(broken.url).parent / "whole").store.get(KEY)
        broken.store.put(KEY, whole)
        eventually(lambda: bench.ended(config))
        stop.set()
        working.join()
        assert digests(bench.head(config)) == reference()


class TestTakeoversInVain:
    def test_too_many_end_the_run(
        self, bench: Bench, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(worker, "MAX_TAKEOVERS", 4)
        bad = begun_elsewhere(bench, dataset, "bad")
        good = bench.submit(dataset, name="good")
        environment = bench.place().environment(strict=True)
        last = bench.head(bad)
        for _ in range(4):
            take_over(bench.runs, bad.run_id, environment)
        bench.work()
        head = bench.head(bad)
        assert head.status == "failed"
        assert head.reason == (
            "4 workers in a row took it over at position 3 and got no further; see their logs"
        )
        assert (head.position, head.checkpoint) == (3, last.checkpoint)
        assert bench.head(good).status == "done"
        assert list(bench.client.scan_iter(f"{bench.redis.prefix}:*")) == []

    def test_one_fewer_do_not(
        self, bench: Bench, dataset: Dataset, reference: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(worker, "MAX_TAKEOVERS", 4)
        config = bench.submit(dataset)
        environment = bench.place().environment(strict=True)
        for _ in range(3):
            take_over(bench.runs, config.run_id, environment)
        bench.work()
        assert digests(bench.head(config)) == reference()

    def test_a_worker_that_fails_again_and_again_ends_the_run(
        self, bench: Bench, broken: Dataset, alone: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(worker, "MAX_TAKEOVERS", 2)
        monkeypatch.setattr(worker, "TRIES", 100)
        config = bench.submit(broken, head_interval=1)
        bench.work()
        assert bench.head(config).status == "failed"
        kinds = [head.kind for head in bench.heads(config)]
        assert kinds == ["takeover", "progress", "progress", "takeover", "takeover", "takeover", "progress"]

    def test_pauses_grow_with_them(self) -> None:
        assert [backoff_seconds(barren) for barren in range(11)] == [0, 0, 0, 1, 2, 4, 8, 16, 30, 30, 30]

    def test_a_stop_ends_the_pause_and_nothing_is_taken_over(
        self, bench: Bench, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = bench.submit(dataset)
        paused: list[int] = []

        def backoff(barren: int) -> int:
            paused.append(barren)
            return 1000

        monkeypatch.setattr(worker, "backoff_seconds", backoff)
        for _ in range(2):
            take_over(bench.runs, config.run_id, {})
        stop = threading.Event()
        working = threading.Thread(target=bench.work, args=(stop,), daemon=True)
        working.start()
        eventually(lambda: paused)
        stop.set()
        working.join(10)
        assert not working.is_alive()
        assert paused == [2]
        assert takeovers(bench, config) == 2


class TestAside:
    def test_runs_come_back_after_a_while(self, monkeypatch: pytest.MonkeyPatch) -> None:
        aside, error = Aside(), DataError("gone")
        monkeypatch.setattr(worker, "ASIDE_SECONDS", 60.0)
        aside.put("a", error)
        assert aside.now() == ["a"]
        monkeypatch.setattr(worker, "ASIDE_SECONDS", 0.0)
        aside.put("a", error)
        time.sleep(0.001)
        assert aside.now() == []

    def test_only_failures_in_a_row_are_hopeless(self) -> None:
        aside = Aside()
        errors = [DataError(str(number)) for number in range(worker.TRIES)]
        for error in errors[:-1]:
            aside.put("a", error)
        aside.put("b", RunFailed("b"))
        assert aside.hopeless() == {}
        aside.forget("a")
        aside.forget("never put")
        aside.put("a", errors[0])
        assert aside.hopeless() == {}
        for error in errors[1:]:
            aside.put("a", error)
        assert aside.hopeless() == {"a": errors[-1]}
