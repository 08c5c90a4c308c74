"""Heads: dense, exclusive, one chain; whoever was replaced finds out before anything of his counts."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import DamagedObject, Fenced, ObjectMissing
from penstock.store.heads import CHECKPOINTS_KEPT, Head, chain, newest_head, read_head
from penstock.store.local import LocalStore
from penstock.trainer.lineage import Lineage, load_checkpoint, load_history, take_over

RUN = "run-1"
ENVIRONMENT = {"torch": "0", "threads": 1}


@pytest.fixture
def runs(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "runs"))


def taken_over(runs: LocalStore) -> Lineage:
    lineage = take_over(runs, RUN, ENVIRONMENT)
    assert lineage is not None
    return lineage


def commit(lineage: Lineage, position: int, **changes: Any) -> Head:
    arguments: dict[str, Any] = {
        "position": position,
        "step": 10 * position,
        "rows": 100 * position,
        "checkpoint": files(position),
        "history": [{"position": position}],
        "metrics": {"a": {"loss": 1.0 / (position + 1)}},
    }
    return lineage.commit(**arguments | changes)


def files(position: int) -> dict[str, bytes]:
    return {"sae/a": b"weights %d" % position, "optimizer/a": b"moments %d" % position}


def numbers(runs: LocalStore) -> list[int]:
    """Numbers of all heads there are."""
    keys = (key for key, _ in runs.list(f"{RUN}/heads/"))
    return sorted(int(Path(key).stem) for key in keys if key.endswith(".json"))


def folders(runs: LocalStore) -> set[str]:
    """Checkpoints there are."""
    return {key.split("/")[2] for key, _ in runs.list(f"{RUN}/checkpoints/")}


def folder(head: Head) -> str:
    assert head.checkpoint_folder is not None
    return head.checkpoint_folder.strip("/").split("/")[-1]


class TestTakingOver:
    def test_a_new_run_begins_at_nothing(self, runs: LocalStore) -> None:
        assert newest_head(runs, RUN) is None
        head = taken_over(runs).head
        assert (head.n, head.parent, head.kind, head.status) == (0, None, "takeover", "running")
        assert (head.position, head.step, head.rows, head.checkpoint) == (0, 0, 0, {})
        assert head.environment == ENVIRONMENT

    def test_it_continues_from_the_newest_head(self, runs: LocalStore) -> None:
        first = taken_over(runs)
        last = commit(first, 4)
        second = taken_over(runs)
        head = second.head
        assert (head.n, head.parent, head.kind) == (2, 1, "takeover")
        assert (head.position, head.step, head.rows) == (4, 40, 400)
        assert (head.checkpoint, head.metrics) == (last.checkpoint, last.metrics)
        assert head.reason is None
        assert second.load() == files(4)
        assert second.takeover == head

    def test_heads_are_dense_and_one_chain(self, runs: LocalStore) -> None:
        position = 0
        for _ in range(4):
            lineage = taken_over(runs)
            for _ in range(3):
                position += 1
                commit(lineage, position)
        assert numbers(runs) == list(range(16))
        heads = chain(runs, RUN, newest_head(runs, RUN))
        assert [head.n for head in heads] == list(range(15, -1, -1))
        assert len({head.writer for head in heads}) == 16

    def test_many_at_once_leave_one_that_may_go_on(self, runs: LocalStore) -> None:
        lineages: list[Lineage] = []
        start = threading.Barrier(6)

        def run() -> None:
            start.wait()
            lineages.append(taken_over(runs))

        threads = [threading.Thread(target=run, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert numbers(runs) == list(range(6))
        assert sorted(lineage.head.n for lineage in lineages) == list(range(6))
        for lineage in sorted(lineages, key=lambda held: held.head.n)[:-1]:
            with pytest.raises(Fenced, match="committed by another worker"):
                commit(lineage, 1)
        commit(max(lineages, key=lambda held: held.head.n), 1)

    def test_an_ended_run_is_not_taken_over(self, runs: LocalStore) -> None:
        lineage = taken_over(runs)
        commit(lineage, 4, status="done")
        assert take_over(runs, RUN, ENVIRONMENT) is None
        assert numbers(runs) == [0, 1]

    def test_a_listing_that_lags_behind_is_settled_by_reading(
        self, runs: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lineage = taken_over(runs)
        for position in range(1, 6):
            commit(lineage, position)
        listing = list(runs.list(f"{RUN}/heads/"))
        for stale in ([], [e for e in listing if e[0].endswith("/2.json")]):
            with monkeypatch.context() as patch:
                patch.setattr(runs, "list", lambda prefix, stale=stale: iter(stale))
                head = newest_head(runs, RUN)
            assert head is not None
            assert head.n == 5


class TestFencing:
    def test_the_replaced_worker_cannot_commit(self, runs: LocalStore) -> None:
        old = taken_over(runs)
        commit(old, 2)
        new = taken_over(runs)
        with pytest.raises(Fenced, match="head 2 was committed by another worker"):
            commit(old, 4)
        head = commit(new, 3)
        assert newest_head(runs, RUN) == head
        assert load_checkpoint(runs, RUN, head) == files(3)

    def test_it_cannot_end_the_run_either(self, runs: LocalStore) -> None:
        old = taken_over(runs)
        taken_over(runs)
        with pytest.raises(Fenced):
            old.end("failed", "diverged")
        head = newest_head(runs, RUN)
        assert head is not None
        assert head.status == "running"

    def test_it_deletes_nothing(self, runs: LocalStore) -> None:
        old = taken_over(runs)
        commit(old, 1)
        commit(old, 2)
        new = taken_over(runs)
        commit(new, 3)
        before = folders(runs)
        with pytest.raises(Fenced):
            commit(old, 9)
        assert before <= folders(runs)

    def test_a_retried_create_that_meets_its_own_head_is_fine(
        self, runs: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The reply of the first try was lost, so the second says that the head exists."""
        create = runs.create

        def lost_reply(key: str, data: bytes) -> bool:
            create(key, data)
            return create(key, data)

        monkeypatch.setattr(runs, "create", lost_reply)
        lineage = taken_over(runs)
        commit(lineage, 1)
        commit(lineage, 2)
        assert numbers(runs) == [0, 1, 2]

    def test_a_checkpoint_without_its_head_never_counts(
        self, runs: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lineage = taken_over(runs)
        commit(lineage, 1)
        with monkeypatch.context() as patch:
            patch.setattr(lineage, "_create", _killed)
            with pytest.raises(KeyboardInterrupt):
                commit(lineage, 2)
        again = taken_over(runs)
        assert (again.head.n, again.head.position) == (2, 1)
        assert again.load() == files(1)


class TestCollecting:
    def test_two_checkpoints_of_the_lineage_stay(self, runs: LocalStore) -> None:
        lineage = taken_over(runs)
        heads = [commit(lineage, position) for position in range(1, 7)]
        assert CHECKPOINTS_KEPT == 2
        assert folders(runs) == {folder(head) for head in heads[-2:]}
        for head, position in ((heads[-2], 5), (heads[-1], 6)):
            assert load_checkpoint(runs, RUN, head) == files(position)
        with pytest.raises(ObjectMissing):
            load_checkpoint(runs, RUN, heads[0])

    def test_a_takeover_is_not_a_checkpoint_of_its_own(self, runs: LocalStore) -> None:
        lineage = taken_over(runs)
        heads = [commit(lineage, position) for position in (1, 2)]
        for _ in range(3):
            lineage = taken_over(runs)
        heads.append(commit(lineage, 3))
        assert folders(runs) == {folder(head) for head in heads[-2:]}

    def test_what_replaced_workers_left_is_removed(self, runs: LocalStore) -> None:
        old = taken_over(runs)
        new = taken_over(runs)
        with pytest.raises(Fenced):
            commit(old, 1)
        left = folders(runs)
        assert len(left) == 1
        heads = [commit(new, position) for position in (1, 2)]
        assert folders(runs) == {folder(head) for head in heads}

    def test_what_another_worker_is_still_storing_stays(self, runs: LocalStore) -> None:
        lineage = taken_over(runs)
        runs.put(f"{RUN}/checkpoints/3-other/sae/a.safetensors", b"half of it")
        commit(lineage, 1)
        commit(lineage, 2)
        assert "3-other" in folders(runs)
        commit(lineage, 3)
        commit(lineage, 4)
        assert "3-other" not in folders(runs)

    def test_heads_and_histories_stay(self, runs: LocalStore) -> None:
        lineage = taken_over(runs)
        for position in range(1, 7):
            commit(lineage, position)
        assert numbers(runs) == list(range(7))
        assert sum(key.endswith(".json") for key, _ in runs.list(f"{RUN}/history/")) == 6

    def test_a_commit_does_not_read_the_whole_lineage(
        self, runs: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lineage = taken_over(runs)
        reads: list[str] = []
        get = runs.get

        def noting(key: str) -> bytes:
            reads.append(key)
            return get(key)

        monkeypatch.setattr(runs, "get", noting)
        for position in range(1, 21):
            reads.clear()
            commit(lineage, position)
        assert len(reads) <= 3


class TestFallingBack:
    @pytest.mark.parametrize("harm", ["flipped", "short", "missing"])
    def test_a_damaged_checkpoint_is_passed_over_and_the_head_says_so(
        self, runs: LocalStore, harm: str
    ) -> None:
        lineage = taken_over(runs)
        commit(lineage, 1)
        last = commit(lineage, 2)
        spoil(runs, last, harm)
        with pytest.raises((DamagedObject, ObjectMissing)):
            lineage.load()
        again = taken_over(runs)
        assert (again.head.n, again.head.parent, again.head.position) == (3, 1, 1)
        assert again.load() == files(1)
        assert again.head.reason is not None
        assert again.head.reason.startswith("fell back from head 2: ")
        assert "optimizer/a" in again.head.reason
        assert commit(again, 2).reason is None

    def test_a_takeover_of_it_is_passed_over_too(self, runs: LocalStore) -> None:
        lineage = taken_over(runs)
        commit(lineage, 1)
        last = commit(lineage, 2)
        taken_over(runs)
        spoil(runs, last, "flipped")
        again = taken_over(runs)
        assert (again.head.n, again.head.parent, again.head.position) == (4, 1, 1)

    def test_with_nothing_left_the_run_starts_again(self, runs: LocalStore) -> None:
        lineage = taken_over(runs)
        heads = [commit(lineage, 1), commit(lineage, 2)]
        for head in heads:
            spoil(runs, head, "missing")
        again = taken_over(runs)
        assert (again.head.n, again.head.parent, again.head.position, again.head.step) == (3, 0, 0, 0)
        assert again.head.checkpoint == {}
        assert again.load() == {}

    def test_what_was_passed_over_is_not_in_the_lineage(self, runs: LocalStore) -> None:
        lineage = taken_over(runs)
        commit(lineage, 1)
        last = commit(lineage, 2)
        spoil(runs, last, "flipped")
        head = commit(taken_over(runs), 2, history=[{"position": "again"}])
        assert [link.n for link in chain(runs, RUN, head)] == [4, 3, 1, 0]
        assert load_history(runs, RUN, head) == [{"position": 1}, {"position": "again"}]


class TestEnding:
    def test_a_failed_run_ends_as_it_was_at_its_last_head(self, runs: LocalStore) -> None:
        lineage = taken_over(runs)
        last = commit(lineage, 3)
        head = lineage.end("failed", "loss of a is not finite")
        assert (head.n, head.parent, head.status) == (2, 1, "failed")
        assert head.reason == "loss of a is not finite"
        assert (head.position, head.step, head.checkpoint) == (3, 30, last.checkpoint)
        assert head.terminal
        assert head.history is None
        assert load_checkpoint(runs, RUN, head) == files(3)
        assert take_over(runs, RUN, ENVIRONMENT) is None
        assert load_history(runs, RUN, head) == [{"position": 3}]

    @pytest.mark.parametrize("status", ["done", "failed", "cancelled"])
    def test_terminal_statuses(self, runs: LocalStore, status: Any) -> None:
        lineage = taken_over(runs)
        assert not lineage.head.terminal
        assert lineage.end(status, "because").terminal
        assert take_over(runs, RUN, ENVIRONMENT) is None


class TestHistory:
    def test_it_is_that_of_the_whole_lineage_oldest_first(self, runs: LocalStore) -> None:
        expected = []
        for worker in range(3):
            lineage = taken_over(runs)
            for position in range(2):
                points = [{"worker": worker, "position": position, "point": p} for p in range(3)]
                commit(lineage, 2 * worker + position + 1, history=points)
                expected += points
        assert load_history(runs, RUN, newest_head(runs, RUN)) == expected

    def test_a_head_without_points_has_none(self, runs: LocalStore) -> None:
        head = commit(taken_over(runs), 1, history=[])
        assert head.history is None
        assert load_history(runs, RUN, head) == []
        assert load_history(runs, RUN, None) == []

    def test_what_a_fenced_worker_stored_is_not_in_it(self, runs: LocalStore) -> None:
        old, new = taken_over(runs), taken_over(runs)
        with pytest.raises(Fenced):
            commit(old, 1, history=[{"who": "old"}])
        head = commit(new, 1, history=[{"who": "new"}])
        assert load_history(runs, RUN, head) == [{"who": "new"}]


class TestReading:
    def test_a_head_comes_back_as_it_was(self, runs: LocalStore) -> None:
        head = commit(taken_over(runs), 3)
        assert read_head(runs, RUN, 1) == head

    @pytest.mark.parametrize(
        "spoil_record",
        [
            lambda record: record | {"n": 7},
            lambda record: record | {"unknown": 1},
            lambda record: record | {"checkpoint": {"a": {"key": "b"}}},
            lambda record: {key: value for key, value in record.items() if key != "position"},
        ],
    )
    def test_what_is_no_head_is_damaged(
        self, runs: LocalStore, spoil_record: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        commit(taken_over(runs), 3)
        key = f"{RUN}/heads/1.json"
        record = spoil_record(runs.get_record(key))
        runs.delete(key)
        runs.create_record(key, record)
        with pytest.raises(DamagedObject, match=r"heads/1\.json (is not a head|does not belong there)"):
            read_head(runs, RUN, 1)


def spoil(runs: LocalStore, head: Head, harm: str) -> None:
    """Harm the optimizer file of a head's checkpoint."""
    key = f"{RUN}/{head.checkpoint['optimizer/a'].key}"
    data = runs.get(key)
    runs.delete(key)
    if harm == "flipped":
        runs.put(key, bytes([data[0] ^ 1]) + data[1:])
    elif harm == "short":
        runs.put(key, data[:-1])


def _killed(head: Head) -> None:
    raise KeyboardInterrupt
