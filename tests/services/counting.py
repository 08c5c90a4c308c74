"""A store that counts what is asked of it."""

from collections.abc import Iterator

from penstock.store.objects import ObjectStore


class CountingStore(ObjectStore):
    """Passes everything on, and keeps a note of each operation as (name, key)."""

    def __init__(self, store: ObjectStore) -> None:
        self.url = store.url
        self.asked: list[tuple[str, str]] = []
        self.listed = 0
        """Keys that listings brought."""
        self._store = store

    def take(self) -> list[tuple[str, str]]:
        """What was asked since the last call."""
        asked, self.asked = self.asked, []
        return asked

    def _create(self, key: str, data: bytes) -> bool:
        self.asked.append(("create", key))
        return self._store.create(key, data)

    def put(self, key: str, data: bytes) -> None:
        self.asked.append(("put", key))
        self._store.put(key, data)

    def get(self, key: str) -> bytes:
        self.asked.append(("get", key))
        return self._store.get(key)

    def exists(self, key: str) -> bool:
        self.asked.append(("exists", key))
        return self._store.exists(key)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        self.asked.append(("list", prefix))
        for found in self._store.list(prefix):
            self.listed += 1
            yield found

    def folders(self, prefix: str) -> set[str]:
        self.asked.append(("folders", prefix))
        return self._store.folders(prefix)

    def delete(self, key: str) -> None:
        self.asked.append(("delete", key))
        self._store.delete(key)

    def probe(self) -> None:
        self._store.probe()
