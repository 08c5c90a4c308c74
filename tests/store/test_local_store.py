"""The local backend: the contract, kills at every point of a create, and refusals."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from contracts.objects import SharedStoreContract
from penstock.common.errors import StoreError
from penstock.store.local import LocalStore
from penstock.store.objects import ObjectStore, open_store

BLOCK = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "store"))


class TestLocalStore(SharedStoreContract):
    def read_raw(self, store: ObjectStore, key: str) -> bytes:
        return (Path(store.url) / key).read_bytes()


KILLED_AT = """
import builtins, os, signal, sys
import penstock.store.local as local

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def then_die(call):
    def wrapped(*args, **kwargs):
        call(*args, **kwargs)
        die()
    return wrapped

def half_written(*args):
    file = builtins.open(*args)
    class Half:
        def __enter__(self):
            return self
        def __exit__(self, *_):
            pass
        def write(self, data):
            file.write(data[: len(data) // 2])
            file.flush()
            die()
    return Half()

point = sys.argv[2]
if point == "half written":
    local.open = half_written
elif point == "before fsync":
    os.fsync = die
elif point == "before link":
    os.link = die
elif point == "after link":
    os.link = then_die(os.link)
local.LocalStore(sys.argv[1]).create("a/b", bytes(range(256)) * 4096)
"""


@pytest.mark.parametrize(
    ("point", "made"),
    [
        ("half written", False),
        ("before fsync", False),
        ("before link", False),
        ("after link", True),
    ],
)
def test_a_kill_leaves_the_whole_object_or_none(store: LocalStore, point: str, made: bool) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_AT, store.url, point])
    assert killed.returncode == -signal.SIGKILL
    whole = bytes(range(256)) * 4096
    assert list(store.list("")) == ([("a/b", BLOCK)] if made else [])
    assert store.create("a/b", whole) is not made
    assert store.get("a/b") == whole


ENDLESS_WRITER = """
import itertools, sys
from penstock.store.local import LocalStore
store = LocalStore(sys.argv[1])
for number in itertools.count():
    store.create(str(number), bytes(8 << 20))
    print(number, flush=True)
"""


def test_kills_at_any_time_leave_only_whole_objects(tmp_path: Path) -> None:
    for kill in range(5):
        store = LocalStore(str(tmp_path / str(kill)))
        with subprocess.Popen(
            [sys.executable, "-c", ENDLESS_WRITER, store.url], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(kill + 1):
                writer.stdout.readline()
            writer.kill()
        sizes = dict(store.list(""))
        assert len(sizes) > kill
        assert set(sizes.values()) == {8 << 20}


def refuse_links(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_refused(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse_links(monkeypatch, code)
    with pytest.raises(StoreError, match="no hard links") as refusal:
        store.probe()
    assert store.url in str(refusal.value)
    assert list(Path(store.url).rglob("*")) == [], "nothing is left behind"


def test_a_link_whose_reply_was_lost_is_ours(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link_and_lose_the_reply(source: str, target: str) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", link_and_lose_the_reply)
    assert store.create("a", b"x") is True
    assert store.get("a") == b"x"


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_directory_without_permission_is_refused(tmp_path: Path, mode: int) -> None:
    store = LocalStore(str(tmp_path / "closed"))
    (tmp_path / "closed").mkdir(mode=mode)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    for call in (store.probe, lambda: store.put("a", b"")):
        with pytest.raises(StoreError, match="closed"):
            call()


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = LocalStore(str(tmp_path / "file" / "store"))
    for call in (store.probe, lambda: store.put("a", b"")):
        with pytest.raises(StoreError, match=r"file/store.*Not a directory"):
            call()
    assert not store.exists("a")


def test_open_store_takes_paths_and_file_urls(tmp_path: Path) -> None:
    assert open_store(str(tmp_path)).url == open_store(f"file://{tmp_path}").url == str(tmp_path)
    with pytest.raises(StoreError, match="gs://"):
        open_store("gs://bucket/prefix")
