"""What every object store backend promises. A backend's test class derives from this one."""

import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor

import pytest

from contracts.race import RACERS, content_of, key_of, race
from penstock.common.errors import DamagedObject, ObjectMissing
from penstock.store.objects import MAX_CREATE_BYTES, ObjectStore

KEY = "commits/0/1.json"
COPY = "commits/0/1.copy"


class ObjectStoreContract(ABC):
    """Derive, give a fixture `store` (empty, new per test) and a second way to read it."""

    @abstractmethod
    def read_raw(self, store: ObjectStore, key: str) -> bytes:
        """An object's bytes, read without the backend."""

    def test_create_makes_the_object_once(self, store: ObjectStore) -> None:
        assert store.create(KEY, b"first") is True
        assert store.create(KEY, b"second") is False
        assert store.create(KEY, b"first") is False, "equal bytes are still not this call's object"
        assert store.get(KEY) == b"first"
        assert self.read_raw(store, KEY) == b"first"

    @pytest.mark.parametrize("data", [b"", b"\x00", bytes(range(256)) * 4096])
    def test_bytes_come_back(self, store: ObjectStore, data: bytes) -> None:
        assert store.create("created", data)
        store.put("put", data)
        for key in ("created", "put"):
            assert store.get(key) == data
            assert self.read_raw(store, key) == data

    @pytest.mark.parametrize("key", ["a", "acts/blocks.3.hook_out/c/0/0", "a b/+=%20&,.json"])
    def test_keys_are_taken_as_they_are(self, store: ObjectStore, key: str) -> None:
        assert store.create(key, b"x")
        assert list(store.list("")) == [(key, 1)]
        assert store.get(key) == b"x"

    def test_a_race_has_one_winner_and_its_bytes(self, store: ObjectStore) -> None:
        writers, rounds = 4, 50
        start = threading.Barrier(writers)

        def race(writer: int, key: str) -> bool:
            start.wait()
            return store.create(key, b"%d" % writer * 1000)

        with ThreadPoolExecutor(writers) as pool:
            for number in range(rounds):
                key = f"race/{number}"
                made = list(pool.map(race, range(writers), [key] * writers))
                assert made.count(True) == 1
                assert store.get(key) == b"%d" % made.index(True) * 1000

    def test_creates_and_deletes_of_neighbours_do_not_meet(self, store: ObjectStore) -> None:
        """Removing the last object below a prefix never disturbs one being made there."""
        writers, rounds = 4, 50

        def churn(writer: int) -> None:
            for number in range(rounds):
                assert store.create(f"shared/deep/{writer}", b"%d" % number)
                store.delete(f"shared/deep/{writer}")

        with ThreadPoolExecutor(writers) as pool:
            list(pool.map(churn, range(writers)))
        assert list(store.list("")) == []

    def test_get_of_nothing_is_missing(self, store: ObjectStore) -> None:
        with pytest.raises(ObjectMissing, match=KEY):
            store.get(KEY)
        with pytest.raises(ObjectMissing, match=KEY):
            store.get_record(KEY)

    def test_put_replaces(self, store: ObjectStore) -> None:
        store.put(KEY, b"long before")
        store.put(KEY, b"after")
        assert self.read_raw(store, KEY) == b"after"
        assert store.create(KEY, b"created") is False

    def test_exists(self, store: ObjectStore) -> None:
        assert not store.exists(KEY)
        store.create(KEY, b"")
        assert store.exists(KEY)
        assert not store.exists("commits"), "a prefix is not an object"
        store.delete(KEY)
        assert not store.exists(KEY)

    def test_list_sees_every_object_with_its_size(self, store: ObjectStore) -> None:
        sizes = {f"commits/{i // 4}/{i}.json": i for i in range(12)} | {"manifest.json": 3}
        assert list(store.list("")) == []
        for key, size in sizes.items():
            store.create(key, bytes(size))
        assert sorted(store.list("")) == sorted(sizes.items())
        below = {key: size for key, size in sizes.items() if key.startswith("commits/1/")}
        assert sorted(store.list("commits/1/")) == sorted(below.items())
        assert list(store.list("nothing/")) == []

    def test_folders_are_the_names_below_a_prefix(self, store: ObjectStore) -> None:
        for key in ("commits/1/1.json", "commits/12/3/4.json", "commits/plain.json", "other/2/5.json"):
            store.create(key, b"")
        assert store.folders("commits/") == {"1", "12"}
        assert store.folders("") == {"commits", "other"}
        assert store.folders("nothing/") == set()
        assert ObjectStore.folders(store, "commits/") == {"1", "12"}, "what backends do by default"

    def test_delete_is_idempotent(self, store: ObjectStore) -> None:
        store.create(KEY, b"x")
        store.delete(KEY)
        store.delete(KEY)
        store.delete("never/was")
        assert list(store.list("")) == []
        assert store.create(KEY, b"y") is True

    def test_records_come_back(self, store: ObjectStore) -> None:
        record = {"rows": 7, "text": "\u00e9\u4e2d", "nested": {"b": [1.5, None], "a": True}}
        assert store.create_record(KEY, record) is True
        assert store.create_record(KEY, {"rows": 8}) is False
        assert store.get_record(KEY) == record

    def test_every_flipped_bit_of_a_record_is_noticed(self, store: ObjectStore) -> None:
        store.create_record(KEY, {"rows": 7})
        whole = store.get(KEY)
        for bit in range(len(whole) * 8):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            store.put(KEY, bytes(flipped))
            with pytest.raises(DamagedObject, match=KEY):
                store.get_record(KEY)

    def test_create_same_accepts_one_content_only(self, store: ObjectStore) -> None:
        store.create_same(KEY, b"x")
        store.create_same(KEY, b"x")
        with pytest.raises(DamagedObject, match=KEY):
            store.create_same(KEY, b"y")

    def test_the_first_writer_of_a_guarded_record_decides(self, store: ObjectStore) -> None:
        assert store.create_guarded(KEY, {"rows": 7}) is True
        assert store.create_guarded(KEY, {"rows": 8}) is False
        assert store.get_record(KEY) == {"rows": 7}
        assert store.get(COPY) == store.get(KEY)

    def test_repeating_ones_own_guarded_create_is_no_failure(self, store: ObjectStore) -> None:
        """A reply can be lost, and the caller cannot know whether its record landed."""
        for _ in range(3):
            assert store.create_guarded(KEY, {"rows": 7}) is True
        store.delete(KEY)
        assert store.create_guarded(KEY, {"rows": 7}) is True
        assert store.get(COPY) == store.get(KEY)

    def test_a_copy_without_its_record_is_completed(self, store: ObjectStore) -> None:
        """Its writer died in between: it was first all the same."""
        assert store.create_record(COPY, {"rows": 7})
        assert store.create_guarded(KEY, {"rows": 8}) is False
        assert store.get_record(KEY) == {"rows": 7}
        assert store.get(COPY) == store.get(KEY)

    def test_a_damaged_copy_is_never_made_the_record(self, store: ObjectStore) -> None:
        store.create_record(COPY, {"rows": 7})
        store.put(COPY, store.get(COPY).replace(b"7", b"8"))
        with pytest.raises(DamagedObject, match=r"1\.copy"):
            store.create_guarded(KEY, {"rows": 9})
        assert not store.exists(KEY)

    def test_a_record_without_its_copy_gets_it_back(self, store: ObjectStore) -> None:
        store.create_guarded(KEY, {"rows": 7})
        for again, ours in (({"rows": 8}, False), ({"rows": 7}, True)):
            store.delete(COPY)
            assert store.create_guarded(KEY, again) is ours
            assert store.get_record(COPY) == store.get_record(KEY) == {"rows": 7}

    def test_a_damaged_record_is_not_copied(self, store: ObjectStore) -> None:
        store.create(KEY, b"nothing")
        assert store.create_guarded(KEY, {"rows": 7}) is False
        assert not store.exists(COPY)

    def test_a_guarded_put_replaces_both(self, store: ObjectStore) -> None:
        for rows in (7, 8):
            store.put_guarded(KEY, {"rows": rows})
            assert store.get_record(KEY) == store.get_record(COPY) == {"rows": rows}

    def test_a_race_for_a_guarded_record_has_one_winner(self, store: ObjectStore) -> None:
        writers, rounds = 4, 20
        start = threading.Barrier(writers)

        def race(writer: int, key: str) -> bool:
            start.wait()
            return store.create_guarded(key, {"writer": writer})

        with ThreadPoolExecutor(writers) as pool:
            for number in range(rounds):
                key = f"race/{number}.json"
                made = list(pool.map(race, range(writers), [key] * writers))
                assert made.count(True) == 1
                assert store.get_record(key) == {"writer": made.index(True)}
                assert store.get(f"race/{number}.copy") == store.get(key)

    def test_too_large_a_create_is_refused(self, store: ObjectStore) -> None:
        with pytest.raises(ValueError, match=KEY):
            store.create(KEY, bytes(MAX_CREATE_BYTES))
        assert not store.exists(KEY)

    def test_probe_leaves_nothing(self, store: ObjectStore) -> None:
        store.probe()
        assert list(store.list("")) == []


class SharedStoreContract(ObjectStoreContract):
    """The same, of backends that several processes share."""

    def test_a_race_of_processes_has_one_winner_and_its_bytes(self, store: ObjectStore) -> None:
        winners = set()
        for turn, told in enumerate(race(store.url)):
            assert told.count(True) == 1, f"round {turn}: {told}"
            winner = told.index(True)
            assert self.read_raw(store, key_of(turn)) == content_of(winner, turn)
            winners.add(winner)
        assert len(winners) > 1, f"of {RACERS} racers one was always first: that was no race"
