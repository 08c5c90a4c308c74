"""The simulated S3: the store contract without faults, and what the real store makes of faults."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest

from contracts.objects import ObjectStoreContract
from penstock.common.errors import Unavailable
from penstock.store.objects import ObjectStore, open_store
from penstock.store.s3 import S3Store
from simulation.faults import Faults
from simulation.s3 import MemoryS3
from simulation.scheduler import Scheduler, in_turn
from simulation.world import patched_world

URL = "s3://bucket/some/prefix"


@pytest.fixture
def world() -> Iterator[Scheduler]:
    with patched_world(), Scheduler(1) as scheduler:
        yield scheduler


@pytest.fixture
def s3(world: Scheduler) -> MemoryS3:
    return MemoryS3(world)


class TestMemoryS3(ObjectStoreContract):
    """Outside of actors nothing gives way, so the contract's own threads may use it."""

    @pytest.fixture
    def store(self) -> S3Store:
        self.memory = MemoryS3(Scheduler(0))
        return self.memory.store(URL)

    def read_raw(self, store: ObjectStore, key: str) -> bytes:
        return self.memory.objects[f"{store.url.removeprefix('s3://')}/{key}"].data


def test_a_listing_of_several_pages_is_whole(s3: MemoryS3) -> None:
    store, s3.page_size = s3.store(URL), 2
    for number in range(7):
        store.create(f"{number}", b"")
    assert [key for key, _ in store.list("")] == [str(number) for number in range(7)]


def test_whoever_opens_a_url_gets_a_simulated_store(s3: MemoryS3) -> None:
    with s3.installed():
        assert open_store(URL).create("a", b"1")
    assert s3.store(URL).get("a") == b"1"


def test_racing_creators_have_one_winner_whatever_goes_wrong() -> None:
    outcomes = set()
    with patched_world():
        for seed in range(200):
            with Scheduler(seed, stickiness=0.3) as world:
                s3 = MemoryS3(world, Faults(world, refused=0.1, lost=0.2, slow=0.1))
                store = s3.store(URL)
                made: dict[str, bool] = {}

                def create(name: str) -> Callable[[], None]:
                    return lambda: made.update({name: store.create("a", name.encode())})  # noqa: B023

                for name in "abc":
                    world.process(name, accepts=(Unavailable,)).spawn(create(name))
                world.run()
                winners = [name for name, won in made.items() if won]
                assert len(winners) == 1 or len(made) < 3, "one may have won and never learn of it"
                assert [m.new for m in s3.history] == [store.get("a")]
                assert all(store.get("a") == winner.encode() for winner in winners)
                outcomes.add((*winners, round(world.clock) > 0))
    assert len(outcomes) >= 6, "every one wins some, with and without pauses"


def test_a_service_that_stays_away_is_unavailable(world: Scheduler, s3: MemoryS3) -> None:
    s3.faults.refused = 1.0
    store = s3.store(URL)
    process = world.process("a", accepts=(Unavailable,))
    process.spawn(lambda: store.get("a"))
    world.run()
    assert isinstance(process.error, Unavailable)
    assert process.requests == 6
    assert world.clock > 0.0, "the pauses took virtual time"
    s3.faults.quiet()
    world.process("b").spawn(lambda: store.exists("a"))
    world.run()


def test_a_late_write_lands_after_its_sender_gave_up(world: Scheduler, s3: MemoryS3) -> None:
    s3.faults.late = 1.0
    store = s3.store(URL)
    process = world.process("a", accepts=(Unavailable,))
    process.spawn(lambda: store.put("a", b"1"))
    world.process("b").spawn(lambda: world.sleep(200.0))
    world.run()
    assert isinstance(process.error, Unavailable)
    assert [m.process for m in s3.history] == ["a"] * 6


def test_a_crashed_process_writes_nothing(world: Scheduler, s3: MemoryS3) -> None:
    store = s3.store(URL)

    def main() -> None:
        try:
            for number in range(100):
                store.put(str(number), b"")
                world.sleep(1.0)
        finally:
            store.delete("0")

    process = world.process("a")
    process.spawn(main)
    world.process("b").spawn(in_turn(partial(world.sleep, 3.5), process.crash))
    world.run()
    assert [key for key, _ in store.list("")] == ["0", "1", "2", "3"]


def test_observers_see_every_change_and_cannot_be_silenced(world: Scheduler, s3: MemoryS3) -> None:
    store = s3.store(URL)
    seen: list[object] = []

    def write(key: str, old: bytes | None, new: bytes, process: str) -> None:
        seen.append((key, old, new, process))
        assert old is None, f"{key} changed"

    s3.on_write.append(write)
    s3.on_delete.append(lambda *change: seen.append(change))

    def main() -> None:
        store.create("a", b"1")
        store.delete("a")
        store.create("a", b"1")
        with suppress(Exception):
            store.put("a", b"2")

    world.process("p").spawn(main)
    with pytest.raises(AssertionError, match=re.escape("a changed")):
        world.run()
    key = "bucket/some/prefix/a"
    first = (key, None, b"1", "p")
    assert seen == [first, (key, b"1", "p"), first, (key, b"1", b"2", "p")]
