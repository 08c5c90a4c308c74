"""Registering while the floor is raised: nothing goes that was promised, however they interleave."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.windows import CHUNKS, Window, all_from


@pytest.fixture
def window(tmp_path: Path) -> Window:
    return Window(tmp_path)


class TestRegisteringWhileTheFloorIsRaised:
    """Whoever registers is either seen by the deleter, or sees the new floor."""

    def hooked(
        self,
        window: Window,
        monkeypatch: pytest.MonkeyPatch,
        operation: str,
        when: str,
        act: Callable[[], None],
    ) -> None:
        """Do something once, just before or after the deleter's first operation of a kind on floors."""
        store = window.store
        real = getattr(store, operation)
        done: list[bool] = []

        def hook(key: str, *arguments: Any) -> Any:
            mine = key.startswith("floor/") and not done
            if mine:
                done.append(True)
            if mine and when == "before":
                act()
            result = real(key, *arguments)
            if mine and when == "after":
                act()
            return result

        monkeypatch.setattr(store, operation, hook)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_with_the_creation_of_the_floor(
        self, window: Window, monkeypatch: pytest.MonkeyPatch, when: str
    ) -> None:
        window.submit("a")
        window.train("a", 5, 8)
        starts: list[int] = []
        self.hooked(
            window, monkeypatch, "create_guarded", when, lambda: starts.append(window.register("late"))
        )
        deleter = window.deleter()
        deleter.advance()
        assert starts == [0 if when == "before" else 5]
        assert window.stored() == all_from(0), "it is not submitted yet: nobody knows what it needs"
        window.configure("late", starts[0])
        deleter.advance()
        assert window.stored() == all_from(starts[0])
        assert deleter.is_deleted(4) is (starts == [5])
        assert deleter.is_needed(4) is (starts == [0])

    def test_with_the_creation_of_the_floor_and_submitted_at_once(
        self, window: Window, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        window.submit("a")
        window.train("a", 5, 8)
        self.hooked(
            window,
            monkeypatch,
            "create_guarded",
            "before",
            lambda: window.configure("late", window.register("late")),
        )
        deleter = window.deleter()
        deleter.advance()
        assert (deleter.floor, window.stored()) == (5, all_from(0))
        assert not deleter.is_deleted(3), "it must be mended for the run that registered"
        window.train("late", 2, 4)
        deleter.advance()
        assert window.stored() == all_from(2)

    def test_while_another_deleter_raises_it(self, window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
        """The floor that this one finds is newer than the readers it would know of, were they asked first."""
        window.submit("a")
        window.train("a", 5, 8)
        slow, other = window.deleter(), window.deleter()
        listing, create = window.store.list, window.store.create_guarded
        late: list[int] = []

        def register_before_the_floor(key: str, record: dict[str, Any]) -> bool:
            if key.startswith("floor/") and not late:
                late.append(-1)
                late[0] = window.submit("late")
            return create(key, record)

        def meddle(prefix: str) -> Any:
            found = list(listing(prefix))
            if prefix == "readers/" and not late:
                monkeypatch.setattr(window.store, "list", listing)
                other.advance()
            return iter(found)

        monkeypatch.setattr(window.store, "create_guarded", register_before_the_floor)
        monkeypatch.setattr(window.store, "list", meddle)
        slow.advance()
        assert late == [0]
        assert window.floors() == [5]
        assert window.stored() == all_from(0), "run late begins at 0"

    def test_many_at_once_lose_nothing(self, window: Window) -> None:
        window.submit("a")
        starts: dict[str, int] = {}
        stop = threading.Event()
        failures: list[BaseException] = []

        def guarded(action: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                try:
                    action()
                except BaseException as error:
                    failures.append(error)

            return run

        def delete() -> None:
            deleter = window.deleter()
            while not stop.is_set():
                deleter.advance()

        def register() -> None:
            for number in range(8):
                starts[f"late{number}"] = window.submit(f"late{number}")

        deleters = [threading.Thread(target=guarded(delete), daemon=True) for _ in range(2)]
        registrant = threading.Thread(target=guarded(register), daemon=True)
        for thread in deleters:
            thread.start()
        window.train("a", 1, 2)
        registrant.start()
        window.train("a", *range(3, CHUNKS))
        registrant.join()
        window.deleter().advance()
        stop.set()
        for thread in deleters:
            thread.join()
        assert failures == []
        assert min(starts.values()) < CHUNKS
        assert window.stored() >= all_from(min(starts.values()))
        floors = window.floors()
        assert floors == sorted(set(floors)), "dense, exclusive and rising"
