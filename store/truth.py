"""The ground truth of a toy dataset: the features that its rows are made of.

It lies beside the manifest, whose `source.weights_sha256` is its digest, so that nothing else can be taken
for it. A copy lies beside it: without the config that made it, nothing could tell it again.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.common.errors import DamagedObject, DataError
from penstock.store.dataset import Dataset
from penstock.store.layout import TRUTH, TRUTH_COPY
from penstock.store.manifest import TOY, Manifest
from penstock.store.objects import ObjectStore


@dataclass(frozen=True)
class Truth:
    """What the rows of a toy dataset are made of.

    Attributes:
        features: [G, d] float32, directions of unit norm.
        probabilities: [G] float64, how likely each is active in a row; means, where they are drawn anew.
        scales: [G] float64, what its activity is multiplied by.
        settings: what made it, as JSON has it.
    """

    features: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float64]
    scales: npt.NDArray[np.float64]
    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of the settings as canonical JSON, a newline, and the arrays' values."""
        told = hashlib.sha256(_canonical(self.settings).encode() + b"\n")
        for name, dtype in _ARRAYS.items():
            told.update(np.ascontiguousarray(getattr(self, name), dtype).tobytes())
        return told.hexdigest()

    def encode(self) -> bytes:
        """As a safetensors file."""
        from safetensors.numpy import save

        arrays = {name: np.ascontiguousarray(getattr(self, name), dtype) for name, dtype in _ARRAYS.items()}
        return bytes(save(arrays, {"settings": _canonical(self.settings)}))


_ARRAYS = {"features": "<f4", "probabilities": "<f8", "scales": "<f8"}


def load_truth(dataset: Dataset) -> Truth | None:
    """The ground truth of a toy dataset; None for any other.

    Raises:
        ObjectMissing: it is not there (yet).
        DamagedObject: it is not what the manifest pins.
    """
    if dataset.manifest.source.kind != TOY:
        return None
    return _load(dataset.store, TRUTH, dataset.manifest)


def store_truth(store: ObjectStore, manifest: Manifest, truth: Truth) -> None:
    """Store a dataset's ground truth and its copy, unless they are there.

    Raises:
        DamagedObject: what is there is not what the manifest pins.
        ValueError: neither is this.
    """
    if truth.digest != manifest.source.weights_sha256:
        raise ValueError("the ground truth is not the manifest's")
    data = truth.encode()
    for key in (TRUTH_COPY, TRUTH):
        if not store.create(key, data):
            _load(store, key, manifest)


def truth_faults(dataset: Dataset) -> Iterator[tuple[str, partial[None] | None]]:
    """What is wrong with the ground truth or its copy, and what restores it, if anything does."""
    if dataset.manifest.source.kind != TOY:
        return
    store = dataset.store
    whole: list[bytes] = []
    problems: dict[str, str] = {}
    for key in (TRUTH, TRUTH_COPY):
        try:
            _load(store, key, dataset.manifest)
            whole.append(store.get(key))
        except DataError as error:
            problems[key] = str(error)
    for key, problem in problems.items():
        yield problem, partial(store.put, key, whole[0]) if whole else None


def _load(store: ObjectStore, key: str, manifest: Manifest) -> Truth:
    data, name = store.get(key), f"{store.url}/{key}"
    try:
        truth = _decode(data)
    except Exception as error:  # safetensors raises several kinds of its own
        raise DamagedObject(f"{name} is damaged: it cannot be read") from error
    if truth.digest != manifest.source.weights_sha256:
        raise DamagedObject(f"{name} is damaged: it is not the ground truth that the manifest pins")
    return truth


def _decode(data: bytes) -> Truth:
    from safetensors.numpy import load

    arrays = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return Truth(
        **{name: arrays[name] for name in _ARRAYS}, settings=json.loads(header["__metadata__"]["settings"])
    )


def _canonical(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
