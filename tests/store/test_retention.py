"""Retention: how far chunks may be made, what may go, and that nothing goes that was promised."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import DamagedObject, StoreError, UserError
from penstock.store.arrays import dataset_arrays
from penstock.store.layout import ARRAYS, config_key, floor_key, head_key, reader_key
from penstock.store.objects import ObjectStore
from penstock.store.retention import (
    Reader,
    Retention,
    budget_chunks,
    check_quota,
    delete_chunk,
    detach_reader,
    detached_because,
    newest_floor,
    read_reader,
    readers,
    register_reader,
)
from services.counting import CountingStore
from services.synthetic import make_manifest, write_dataset
from services.windows import BUDGET, CHUNKS, MANIFEST, ROWS, Window, all_from


@pytest.fixture
def window(tmp_path: Path) -> Window:
    return Window(tmp_path)


class TestLimit:
    def test_it_is_floor_plus_budget_whatever_is_missing_in_between(self, tmp_path: Path) -> None:
        """Counting committed chunks instead would make 4 and 5 while 1 is still missing, or never 1."""
        window = Window(tmp_path, made=0)
        writer = write_dataset(tmp_path / "dataset", MANIFEST, [0, 2])
        assert writer.committed() == {0, 2}
        deleter = window.deleter()
        window.submit("a")
        deleter.advance()
        assert deleter.limit == BUDGET
        write_dataset(tmp_path / "dataset", MANIFEST, [3, 5, 7])
        deleter.advance()
        assert deleter.limit == BUDGET
        window.train("a", 1, 2)
        deleter.advance()
        assert (deleter.floor, deleter.limit) == (1, 1 + BUDGET)

    def test_it_never_passes_the_end(self, window: Window) -> None:
        window.submit("a")
        window.train("a", 10, 11)
        deleter = window.deleter()
        deleter.advance()
        assert deleter.limit == CHUNKS

    def test_without_a_budget_everything_may_be_made_and_nothing_goes(self, window: Window) -> None:
        window.submit("a")
        window.train("a", 6, 9)
        deleter = window.deleter(budget_chunks=None)
        deleter.advance()
        assert deleter.limit == CHUNKS
        assert window.stored() == all_from(0)
        assert window.floors() == []
        assert deleter.is_needed(0)
        assert not deleter.is_deleted(0)

    def test_it_says_for_whom_it_waits(self, window: Window) -> None:
        deleter = window.deleter()
        deleter.advance()
        assert "a run to be submitted" in deleter.waiting_for
        window.submit("fast")
        window.submit("slow")
        window.train("fast", 4, 6)
        window.train("slow", 2, 3)
        deleter.advance()
        assert deleter.waiting_for == "run slow, which still needs chunk 2"


class TestFloor:
    def test_it_follows_the_slowest_readers_older_checkpoint(self, window: Window) -> None:
        deleter = window.deleter()
        window.submit("a")
        window.submit("b")
        for run, position, floor in (
            ("a", 3, 0),
            ("a", 6, 0),
            ("b", 2, 0),
            ("b", 4, 2),
            ("b", 5, 3),
            ("a", 7, 4),
            ("b", 9, 5),
        ):
            window.train(run, position)
            deleter.advance()
            assert deleter.floor == newest_floor(window.store)[1] == floor, (run, position)
            assert window.stored() == all_from(floor)
        assert window.floors() == [2, 3, 4, 5]

    def test_it_costs_the_same_however_many_came_before(self, window: Window) -> None:
        store = CountingStore(window.store)
        deleter = Retention(store, MANIFEST, BUDGET)
        window.submit("a")
        window.train("a", 1, 2)
        deleter.advance()
        costs = set()
        for position in range(3, CHUNKS):
            window.train("a", position)
            store.take()
            deleter.advance()
            assert deleter.is_needed(position)
            asked = store.take()
            assert ("list", "floor/") not in asked
            costs.add(len([key for _, key in asked if key.startswith(("floor/", "readers/"))]))
        assert deleter.floor == CHUNKS - 2
        assert len(costs) == 1

    def test_objects_go_and_commits_stay(self, window: Window) -> None:
        window.submit("a")
        window.train("a", 5, 8)
        before = window.dataset.committed()
        window.deleter().advance()
        assert window.stored() == all_from(5)
        assert window.dataset.committed() == before == all_from(0)
        for index in range(CHUNKS):
            assert window.dataset.commit(index).rows == 20
        window.dataset.read_chunk(5)

    def test_without_readers_nothing_is_deleted(self, window: Window) -> None:
        deleter = window.deleter()
        deleter.advance()
        assert window.stored() == all_from(0)
        assert (window.floors(), deleter.limit) == ([], BUDGET)

    @pytest.mark.parametrize("status", ["done", "failed", "cancelled"])
    def test_readers_that_have_ended_do_not_count(self, window: Window, status: str) -> None:
        window.submit("ended")
        window.train("ended", 1, 2)
        window.train("ended", 2, status=status)
        window.submit("a")
        window.train("a", 6, 9)
        window.deleter().advance()
        assert window.stored() == all_from(6)

    def test_when_all_have_ended_the_floor_stays(self, window: Window) -> None:
        window.submit("a")
        window.train("a", 3, 6)
        deleter = window.deleter()
        deleter.advance()
        window.train("a", 9, status="done")
        deleter.advance()
        assert (deleter.floor, window.stored()) == (3, all_from(3))

    def test_detached_readers_do_not_count(self, window: Window) -> None:
        window.submit("gone")
        window.submit("a")
        window.train("a", 6, 9)
        deleter = window.deleter()
        deleter.advance()
        assert window.stored() == all_from(0)
        assert detach_reader(window.store, "gone", "by command")
        assert not detach_reader(window.store, "gone", "again"), "the first word counts"
        assert detached_because(window.store, "gone") == "by command"
        assert detached_because(window.store, "a") is None
        deleter.advance()
        assert window.stored() == all_from(6)
        with pytest.raises(UserError, match="run gone was detached"):
            window.register("gone")

    def test_a_run_that_begins_later_needs_nothing_before(self, window: Window) -> None:
        window.submit("a")
        window.train("a", 4, 6)
        deleter = window.deleter()
        deleter.advance()
        assert window.submit("late") == 4
        window.train("a", 8, 9)
        deleter.advance()
        assert window.stored() == all_from(4)
        window.train("late", 6, 8)
        deleter.advance()
        assert window.stored() == all_from(6)

    def test_registering_again_changes_nothing(self, window: Window) -> None:
        assert window.register("a") == 0
        assert window.register("a") == 0
        assert read_reader(window.store, "a") == Reader("a", window.runs.url, 0, 1)
        assert [reader.run for reader in readers(window.store)] == ["a"]


class TestSweeping:
    def test_what_was_left_behind_is_removed_at_the_start(self, window: Window) -> None:
        window.submit("a")
        window.train("a", 4, 6)
        window.deleter().advance()
        spec = dataset_arrays(MANIFEST)[0]
        window.store.put(spec.key(ARRAYS, 1), b"by a slow producer that was killed")
        window.deleter().advance()
        assert not window.store.exists(spec.key(ARRAYS, 1))
        assert window.stored() == all_from(4)

    def test_later_only_what_is_new_is_deleted(self, window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
        window.submit("a")
        window.train("a", 2, 4)
        deleter = window.deleter()
        deleter.advance()
        deleted: list[str] = []
        real = window.store.delete

        def delete(key: str) -> None:
            deleted.append(key)
            real(key)

        monkeypatch.setattr(window.store, "delete", delete)
        monkeypatch.setattr(window.store, "list", self._not_arrays(window.store.list))
        deleter.advance()
        assert deleted == []
        window.train("a", 6)
        deleter.advance()
        assert sorted(deleted) == sorted(s.key(ARRAYS, i) for s in dataset_arrays(MANIFEST) for i in (2, 3))

    def _not_arrays(self, real: Callable[[str], Any]) -> Callable[[str], Any]:
        def listing(prefix: str) -> Any:
            assert not prefix.startswith(ARRAYS), "a listing of all objects takes long"
            return real(prefix)

        return listing

    def test_a_chunks_objects_go_and_nothing_else(self, window: Window) -> None:
        delete_chunk(window.store, dataset_arrays(MANIFEST), 7)
        delete_chunk(window.store, dataset_arrays(MANIFEST), 7)
        assert window.stored() == all_from(0) - {7}
        assert window.dataset.commit(7).rows == 20


class TestExpiry:
    def test_a_run_without_a_new_head_for_too_long_is_detached(self, window: Window) -> None:
        now = time.time()
        window.submit("stuck")
        window.train("stuck", 1, 2, when=now - 3700)
        window.submit("alive")
        window.train("alive", 5, 7, when=now - 3500)
        window.deleter(detach_after=None).advance()
        assert window.stored() == all_from(1)
        window.deleter(detach_after=3600).advance()
        assert window.stored() == all_from(5)
        reason = detached_because(window.store, "stuck")
        assert reason == "no head for 1 h, as dataset.detach_after_hours says"
        assert detached_because(window.store, "alive") is None

    def test_ended_runs_and_runs_not_begun_do_not_expire(self, window: Window) -> None:
        window.submit("ended")
        window.train("ended", 3, status="done", when=0.0)
        window.submit("new")
        window.deleter(detach_after=1.0).advance()
        assert [reader.run for reader in readers(window.store)] == ["ended", "new"]
        assert window.stored() == all_from(0)


class TestDamage:
    @pytest.mark.parametrize("harm", ["record", "config", "head", "strange", "floor"])
    def test_nothing_is_deleted_while_a_reader_cannot_be_read(self, window: Window, harm: str) -> None:
        window.submit("a")
        window.train("a", 2, 3)
        window.submit("b")
        window.train("b", 6, 8)
        deleter = window.deleter()
        deleter.advance()
        window.train("a", 9, 10)
        if harm == "record":
            window.store.put(reader_key("a"), window.store.get(reader_key("a")).replace(b":1", b":2"))
        elif harm == "strange":
            window.store.put_guarded(reader_key("a"), {"format_version": 1, "run": "a", "start": True})
        elif harm == "config":
            window.runs.put_guarded(config_key("a"), {"format_version": 1})
        elif harm == "floor":
            window.store.put_guarded(floor_key(0), {"format_version": 1, "n": 0, "floor": -1})
        else:
            window.runs.put(head_key("a", 3), b"{}")
        with pytest.raises(DamagedObject):
            deleter.advance()
        with pytest.raises(DamagedObject):
            window.deleter().advance()
        assert window.stored() == all_from(2)


class TestNumbers:
    def test_a_quota_refuses_with_the_numbers(self) -> None:
        kept = make_manifest(ROWS)
        size = CHUNKS * kept.chunk_bytes()
        check_quota(kept, None, None)
        check_quota(kept, size, None)
        with pytest.raises(StoreError, match=rf"quota_bytes.*{size:,} bytes.* {size - 1:,};"):
            check_quota(kept, size - 1, None)

    def test_a_window_takes_only_its_budget(self) -> None:
        check_quota(MANIFEST, 50_000, 50_000)
        with pytest.raises(StoreError, match=r"50,000 bytes.* 49,999;"):
            check_quota(MANIFEST, 49_999, 50_000)
        check_quota(MANIFEST, CHUNKS * MANIFEST.chunk_bytes(), 10**12)

    def test_a_budget_is_counted_in_chunks(self, tmp_path: Path) -> None:
        one = MANIFEST.chunk_bytes()
        assert budget_chunks(MANIFEST, one) == 1
        assert budget_chunks(MANIFEST, 5 * one - 1) == 4
        assert budget_chunks(make_manifest(ROWS), None) is None
        with pytest.raises(UserError, match="budget_bytes: retention: window needs a budget"):
            budget_chunks(MANIFEST, None)
        with pytest.raises(UserError, match=rf"{one - 1:,} bytes hold no chunk, which takes {one:,}"):
            budget_chunks(MANIFEST, one - 1)
        dataset = write_dataset(tmp_path / "one", MANIFEST, [0])
        stored = sum(size for key, size in dataset.store.list(f"{ARRAYS}/") if "/c/" in key)
        assert stored == one

    def test_a_reader_that_needs_more_than_the_budget_is_named(self, window: Window) -> None:
        """The budget was lowered since it was submitted."""
        window.register("wide", needs=BUDGET + 1)
        with pytest.raises(
            UserError, match=f"holds {BUDGET} chunks, but run wide needs {BUDGET + 1} at once"
        ):
            window.deleter().advance()
        window.deleter(budget_chunks=BUDGET + 1).advance()

    @pytest.mark.parametrize("how", ["ended", "detached"])
    def test_a_reader_that_is_gone_may_have_needed_more(self, window: Window, how: str) -> None:
        window.register("wide", needs=BUDGET + 1)
        window.configure("wide", 0)
        if how == "ended":
            window.train("wide", 3, status="done")
        else:
            detach_reader(window.store, "wide", "by command")
        window.deleter().advance()


def test_runs_are_opened_once(window: Window) -> None:
    opened: list[str] = []

    def open_runs(url: str) -> ObjectStore:
        opened.append(url)
        return window.runs

    window.submit("a")
    window.submit("b")
    deleter = window.deleter(open_runs=open_runs)
    for _ in range(3):
        deleter.advance()
    assert opened == [window.runs.url]


def test_an_equal_run_of_another_runs_url_is_not_kept_for_twice(tmp_path: Path) -> None:
    """One reader record stands for one run: the second one's chunks would go behind its back."""
    window = Window(tmp_path)
    window.submit("run")
    other = Reader("run", str(tmp_path / "elsewhere"), 0, 1)
    with pytest.raises(UserError, match=r"reads .* for .* already"):
        register_reader(window.store, other)
    assert register_reader(window.store, other, keeps_window=False) == 0
    assert window.register("run") == 0
