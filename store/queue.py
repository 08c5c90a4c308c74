"""What Redis is used for. Everything here may vanish or go back in time: the store is the truth.

All keys, below one prefix; <scope> is a hash of a URL and, for datasets, the manifest digest:

    <prefix>:dataset:<scope>:todo       sorted set  chunk indices to make, scored by themselves
    <prefix>:dataset:<scope>:claimed    sorted set  chunk index, scored by when its lease ends (ms)
    <prefix>:dataset:<scope>:owners     hash        chunk index -> worker
    <prefix>:dataset:<scope>:repair:…   the same three, for committed chunks that are to be made again
    <prefix>:dataset:<scope>:feeds      hash        run id -> JSON of its current feed
    <prefix>:dataset:<scope>:indexing   string      producer that writes index blocks; expires
    <prefix>:runs:<scope>:pending       sorted set  run id, scored by position
    <prefix>:runs:<scope>:lease:<run>   string      worker that holds the run; expires
    <prefix>:runs:<scope>:feed:<run>:<head>  stream  id <position + 1>-0, field chunk
    <prefix>:presence:<worker>          string      JSON, what the worker is doing; expires

A lease says who works on what. It is a hint: exclusive creates in the store decide.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

import redis
from redis.commands.core import Script

from penstock.common.redis import Client
from penstock.store.order import ReadingOrder, first_chunk

FEED_AHEAD = 4096
"""Entries a feed may hold before feeding pauses."""


def _scope(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@cache
def _source(name: str) -> str:
    return files("penstock.store").joinpath(f"{name}.lua").read_text()


def _script(client: Client, name: str) -> Script:
    script: Script = client.register_script(_source(name))
    return script


class ChunkQueue:
    """Which chunks of a dataset are to be made, and who makes them.

    Args:
        repairs: hand out committed chunks whose objects are damaged, in place of missing ones.
    """

    def __init__(
        self,
        client: Client,
        prefix: str,
        url: str,
        manifest_digest: str,
        worker: str,
        lease_seconds: float,
        repairs: bool = False,
    ) -> None:
        base = _dataset_keys(prefix, url, manifest_digest)
        self._redis = client
        self.feeds_key = f"{base}:feeds"
        self._indexing = f"{base}:indexing"
        base += ":repair" if repairs else ""
        self._todo, self._claimed, self._owners = (f"{base}:{name}" for name in ("todo", "claimed", "owners"))
        self._worker = worker
        self._lease_ms = int(lease_seconds * 1000)
        self._claim = _script(client, "claim")
        self._renew = _script(client, "renew")
        self._release = _script(client, "release")
        self._reconcile = _script(client, "reconcile")

    def reconcile(self, planned: int, committed: set[int]) -> None:
        """Make the queue say what the store says: planned chunks that are not committed.

        What is missing is sent as stretches, so that it is little however many chunks there are.
        """
        keys = [self._todo, self._claimed, self._owners]
        self._reconcile(
            keys=keys, args=[edge for stretch in _missing(planned, committed) for edge in stretch]
        )

    def lease_index(self) -> bool:
        """Whether we are to index commits for a while, and not another producer of the dataset."""
        return bool(self._redis.set(self._indexing, self._worker, nx=True, px=self._lease_ms))

    def ask(self, index: int) -> None:
        """Ask for one chunk, unless it is asked for or being made."""
        if self._redis.zscore(self._claimed, index) is None:
            self._redis.zadd(self._todo, {str(index): index}, nx=True)

    def is_open(self, index: int) -> bool:
        """Whether a chunk is still to be made or being made."""
        return any(self._redis.zscore(key, index) is not None for key in (self._todo, self._claimed))

    def claim(self, limit: int) -> int | None:
        """Lease the lowest chunk index below `limit`, or None if there is none."""
        keys = [self._todo, self._claimed, self._owners]
        found = self._claim(keys=keys, args=[self._worker, self._lease_ms, limit])
        return None if found is None else int(found)

    def renew(self, index: int) -> bool:
        """Prolong the lease of a chunk; False if it is no longer ours."""
        keys = [self._claimed, self._owners]
        return bool(self._renew(keys=keys, args=[self._worker, self._lease_ms, index]))

    def release(self, index: int) -> None:
        """Give a chunk back at once."""
        keys = [self._todo, self._claimed, self._owners]
        self._release(keys=keys, args=[self._worker, index])

    def done(self, index: int) -> None:
        """A chunk is committed: nobody needs to make it."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.zrem(self._todo, index)
            pipe.zrem(self._claimed, index)
            pipe.hdel(self._owners, index)
            pipe.execute()

    def claims(self) -> dict[int, str]:
        """Chunk index -> worker, for status."""
        return {int(index): owner for index, owner in self._redis.hgetall(self._owners).items()}

    def waiting(self) -> int:
        """How many chunks are asked for and not claimed, for status."""
        return int(self._redis.zcard(self._todo))


def _missing(planned: int, committed: set[int]) -> list[tuple[int, int]]:
    """First and last of each stretch of indices below `planned` that are not committed, ascending."""
    edges = [-1, *sorted(index for index in committed if index < planned), planned]
    return [(a + 1, b - 1) for a, b in pairwise(edges) if b - a > 1]


def _dataset_keys(prefix: str, url: str, manifest_digest: str) -> str:
    return f"{prefix}:dataset:{_scope(url, manifest_digest)}"


def repairs_wanted(client: Client, prefix: str, url: str, manifest_digest: str) -> bool:
    """Whether somebody waits for a damaged chunk of a dataset to be made again."""
    base = _dataset_keys(prefix, url, manifest_digest)
    return bool(client.exists(f"{base}:repair:todo", f"{base}:repair:claimed"))


@dataclass(frozen=True)
class FeedSpec:
    """Everything needed to feed a lineage: its stream, where it started, its reading order.

    Attributes:
        sizes: chunks in each dataset that the run reads.
        part: which of these a registration of the feed is for.
    """

    key: str
    start: int
    sizes: tuple[int, ...]
    epochs: int
    window_chunks: int
    seed: int
    part: int = 0

    @property
    def order(self) -> ReadingOrder:
        return ReadingOrder(self.sizes, self.epochs, self.window_chunks, self.seed)

    def among_all(self, is_committed: Callable[[int], bool]) -> Callable[[int], bool]:
        """From "is this index of the part committed?" the same question by a chunk's number.

        Who knows one dataset only does not know of the other ones' chunks: the answer is no.
        """
        first = first_chunk(self.sizes, self.part)
        own = range(first, first + self.sizes[self.part])
        return lambda chunk: chunk in own and is_committed(chunk - first)


class Feed:
    """The stream of (position, chunk number) of one lineage, in reading order without gaps."""

    def __init__(self, client: Client, spec: FeedSpec) -> None:
        self.spec = spec
        self._redis = client
        self._order = spec.order
        self._open = _script(client, "open_feed")
        self._add = _script(client, "feed")

    def open(self) -> None:
        """Make the stream if it is not there."""
        self._open(keys=[self.spec.key], args=[self.spec.start])

    def rebuild(self, position: int) -> None:
        """Throw the stream away and start it again at a position."""
        self._redis.delete(self.spec.key)
        self._open(keys=[self.spec.key], args=[position])

    def add(self, position: int, chunk: int) -> bool:
        """Add a position if its predecessor is the last one; False if it was not added."""
        return int(self._add(keys=[self.spec.key], args=[position, chunk])) == 1

    def advance(self, is_committed: Callable[[int], bool]) -> int:
        """Feed every following position whose chunk is committed; returns how many were fed.

        Anyone may call this at any time. It stops at the first chunk that is not committed.
        """
        try:
            info = self._redis.xinfo_stream(self.spec.key)
        except redis.ResponseError:
            return 0  # no such stream: its worker opens it
        position = int(str(info["last-generated-id"]).split("-")[0])
        room = FEED_AHEAD - int(info["length"])
        fed = 0
        while fed < room and position < self._order.n_positions:
            chunk = self._order.chunk_at(position)
            if not is_committed(chunk) or not self.add(position, chunk):
                break
            position, fed = position + 1, fed + 1
        return fed

    def read(self, position: int, block_ms: int) -> list[tuple[int, int]]:
        """(position, chunk number) entries from a position on, waiting at most `block_ms`.

        Raises:
            redis.RedisError: the server does not answer.
        """
        answer = self._redis.xread({self.spec.key: f"{position}-0"}, count=256, block=block_ms)
        entries = answer[0][1] if answer else []
        return [(int(entry.split("-")[0]) - 1, int(fields["chunk"])) for entry, fields in entries]

    def length(self) -> int:
        """Entries fed and not yet trimmed."""
        return int(self._redis.xlen(self.spec.key))

    def trim(self, position: int) -> None:
        """Drop entries before a position: they are in a committed head."""
        self._redis.xtrim(self.spec.key, minid=f"{position + 1}-0", approximate=False)

    def delete(self) -> None:
        self._redis.delete(self.spec.key)


class RunQueue:
    """Which runs wait for a worker, and who holds which."""

    def __init__(
        self,
        client: Client,
        prefix: str,
        runs_url: str,
        worker: str,
        lease_seconds: float,
    ) -> None:
        self._redis = client
        self._base = f"{prefix}:runs:{_scope(runs_url)}"
        self._pending = f"{self._base}:pending"
        self._worker = worker
        self._lease_ms = int(lease_seconds * 1000)
        self._lease = _script(client, "lease_run")
        self._keep = _script(client, "keep_lease")

    def add(self, run_id: str, position: int) -> None:
        """Say that a run has work left, or how far it is."""
        self._redis.zadd(self._pending, {run_id: position})

    def remove(self, run_id: str) -> None:
        """A run has ended."""
        self._redis.zrem(self._pending, run_id)

    def pending(self) -> dict[str, int]:
        """Run id -> position, least far first."""
        found = self._redis.zrange(self._pending, 0, -1, withscores=True)
        return {run_id: int(score) for run_id, score in found}

    def lease(self, leave_out: Iterable[str] = ()) -> str | None:
        """Lease the pending run that is least far on, unheld and not left out, or None."""
        args: list[str | int] = [self._worker, self._lease_ms, f"{self._base}:lease:", *leave_out]
        found = self._lease(keys=[self._pending], args=args)
        return None if found is None else str(found)

    def renew(self, run_id: str) -> bool:
        """Prolong our lease; False if it is no longer ours."""
        return self._keep_lease(run_id, self._lease_ms)

    def release(self, run_id: str) -> None:
        self._keep_lease(run_id, 0)

    def holder(self, run_id: str) -> str | None:
        found: str | None = self._redis.get(f"{self._base}:lease:{run_id}")
        return found

    def holders(self, run_ids: list[str]) -> dict[str, str | None]:
        """`holder` of several runs, in one request."""
        if not run_ids:
            return {}
        found = self._redis.mget([f"{self._base}:lease:{run_id}" for run_id in run_ids])
        return dict(zip(run_ids, found, strict=True))

    def feed_key(self, run_id: str, head: int) -> str:
        """The stream of the lineage that starts with takeover head `head`."""
        return f"{self._base}:feed:{run_id}:{head}"

    def _keep_lease(self, run_id: str, milliseconds: int) -> bool:
        key = f"{self._base}:lease:{run_id}"
        return bool(self._keep(keys=[key], args=[self._worker, milliseconds]))


def register_feed(client: Client, feeds_key: str, run_id: str, spec: FeedSpec) -> None:
    """Let whoever commits chunks of the spec's part know that a lineage reads it."""
    client.hset(feeds_key, run_id, json.dumps(asdict(spec)))


def registered_feed(client: Client, feeds_key: str, run_id: str) -> Feed | None:
    """The feed registered for a run, if any."""
    found = client.hget(feeds_key, run_id)
    return None if found is None else Feed(client, _spec(found))


def remove_feed(client: Client, feeds_key: str, run_id: str) -> None:
    """A run has ended, or another lineage begins: its feed is of no use."""
    feed = registered_feed(client, feeds_key, run_id)
    if feed is not None:
        feed.delete()
    client.hdel(feeds_key, run_id)


def registered_feeds(client: Client, feeds_key: str) -> list[Feed]:
    """All feeds that a new chunk of the dataset may advance."""
    return [Feed(client, _spec(value)) for value in client.hgetall(feeds_key).values()]


def _spec(value: str) -> FeedSpec:
    fields = json.loads(value)
    return FeedSpec(**fields | {"sizes": tuple(fields["sizes"])})


class Presence:
    """Tells `status` who is there; forgotten a while after the last word."""

    def __init__(self, client: Client, prefix: str, worker: str) -> None:
        self._redis = client
        self._prefix = f"{prefix}:presence:"
        self._worker = worker

    def tell(self, what: dict[str, Any], seconds: float = 30.0) -> None:
        self._redis.set(self._prefix + self._worker, json.dumps(what), px=int(seconds * 1000))

    def leave(self) -> None:
        self._redis.delete(self._prefix + self._worker)

    def everyone(self) -> dict[str, dict[str, Any]]:
        """Worker -> what it last said."""
        keys = list(self._redis.scan_iter(f"{self._prefix}*", count=1000))
        values = self._redis.mget(keys) if keys else []
        return {
            key.removeprefix(self._prefix): json.loads(value)
            for key, value in zip(keys, values, strict=True)
            if value
        }
