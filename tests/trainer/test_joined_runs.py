"""Runs that read several datasets as one: the same guarantees, whoever makes which part when."""

import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import ConfigError, UserError
from penstock.store.dataset import Dataset
from penstock.store.joined import JoinedDataset
from penstock.store.layout import ARRAYS, commit_key
from penstock.store.objects import open_store
from penstock.store.order import ReadingOrder
from penstock.store.queue import ChunkQueue, Feed, FeedSpec, register_feed, registered_feeds
from penstock.store.retention import readers
from penstock.trainer.config import load_run_config, open_pinned, resolve_run
from services.producing import CountingSource, Producer, mended_by
from services.runs import Bench, digests, run_settings
from services.synthetic import MLP, RESID, make_manifest, write_dataset
from services.training import Batches, Killed, interrupted, stored_rows, working
from services.valkey import fresh_prefix
from services.waiting import eventually

FIRST = make_manifest([190 + 3 * index for index in range(6)])
SECOND = make_manifest([200, 205, 190, 210, 199], first_sequence=60)
ROWS = FIRST.total_rows + SECOND.total_rows
NUMBERS = range(6, 11)
"""The second dataset's chunks, as the run numbers them."""


def parts(directory: Path, *made: Any) -> list[Dataset]:
    """The two datasets, with all of their chunks or with those given."""
    found = []
    for name, manifest, indices in zip(
        ("first", "second"), (FIRST, SECOND), made or (None, None), strict=True
    ):
        found.append(write_dataset(directory / name, manifest, indices))
    return found


def acts_key(index: int) -> str:
    return f"{ARRAYS}/acts/{MLP}/c/{index}/0"


@pytest.fixture(scope="module")
def undisturbed(client: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Weights and optimizer states after a replay of both, by epochs."""
    directory = tmp_path_factory.mktemp("undisturbed")
    datasets = parts(directory)
    known: dict[int, dict[str, str]] = {}

    def digests_of(epochs: int = 1) -> dict[str, str]:
        if epochs not in known:
            bench = Bench(open_store(str(directory / "runs")), client, fresh_prefix())
            config = bench.submit_joined(datasets, epochs=epochs)
            bench.work()
            assert bench.head(config).status == "done"
            known[epochs] = digests(bench.head(config))
        return known[epochs]

    return digests_of


class TestPinned:
    def test_every_dataset_is_pinned_and_reads_for_the_run(self, bench: Bench, tmp_path: Path) -> None:
        datasets = parts(tmp_path)
        config = load_run_config(bench.runs, bench.submit_joined(datasets).run_id)
        assert [(pin.url, pin.manifest_digest) for pin in config.datasets] == [
            (dataset.url, dataset.manifest.digest) for dataset in datasets
        ]
        assert config.sizes == (6, 5)
        assert config.total_rows() == ROWS
        for dataset in datasets:
            assert [reader.run for reader in readers(dataset.store)] == [config.run_id]

    def test_the_id_stands_for_the_datasets_in_their_order_wherever_they_lie(self, tmp_path: Path) -> None:
        one, other = (parts(tmp_path / name, [], []) for name in ("one", "other"))

        def run_id(parts: list[Dataset], **changes: Any) -> str:
            return resolve_run(run_settings(**changes), JoinedDataset(parts)).run_id

        assert run_id(one) == run_id(other) == run_id(one, datasets=["a", "b"])
        assert len({run_id(one), run_id(one[::-1]), run_id(one[:1]), run_id(one[1:])}) == 4

    def test_another_dataset_at_one_of_the_urls_is_refused(self, bench: Bench, tmp_path: Path) -> None:
        datasets = parts(tmp_path, [], [])
        config = bench.submit_joined(datasets)
        for file in (tmp_path / "second").glob("manifest.*"):
            file.unlink()
        write_dataset(tmp_path / "second", SECOND.model_copy(update={"seed": 9}), [])
        with pytest.raises(ConfigError, match="second is not the one it was submitted with"):
            open_pinned(config)

    def test_a_hook_that_one_of_them_lacks_is_refused_naming_it(self, tmp_path: Path) -> None:
        narrow = make_manifest([20], {RESID: 8}, first_sequence=60)
        data = JoinedDataset(
            [write_dataset(tmp_path / "a", FIRST, []), write_dataset(tmp_path / "b", narrow, [])]
        )
        with pytest.raises(UserError, match=rf"/b: hook '{MLP}' is not in this dataset"):
            resolve_run(run_settings(), data)


class TestTraining:
    def test_killed_workers_change_nothing(
        self,
        bench: Bench,
        tmp_path: Path,
        undisturbed: Callable[..., dict[str, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        expected, datasets = undisturbed(epochs=2), parts(tmp_path)
        batches = Batches(monkeypatch)
        config = bench.submit_joined(datasets, epochs=2)
        chance, workers = random.Random(1), 0
        while not bench.ended(config):
            workers += 1
            assert workers < 60, "no progress"
            how = chance.choice(["killed in a step", "killed while storing", "killed before a head"])
            with suppress(Killed), interrupted(how, chance.randint(1, 25), threading.Event()):
                bench.work()
        assert workers >= 3
        assert batches.redone > 0
        assert digests(bench.head(config)) == expected
        for hook in (RESID, MLP):
            stored = stored_rows(datasets[0], hook) + stored_rows(datasets[1], hook)
            trained = batches.trained(config, hook)
            assert Counter(trained[:ROWS]) == Counter(trained[ROWS:]) == stored

    def test_rows_of_both_are_mixed_from_the_start(
        self, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        datasets = parts(tmp_path)
        batches = Batches(monkeypatch)
        config = bench.submit_joined(datasets)
        bench.work()
        second = set(stored_rows(datasets[1], RESID))
        first_half = batches.trained(config, RESID)[: ROWS // 2]
        assert 0.2 < sum(row in second for row in first_half) / len(first_half) < 0.8

    @pytest.mark.parametrize("alone", [False, True], ids=["both made", "the second made"])
    def test_streaming_and_replaying_give_the_same_weights(
        self, bench: Bench, tmp_path: Path, undisturbed: Callable[..., dict[str, str]], alone: bool
    ) -> None:
        datasets = parts(tmp_path, None if alone else [], [])
        config = bench.submit_joined(datasets)

        def last_one_waits(index: int) -> None:
            if index == SECOND.n_chunks - 1:
                eventually(lambda: bench.position(config) > 0)

        place = (bench.client, bench.redis.prefix)
        producers = [
            Producer(
                *(*place, dataset.url, f"producer of {dataset.url}"),
                CountingSource(dataset.manifest, 0.0, last_one_waits),
                manifest=dataset.manifest,
            )
            for dataset in datasets[1 if alone else 0 :]
        ]
        producing = [producer.start() for producer in producers]
        bench.work()
        for thread in producing:
            thread.join()
        assert digests(bench.head(config)) == undisturbed()
        assert list(bench.client.scan_iter(f"{bench.redis.prefix}:runs:*")) == []

    def test_producers_feed_their_own_chunks_and_no_others(self, bench: Bench, tmp_path: Path) -> None:
        """Each stops before the other's chunks, there or not: it cannot know of them."""
        datasets = parts(tmp_path, [], [])
        seed = next(s for s in range(99) if ReadingOrder((6, 5), 1, 3, s).chunk_at(0) in NUMBERS)
        spec = FeedSpec(f"{bench.redis.prefix}:feed", 0, (6, 5), 1, 3, seed)
        feed, reads = Feed(bench.client, spec), [spec.order.chunk_at(p) for p in range(11)]
        feed.open()
        place = (bench.client, bench.redis.prefix)
        producers = [Producer(*place, d.url, d.url, manifest=d.manifest) for d in datasets]
        for part, producer in enumerate(producers):
            register_feed(bench.client, producer.queue.feeds_key, "run", replace(spec, part=part))
        asked: list[int] = []

        def ask(index: int) -> bool:
            asked.append(index)
            return True

        (registered,) = registered_feeds(bench.client, producers[1].queue.feeds_key)
        own = registered.spec.among_all(ask)
        assert [chunk for chunk in range(11) if own(chunk)] == list(NUMBERS)
        assert asked == list(range(SECOND.n_chunks)), "by its own indices"

        for turn in (0, 1):
            producers[turn].run()
            fed = [chunk for _, chunk in feed.read(0, 1)]
            assert fed == ([] if turn == 0 else list(takewhile(lambda chunk: chunk in NUMBERS, reads)))

    def test_every_datasets_producers_learn_of_the_run_and_of_their_part_in_it(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        datasets = parts(tmp_path, [], [])
        config = bench.submit_joined(datasets)
        place = (bench.client, bench.redis.prefix)
        keys = [ChunkQueue(*place, d.url, d.manifest.digest, "t", 20).feeds_key for d in datasets]
        with working(bench):
            eventually(lambda: all(registered_feeds(bench.client, key) for key in keys))
            feeds = [feed for key in keys for feed in registered_feeds(bench.client, key)]
        assert [feed.spec.part for feed in feeds] == [0, 1]
        assert len({feed.spec.key for feed in feeds}) == 1, "one feed, of which both know"
        assert all(feed.spec.order == config.order for feed in feeds)


class TestMending:
    def test_a_damaged_chunk_of_the_second_is_repaired_through_its_own_queue(
        self, bench: Bench, tmp_path: Path, undisturbed: Callable[..., dict[str, str]]
    ) -> None:
        datasets = parts(tmp_path)
        store = datasets[1].store
        before = {key: store.get(key) for key, _ in store.list("")}
        config = bench.submit_joined(datasets)
        store.delete(acts_key(3))
        store.put(commit_key(1), store.get(commit_key(1))[:-9])
        with mended_by(bench, datasets[0]) as by_first, mended_by(bench, datasets[1]) as by_second:
            bench.work()
        assert (by_first, sorted(by_second)) == ([], [1, 3])
        assert digests(bench.head(config)) == undisturbed()
        assert {key: store.get(key) for key in before} == before

    def test_a_quarantined_chunk_of_the_second_is_left_out(self, bench: Bench, tmp_path: Path) -> None:
        datasets = parts(tmp_path)
        datasets[1].store.create_guarded("quarantine/2.json", {"index": 2})
        config = bench.submit_joined(datasets)
        bench.work()
        assert bench.head(config).rows == ROWS - SECOND.rows[2]
