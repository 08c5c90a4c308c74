"""The object store contract. One primitive carries every guarantee: `create`.

`create(key, data)` makes an object that did not exist, atomically and whole, or says that it exists.
Datasets, commits and heads are built on nothing else. Keys are relative POSIX paths below the
store's URL.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from urllib.parse import urlsplit

from penstock.common.errors import DamagedObject, StoreError
from penstock.store.layout import copy_key
from penstock.store.records import Record, decode_record, encode_record

MAX_CREATE_BYTES = 64 * 1024 * 1024
"""Larger objects become multipart uploads on S3, whose condition some servers ignore."""


class ObjectStore(ABC):
    """Objects below one URL. Safe to use from several threads."""

    url: str

    def create(self, key: str, data: bytes) -> bool:
        """Make an object exclusively.

        Returns:
            True if this call made it, False if an object of that key exists (nothing was changed).

        Raises:
            StoreError: the store cannot be written.
            ValueError: `data` is 64 MiB or larger.
        """
        if len(data) >= MAX_CREATE_BYTES:
            raise ValueError(f"{key}: {len(data)} bytes is too large to create exclusively")
        return self._create(key, data)

    @abstractmethod
    def _create(self, key: str, data: bytes) -> bool: ...

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write an object whole, replacing what was there. Never conditional."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Read an object.

        Raises:
            ObjectMissing: there is none.
        """

    @abstractmethod
    def exists(self, key: str) -> bool: ...

    @abstractmethod
    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size) of all objects below a prefix that ends in '/' (or ''), in no promised order.

        A listing is a hint: settle it with `get` or `exists`.
        """

    def folders(self, prefix: str) -> set[str]:
        """Names `<name>` of which there are objects `<prefix><name>/…`; `prefix` as for `list`. A hint, too.

        Backends that can tell without listing these objects do so.
        """
        below = (key.removeprefix(prefix) for key, _ in self.list(prefix))
        return {key.split("/")[0] for key in below if "/" in key}

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; it is no error if it is not there."""

    @abstractmethod
    def probe(self) -> None:
        """Check that the store can be written and honours exclusive create; leaves nothing behind.

        Raises:
            StoreError: it does not; the message says why.
        """

    def create_record(self, key: str, record: Record) -> bool:
        """`create` for a JSON record."""
        return self.create(key, encode_record(record))

    def get_record(self, key: str) -> Record:
        """Read and check a JSON record.

        Raises:
            ObjectMissing, DamagedObject
        """
        return decode_record(self.get(key), f"{self.url}/{key}")

    def create_guarded(self, key: str, record: Record) -> bool:
        """`create` for a JSON record that nothing else could tell again: a copy lies beside it.

        The copy comes first and decides between writers, so that no record is ever without one. Whoever
        finds a copy whose record is missing completes it: its writer died in between, or it was lost.
        Whoever finds a record that lost its copy gives it back, unless the record is damaged itself.

        Returns:
            Whether the record that is there now is this one.
        """
        data = encode_record(record)
        if self.exists(key):
            there = self.get(key)
            if not self.exists(copy_key(key)):
                with contextlib.suppress(DamagedObject):
                    decode_record(there, f"{self.url}/{key}")
                    self.create(copy_key(key), there)
            return there == data
        if not self.create(copy_key(key), data):
            first = self.get(copy_key(key))
            decode_record(first, f"{self.url}/{copy_key(key)}")
            self._complete(key, first)
            return first == data
        return self._complete(key, data)

    def put_guarded(self, key: str, record: Record) -> None:
        """`put` for a JSON record, and its copy."""
        data = encode_record(record)
        self.put(copy_key(key), data)
        self.put(key, data)

    def _complete(self, key: str, data: bytes) -> bool:
        if self.create(key, data):
            return True
        there = self.get(key)
        if there != data:
            # the copy had been lost; the record is what counts
            decode_record(there, f"{self.url}/{key}")
            self.put(copy_key(key), there)
        return there == data

    def create_same(self, key: str, data: bytes) -> None:
        """Make an object that can only have one content.

        Raises:
            DamagedObject: another content is there.
        """
        if not self.create(key, data) and self.get(key) != data:
            raise DamagedObject(f"{self.url}/{key} exists with other content than it must have")


def open_store(url: str) -> ObjectStore:
    """The store at a URL: a local path, `file://`, `s3://bucket/prefix`, or one that fsspec reaches.

    Raises:
        StoreError: the URL's scheme has no backend here.
    """
    try:
        scheme = urlsplit(url).scheme if "://" in url else "file"
    except ValueError as error:
        raise StoreError(f"{url}: not a URL ({error})") from error
    if scheme == "file":
        from penstock.store.local import LocalStore

        return LocalStore(url.removeprefix("file://"))
    if scheme == "s3":
        from penstock.store.s3 import S3Store

        return S3Store(url)
    from penstock.store.fsspec_store import FsspecStore

    return FsspecStore(url)
