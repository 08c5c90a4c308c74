"""Other backends: the contract in memory, reading from a web server, refusing what does not honour create."""

import functools
import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from contracts.objects import ObjectStoreContract
from penstock.common.errors import ObjectMissing, StoreError
from penstock.deploy.heal import faults
from penstock.store.dataset import open_dataset
from penstock.store.fsspec_store import FsspecStore
from penstock.store.objects import ObjectStore, open_store
from services.synthetic import write_dataset


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FsspecStore]:
    yield FsspecStore(f"memory://{tmp_path.name}/some/prefix")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


class TestMemoryStore(ObjectStoreContract):
    def read_raw(self, store: ObjectStore, key: str) -> bytes:
        found: bytes = MemoryFileSystem.store[
            "/" + store.url.removeprefix("memory://") + f"/{key}"
        ].getvalue()
        return found

    def test_a_race_of_separate_stores_has_one_winner_and_its_bytes(self, store: ObjectStore) -> None:
        clients = [FsspecStore(store.url) for _ in range(4)]
        start = threading.Barrier(len(clients))

        def create(number: int, key: str) -> bool:
            start.wait()
            return clients[number].create(key, b"%d" % number * 1000)

        with ThreadPoolExecutor(len(clients)) as pool:
            for turn in range(200):
                made = list(pool.map(create, range(4), [f"{turn}"] * 4))
                assert made.count(True) == 1
                assert store.get(f"{turn}") == b"%d" % made.index(True) * 1000


class LooksThenWrites(MemoryFileSystem):  # type: ignore[misc]
    """As fsspec does where a service has no exclusive create, with the time that a service takes."""

    both: threading.Barrier | None = None

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        if mode == "create" and self.both is not None:
            self.both.wait()
        super().pipe_file(path, value)


def test_a_backend_that_looks_and_then_writes_is_refused(
    store: FsspecStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = LooksThenWrites(skip_instance_cache=True)
    slow.both = threading.Barrier(4, action=lambda: setattr(slow, "both", None))
    store._fs = slow
    store._scheme = "gs"  # whose requests are not ours to put one after the other
    with pytest.raises(StoreError, match="does not honour exclusive create"):
        store.probe()
    assert list(store.list("")) == []


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A dataset on a plain web server; its URL."""
    write_dataset(tmp_path / "dataset", indexed=True)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/dataset"
        server.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_dataset_is_read_from_a_web_server(web: str, tmp_path: Path) -> None:
    there, local = open_dataset(web), open_dataset(str(tmp_path / "dataset"))
    assert there.committed() == local.committed() == set(range(there.n_chunks))
    hook = there.manifest.hooks[0].name
    for index in range(3):
        ours, theirs = (dataset.read_chunk(index).acts[hook].view(np.uint16) for dataset in (local, there))
        assert np.array_equal(ours, theirs)
    assert sum(len(batch[hook]) for batch in there.batches([hook])) == there.manifest.total_rows
    assert list(faults(web)[1]) == []
    with pytest.raises(ObjectMissing, match="commits/99/99999"):
        there.commit(99999)


@pytest.mark.parametrize("write", ["create", "put", "delete", "probe"])
def test_what_can_only_be_read_says_so(web: str, write: str) -> None:
    store = open_store(web)
    arguments: dict[str, tuple[Any, ...]] = {"create": ("a", b""), "put": ("a", b""), "delete": ("a",)}
    with pytest.raises(StoreError, match=r"http:// is for reading only"):
        getattr(store, write)(*arguments.get(write, ()))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(
        StoreError, match=r"gs://bucket/x: gs:// needs another package \(Please install gcsfs"
    ):
        open_store("gs://bucket/x")


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "sftp://x/y", "nope://x", "zip://x::http://y", "https://u:secret@x/y"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(StoreError) as refusal:
        open_store(url)
    assert "secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)
