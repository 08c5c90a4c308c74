"""What must hold at every moment of a schedule, and at its end. Looks at the stored bytes only."""

import hashlib
import json
from typing import Any

import numpy as np
import safetensors.numpy

from penstock.store.arrays import BFLOAT16
from penstock.store.manifest import Manifest
from penstock.store.records import crc32c
from penstock.trainer.config import RunConfig
from simulation.model import D_IN, HOOK, Row, TinySource, digest, expected_rows
from simulation.redis import MemoryRedis
from simulation.s3 import MemoryS3
from simulation.values import Stream

RUNS = "house/runs/"
NEVER_CHANGE = (
    "commits/",
    "manifest.",
    "readers/",
    "floor/",
    "quarantine/",
    "detached/",
    "config.",
    "/heads/",
)


def _prefix(url: str) -> str:
    """Where the keys of a dataset begin."""
    return url.removeprefix("s3://") + "/"


class Broken(AssertionError):
    """An invariant does not hold."""


class Invariants:
    """Watches every write and removal."""

    def __init__(self, s3: MemoryS3, redis: MemoryRedis, manifests: dict[str, Manifest], plan: Any) -> None:
        self._s3 = s3
        self._redis = redis
        self._manifests = manifests
        self._plan = plan
        self._configs: dict[str, RunConfig] = {}
        self._rows: dict[str, dict[int, list[Row]]] = {dataset: {} for dataset in manifests}
        self._heads: dict[str, dict[str, Any]] = {}
        s3.on_write.append(self._written)
        s3.on_delete.append(self._deleted)
        self._wake_readers = redis.database._on_entry
        redis.database._on_entry = self._fed

    def submitted(self, config: RunConfig) -> None:
        """A run exists from now on."""
        self._configs[config.settings.name] = config

    def everything_is_done(self, names: set[str]) -> bool:
        """Whether the datasets are complete and indexed, and these runs have ended."""
        made = (
            f"{dataset}{key}" in self._s3.objects
            for dataset, manifest in self._manifests.items()
            for key in [*(f"commits/0/{i}.json" for i in range(manifest.n_chunks)), "index/0.safetensors"]
        )
        return all(self._ended(self._configs[name].run_id) for name in sorted(names)) and all(made)

    # At every change

    def _fed(self, key: str) -> None:
        """A feed holds consecutive positions, each with the chunk that stands there."""
        stream = self._redis.database.values[key]
        run_id = key.split(":feed:")[1].split(":")[0]
        config = next((config for config in self._configs.values() if config.run_id == run_id), None)
        if config is None:  # its submitter does not know yet that it exists
            return self._wake_readers(key)
        assert isinstance(stream, Stream)
        positions = [stream_id[0] - 1 for stream_id, _ in stream.entries]
        chunks = [["chunk", str(config.order.chunk_at(position))] for position in positions]
        if positions != list(range(positions[0], positions[0] + len(positions))):
            self._s3.scheduler.fail(Broken(f"{key} has gaps: {positions}"))
        if [fields for _, fields in stream.entries] != chunks:
            self._s3.scheduler.fail(Broken(f"{key} has other chunks than its run reads: {stream.entries}"))
        numbered = [
            f"{_prefix(pin.url)}commits/0/{i}.json" for pin in config.datasets for i in range(pin.n_chunks)
        ]
        for _, fields in stream.entries:
            if numbered[int(fields[1])] not in self._s3.objects:
                self._s3.scheduler.fail(Broken(f"{key} has chunk {fields[1]}, which is not committed"))
        self._wake_readers(key)

    def _written(self, key: str, old: bytes | None, new: bytes, process: str) -> None:
        changed = old not in (None, new) and key.endswith((".json", ".copy"))
        if changed and any(part in key for part in NEVER_CHANGE):
            raise Broken(f"{process} changed {key}")
        dataset, is_commit, _ = key.partition("commits/")
        if is_commit:
            self._committed(dataset, json.loads(new))
        elif "/index/" in key:
            self._indexed(key.partition("index/")[0], old, new)
        elif "/heads/" in key and key.endswith(".json"):
            self._head_made(key, json.loads(new))
        if "/activations.zarr/tokens/c/" in key:
            self._budget_holds()

    def _committed(self, dataset: str, commit: dict[str, Any]) -> None:
        """The objects that a commit describes are there, with these bytes."""
        for path, described in commit["objects"].items():
            suffix = "/0" if path.startswith("acts/") else ""
            found = self._s3.objects.get(f"{dataset}activations.zarr/{path}/c/{commit['index']}{suffix}")
            if found is None:
                raise Broken(f"chunk {commit['index']} is committed without {path}")
            if (len(found.data), crc32c(found.data[:-4])) != (described["size"], described["crc32c"]):
                raise Broken(f"chunk {commit['index']} is committed with another {path} than is stored")
            if path.startswith("acts/"):
                values = np.frombuffer(found.data[:-4], BFLOAT16).reshape(-1, D_IN).astype(int)
                self._rows[dataset][commit["index"]] = values[: commit["rows"]].tolist()

    def _indexed(self, dataset: str, old: bytes | None, new: bytes) -> None:
        """An index block says what the commits of all chunks say, and never changes."""
        if old not in (None, new):
            raise Broken("an index block was changed")
        found = safetensors.numpy.load(new)
        for place in range(self._manifests[dataset].n_chunks):
            stored = self._s3.objects.get(f"{dataset}commits/0/{place}.json")
            if stored is None:
                raise Broken(f"chunk {place} is indexed and not committed")
            commit = json.loads(stored.data)
            told = {"rows": commit["rows"]}
            for kind, of in (("objects", ("size", "crc32c")), ("moments", commit["moments"][HOOK])):
                told |= {
                    f"{name}/{path}": described[name]
                    for path, described in commit[kind].items()
                    for name in of
                }
            if told != {name: column[place] for name, column in found.items()}:
                raise Broken(f"the index block says something else than the commit of chunk {place}")

    def _head_made(self, key: str, head: dict[str, Any]) -> None:
        """Heads are dense, and what a head names is there."""
        run = key.split("/heads/")[0]
        before = self._heads.get(run)
        if before is None or head["n"] >= before["n"]:
            self._heads[run] = head
        if head["n"] and f"{run}/heads/{head['n'] - 1}.json" not in self._s3.objects:
            raise Broken(f"{key} was made before the head before it")
        self._check_checkpoint(run, head)

    def _check_checkpoint(self, run: str, head: dict[str, Any]) -> None:
        for name, file in head["checkpoint"].items():
            found = self._s3.objects.get(f"{run}/{file['key']}")
            if found is None or hashlib.sha256(found.data).hexdigest() != file["sha256"]:
                raise Broken(f"head {head['n']} of {run} names a checkpoint of {name} that is not there")

    def _budget_holds(self) -> None:
        if self._plan.budget is None:
            return
        # what keeps only a window is the only dataset there is
        stored = sum("/activations.zarr/tokens/c/" in key for key in self._s3.objects)
        # one in flight per producer, one more for each that died over its own
        allowed = self._plan.budget + 2 * self._plan.producers
        if stored > allowed:
            raise Broken(f"{stored} chunks are stored, and the budget is {self._plan.budget}")

    def _deleted(self, key: str, old: bytes, process: str) -> None:
        if "/checkpoints/" in key:
            run = key.split("/checkpoints/")[0]
            newest = self._newest(run)
            if newest is not None and any(f"{run}/{f['key']}" == key for f in newest["checkpoint"].values()):
                raise Broken(f"{process} removed {key}, which the newest head needs")
        elif "/activations.zarr/" in key and self._plan.retention == "keep":
            raise Broken(f"{process} removed {key}")

    def _newest(self, run: str) -> dict[str, Any] | None:
        return self._heads.get(run)

    def _ended(self, run_id: str) -> bool:
        head = self._newest(RUNS + run_id)
        return head is not None and head["status"] != "running"

    # At the end

    def at_the_end(self) -> None:
        """Datasets and weights are those of an undisturbed run."""
        if not self._plan.mixed:
            for dataset, manifest in self._manifests.items():
                for index, rows in self._rows[dataset].items():
                    plain = TinySource(manifest, 0).chunk(index).acts[HOOK].astype(int).tolist()
                    if sorted(rows) != sorted(plain):
                        raise Broken(f"chunk {index} of {dataset} is not what its plan says")
        for config in self._configs.values():
            self._check_run(config)

    def _check_run(self, config: RunConfig) -> None:
        run = RUNS + config.run_id
        head = self._newest(run)
        assert head is not None
        if head["status"] != "done":
            raise Broken(f"{config.run_id} is {head['status']}: {head['reason']}")
        self._check_checkpoint(run, head)
        seen = json.loads(self._s3.objects[f"{run}/{head['checkpoint']['sae/tiny']['key']}"].data)
        read = [self._rows[_prefix(pin.url)] for pin in config.datasets]
        stored = [[rows for _, rows in sorted(dataset.items())] for dataset in read]
        wanted = expected_rows(config.settings, config.start, stored)
        if sorted(seen) != sorted(wanted):
            raise Broken(f"{config.run_id} saw {len(seen)} rows, not the {len(wanted)} it had to, each once")
        if digest(seen) != digest(wanted):
            raise Broken(f"the weights of {config.run_id} are not those of an undisturbed run")
