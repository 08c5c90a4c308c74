"""Results that are kept part by part, so that an evaluation goes on where it was ended."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from penstock.common.errors import DataError, ModelError, ObjectMissing
from penstock.store.objects import ObjectStore

Record = dict[str, Any]


class Parts:
    """Records by name below `parts/` of a store.

    A record counts only for the very inputs that it was made from; otherwise it is made again.

    Args:
        inputs: whatever results depend on, as JSON: weights' digests, text, settings, versions.
    """

    def __init__(self, store: ObjectStore, inputs: Mapping[str, Any]) -> None:
        self._store = store
        self._made_from = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def part(self, name: str, compute: Callable[[], Record]) -> Record:
        """The record of that name: as it was kept, or computed now and kept. JSON values only.

        Raises:
            ModelError: it holds a number that is not finite.
        """
        key = f"parts/{name}.json"
        kept = self._kept(key)
        if kept is not None:
            return kept
        record = compute()
        try:
            text = json.dumps({"made_from": self._made_from, "record": record}, allow_nan=False)
        except ValueError as error:
            raise ModelError(
                f"{name}: a figure is not finite, so the model or a dictionary computes infinities; try "
                "model.dtype float32"
            ) from error
        self._store.put(key, text.encode())
        # what is used now is what a later call would read
        found: Record = json.loads(text)["record"]
        return found

    def _kept(self, key: str) -> Record | None:
        try:
            found = json.loads(self._store.get(key))
        except (ObjectMissing, DataError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("made_from") != self._made_from:
            return None
        record: Record = found["record"]
        return record
