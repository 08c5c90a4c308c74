"""How far a run is, and what it may still have to read again."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import DamagedObject
from penstock.store.heads import (
    CHECKPOINTS_KEPT,
    Head,
    StoredFile,
    barren_takeovers,
    chain,
    head_numbers,
    kept_checkpoints,
    links,
    needed_from,
    newest_head,
    read_head,
)
from penstock.store.layout import head_key
from penstock.store.local import LocalStore
from services.counting import CountingStore

RUN = "run-1"


@pytest.fixture
def runs(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "runs"))


def add(runs: LocalStore, position: int, **changes: Any) -> Head:
    """A head after the newest one, with a checkpoint of its own unless it is a takeover."""
    newest = newest_head(runs, RUN)
    n = 0 if newest is None else newest.n + 1
    file = StoredFile(key=f"checkpoints/{n}-w/sae/a.safetensors", size=1, sha256="0")
    fields: dict[str, Any] = {
        "n": n,
        "parent": None if newest is None else newest.n,
        "writer": f"w{n}",
        "kind": "progress",
        "status": "running",
        "position": position,
        "step": position,
        "rows": position,
        "environment": {},
        "checkpoint": {"sae/a": file},
    }
    head = Head.model_validate(fields | changes)
    assert runs.create_guarded(head_key(RUN, n), head.record())
    return head


def take_over(runs: LocalStore, base: Head | None = None) -> Head:
    """A takeover of the newest head, or of an older one."""
    base = base or newest_head(runs, RUN)
    if base is None:
        return add(runs, 0, kind="takeover", checkpoint={})
    return add(runs, base.position, kind="takeover", parent=base.n, checkpoint=base.checkpoint)


class TestNeededFrom:
    def test_a_run_without_heads_needs_everything_from_its_start(self, runs: LocalStore) -> None:
        assert needed_from(runs, RUN, 4) == 4

    def test_with_fewer_than_two_checkpoints_it_is_still_its_start(self, runs: LocalStore) -> None:
        """The only checkpoint may be damaged, and then the run starts again."""
        take_over(runs)
        assert needed_from(runs, RUN, 4) == 4
        add(runs, 6)
        assert needed_from(runs, RUN, 4) == 4
        take_over(runs)
        assert needed_from(runs, RUN, 4) == 4, "a takeover has no checkpoint of its own"

    def test_then_it_is_its_older_kept_checkpoint(self, runs: LocalStore) -> None:
        assert CHECKPOINTS_KEPT == 2
        take_over(runs)
        for position, needed in ((3, 0), (6, 3), (9, 6), (12, 9)):
            add(runs, position)
            assert needed_from(runs, RUN, 0) == needed
            take_over(runs)
            assert needed_from(runs, RUN, 0) == needed

    @pytest.mark.parametrize("status", ["done", "failed", "cancelled"])
    def test_a_run_that_has_ended_needs_nothing(self, runs: LocalStore, status: str) -> None:
        take_over(runs)
        add(runs, 3)
        add(runs, 6, status=status)
        assert needed_from(runs, RUN, 0) is None

    def test_it_is_that_of_the_lineage(self, runs: LocalStore) -> None:
        """A head that was passed over names a checkpoint that nobody goes back to."""
        take_over(runs)
        old = [add(runs, position) for position in (3, 6, 9)][1]
        take_over(runs, old)
        assert needed_from(runs, RUN, 0) == 3
        add(runs, 9)
        assert needed_from(runs, RUN, 0) == 6

    def test_a_damaged_head_is_not_taken_for_none(self, runs: LocalStore) -> None:
        take_over(runs)
        add(runs, 3)
        runs.put(head_key(RUN, 1), b"{}")
        with pytest.raises(DamagedObject, match=r"heads/1\.json"):
            needed_from(runs, RUN, 0)


class TestReading:
    def test_only_records_are_heads(self, runs: LocalStore) -> None:
        take_over(runs)
        add(runs, 3)
        runs.put(f"{RUN}/heads/x.json", b"")
        runs.put(f"{RUN}/heads/9.copy", b"")
        assert head_numbers(runs, RUN) == {0, 1}

    def test_heads_after_a_stale_listing_are_found(
        self, runs: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        take_over(runs)
        last = [add(runs, position) for position in (3, 6, 9)][-1]
        monkeypatch.setattr(runs, "list", lambda prefix: iter([(head_key(RUN, 1), 1)]))
        assert newest_head(runs, RUN) == last

    def test_from_a_known_one_on_nothing_is_listed(self, runs: LocalStore) -> None:
        known = add(runs, 1)
        last = [add(runs, position) for position in (2, 3)][-1]
        counting = CountingStore(runs)
        assert newest_head(counting, RUN, known) == last
        assert newest_head(counting, RUN, last) == last
        assert {what for what, _ in counting.take()} == {"get"}

    def test_a_lineage_is_read_only_as_far_as_it_is_looked_at(self, runs: LocalStore) -> None:
        take_over(runs)
        for position in (3, 6, 9):
            add(runs, position)
        newest = newest_head(runs, RUN)
        runs.delete(head_key(RUN, 0))
        assert [head.n for head in islice(links(runs, RUN, newest), 3)] == [3, 2, 1]
        assert [head.n for head in kept_checkpoints(runs, RUN, newest)] == [3, 2]

    def test_a_chain_is_newest_first(self, runs: LocalStore) -> None:
        take_over(runs)
        old = add(runs, 3)
        add(runs, 6)
        take_over(runs, old)
        assert [head.n for head in chain(runs, RUN, newest_head(runs, RUN))] == [3, 1, 0]
        assert chain(runs, RUN, None) == []

    @pytest.mark.parametrize(
        "changes",
        [
            {"parent": 1},
            {"parent": 2},
            {"position": -1},
            {"position": 1.5},
            {"status": "paused"},
            {"kind": "other"},
            {"checkpoint": {"sae/a": {"key": "../other/weights", "size": 1, "sha256": "0"}}},
            {"checkpoint": {"sae/a": {"key": "checkpoints/1-w/a", "size": -1, "sha256": "0"}}},
        ],
        ids=str,
    )
    def test_a_head_that_cannot_be_is_damaged(self, runs: LocalStore, changes: dict[str, Any]) -> None:
        take_over(runs)
        head = add(runs, 3)
        runs.put_guarded(head_key(RUN, 1), head.record() | changes)
        with pytest.raises(DamagedObject, match=r"heads/1\.json"):
            read_head(runs, RUN, 1)


class TestBarrenTakeovers:
    def test_takeovers_without_progress_are_counted(self, runs: LocalStore) -> None:
        assert barren_takeovers(runs, RUN, None) == 0
        for count in (1, 2, 3):
            assert barren_takeovers(runs, RUN, take_over(runs)) == count
        assert barren_takeovers(runs, RUN, add(runs, 3)) == 0
        assert barren_takeovers(runs, RUN, take_over(runs)) == 1
