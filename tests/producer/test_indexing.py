"""Producers index the blocks that are complete when they look, one producer at a time."""

from pathlib import Path
from typing import Any

import pytest

from penstock.common.redis import Client
from penstock.store.commits import create_commit, read_commit
from penstock.store.index import Columns, encode_block
from penstock.store.layout import BLOCK_CHUNKS, commit_key, index_key
from penstock.store.manifest import Manifest
from penstock.store.objects import ObjectStore, open_store
from services.big import big_manifest, made_up_commit
from services.counting import CountingStore
from services.producing import CountingSource, Producer, run_together
from services.synthetic import CHUNKS, make_manifest
from services.valkey import fresh_prefix

MORE = 5
"""Chunks after the first block."""


@pytest.fixture
def plan() -> Manifest:
    return big_manifest(BLOCK_CHUNKS + MORE)


@pytest.fixture
def store(tmp_path: Path, plan: Manifest) -> ObjectStore:
    """A dataset whose first block is committed."""
    store = open_store(str(tmp_path))
    for index in range(BLOCK_CHUNKS):
        create_commit(store, made_up_commit(plan, index))
    return store


def producer(client: Client, store: ObjectStore, plan: Manifest, **more: Any) -> Producer:
    source = CountingSource(plan)
    return Producer(
        client, more.pop("prefix", fresh_prefix()), "", "p", source, manifest=plan, store=store, **more
    )


def expected(store: ObjectStore, plan: Manifest, chunks: range) -> bytes:
    return encode_block(Columns.of(plan), [read_commit(store, index) for index in chunks])


def test_a_complete_block_is_indexed_while_others_are_made(
    client: Client, store: ObjectStore, plan: Manifest
) -> None:
    counting = CountingStore(store)
    made = producer(client, counting, plan)
    made.run()
    assert made.source.made == [*range(BLOCK_CHUNKS, BLOCK_CHUNKS + MORE)]
    assert store.get(index_key(0)) == expected(store, plan, range(BLOCK_CHUNKS))
    assert store.get(index_key(1)) == expected(store, plan, range(BLOCK_CHUNKS, BLOCK_CHUNKS + MORE))
    created = [key for what, key in counting.asked if what == "create"]
    assert created.index(index_key(0)) < created.index(commit_key(BLOCK_CHUNKS)), "before the first chunk"
    assert created[-1] == index_key(1), "the short block, before it ends"


def test_a_block_is_left_to_who_is_at_it(client: Client, store: ObjectStore, plan: Manifest) -> None:
    """Until there is nothing else to do: who was at it may have died."""
    prefix = fresh_prefix()
    made = producer(client, store, plan, prefix=prefix)
    assert producer(client, store, plan, prefix=prefix).queue.lease_index()
    made.work._reconcile()
    assert not store.exists(index_key(0))
    made.run()
    assert store.exists(index_key(0))
    assert store.exists(index_key(1))


def test_looking_costs_the_same_once_blocks_are_indexed(
    client: Client, store: ObjectStore, plan: Manifest
) -> None:
    counting = CountingStore(store)
    made = producer(client, counting, plan)
    made.work._reconcile()
    counting.take()
    made.work._reconciled = float("-inf")
    made.work._reconcile()
    assert counting.take() == [("list", "index/"), ("folders", "commits/")]


def test_producers_of_a_finished_dataset_only_index_it(client: Client, tmp_path: Path) -> None:
    run_together([Producer(client, fresh_prefix(), tmp_path, "p")])
    store = open_store(str(tmp_path))
    data = store.get(index_key(0))
    assert data == expected(store, make_manifest(), range(CHUNKS))
    store.delete(index_key(0))
    prefix = fresh_prefix()
    again = [Producer(client, prefix, tmp_path, name) for name in "abc"]
    run_together(again)
    assert [p.source.made for p in again] == [[], [], []]
    assert store.get(index_key(0)) == data
