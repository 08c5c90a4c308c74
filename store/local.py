"""Objects as files.

Exclusive create is a temporary file in the same directory, fsync, hard link to the final name,
fsync of the directory. Opening the final name with O_EXCL instead leaves truncated objects behind
kills.
"""

import contextlib
import errno
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from penstock.common.errors import ObjectMissing, StoreError
from penstock.store.objects import ObjectStore

_TEMPORARY = ".tmp-"
"""Temporary names are .tmp-<host>-<pid>-<random>: whose process is gone, it is nobody's."""
_DIRECTORY_TRIES = 100
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.ENOSYS}


class LocalStore(ObjectStore):
    """Objects below a directory of a file system with hard links."""

    def __init__(self, path: str) -> None:
        if "\0" in path:
            raise StoreError(f"{path!r}: a path cannot hold a NUL character")
        self.root = Path(path).absolute()
        self.url = str(self.root)

    def _create(self, key: str, data: bytes) -> bool:
        final = self.root / key
        if os.path.exists(final):
            return False
        temporary = self._write_temporary(final, data)
        try:
            os.link(temporary, final)
            created = True
        except FileExistsError:
            # The link may be our own: a network file system can lose the reply of one that landed.
            created = os.stat(temporary).st_nlink == 2
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise StoreError(
                    f"{final.parent}: this file system has no hard links, which exclusive create "
                    f"needs ({error.strerror}); use another directory"
                ) from error
            raise StoreError(f"{final}: {self._why(error, len(data))}") from error
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(final.parent)
        return created

    def put(self, key: str, data: bytes) -> None:
        final = self.root / key
        temporary = self._write_temporary(final, data)
        try:
            os.replace(temporary, final)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(f"{final}: cannot be written: {self._why(error, len(data))}") from error
        _sync_directory(final.parent)

    def get(self, key: str) -> bytes:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ObjectMissing(f"{self.root / key} is missing") from error
        except OSError as error:
            raise StoreError(f"{self.root / key}: {error.strerror}") from error

    def exists(self, key: str) -> bool:
        try:
            return (self.root / key).is_file()
        except OSError as error:
            raise StoreError(f"{self.root / key}: {error.strerror}") from error

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        base = self.root / prefix
        for directory, _, names in os.walk(base):
            for name in names:
                if name.startswith(_TEMPORARY):
                    continue
                file = Path(directory) / name
                try:
                    size = file.stat().st_size
                except FileNotFoundError:
                    continue
                yield file.relative_to(self.root).as_posix(), size

    def folders(self, prefix: str) -> set[str]:
        try:
            with os.scandir(self.root / prefix) as entries:
                return {entry.name for entry in entries if entry.is_dir()}
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except OSError as error:
            raise StoreError(f"{self.root / prefix}: {error.strerror}") from error

    def delete(self, key: str) -> None:
        file = self.root / key
        try:
            file.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise StoreError(f"{file}: cannot be removed: {error.strerror}") from error
        # Directories are not objects: an emptied one goes, as it would on an object store.
        for parent in file.parents:
            if parent == self.root:
                break
            try:
                parent.rmdir()
            except OSError:
                break

    def probe(self) -> None:
        self._sweep()
        # named like a temporary file, so that one left behind by a kill is swept like one
        key = f"{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        first = self.create(key, b"1")
        try:
            second = self.create(key, b"2")
            if not first or second or self.get(key) != b"1":
                raise StoreError(f"{self.url}: exclusive create is not honoured; use another store")
        finally:
            self.delete(key)

    def _sweep(self) -> None:
        """Remove what killed processes of this host left unfinished."""
        ours = f"{_TEMPORARY}{socket.gethostname()}-"
        for directory, _, names in os.walk(self.root):
            for name in names:
                pid = name.removeprefix(ours).split("-")[0]
                if name.startswith(ours) and pid.isdigit() and not _is_alive(int(pid)):
                    (Path(directory) / name).unlink(missing_ok=True)

    def _write_temporary(self, final: Path, data: bytes) -> Path:
        name = f"{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        temporary = final.parent / name
        try:
            with _open_new(temporary) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise StoreError(f"{final}: cannot be written: {self._why(error, len(data))}") from error
        return temporary

    def _why(self, error: OSError, size: int) -> str:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error.strerror or str(error)
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.root).free
            return (
                f"{error.strerror}: {size:,} bytes do not fit, {free:,} are free at {self.root}; make space "
                "and start again, nothing is lost"
            )
        return str(error.strerror)


def _open_new(path: Path) -> BinaryIO:
    # A delete may remove the directory as emptied, again and again, before the file is in it.
    for _ in range(_DIRECTORY_TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(path, "xb")
        except (FileNotFoundError, FileExistsError):
            continue
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "xb")


def _sync_directory(directory: Path) -> None:
    try:
        handle = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return  # the object was deleted meanwhile, and with it its emptied directory
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
