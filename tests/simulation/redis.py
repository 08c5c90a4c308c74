"""Redis in memory, with a client like redis-py's.

A request gives way before its commands run and again before its reply arrives. A request that fails is
tried again by the policy of `penstock.common.retries`, as the real client does, so a script whose reply
was lost runs twice.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any

import redis

from penstock.common import retries
from simulation.commands import Database, Snapshot
from simulation.faults import Faults, failing_first
from simulation.lua import run_script
from simulation.scheduler import WALL_START, Actor, Scheduler

SOCKET_TIMEOUT = 10.0
"""Seconds after which the real client gives a request up."""

Command = tuple[str, ...]
Parse = Callable[[Any], Any]


class MemoryRedis:
    """One server. It may lose everything, go back in time, or not answer for a while.

    Attributes:
        database: its data, for looking.
    """

    def __init__(self, scheduler: Scheduler, faults: Faults | None = None) -> None:
        self.scheduler = scheduler
        self.faults = faults or Faults(scheduler)
        self.database = Database(self._now, self._wake_readers)
        self._scripts: dict[str, str] = {}
        self._readers: list[Actor] = []
        self._down_until = 0.0
        self._outages = 0

    def client(self) -> "Client":
        """A client. Whoever calls it is whose requests these are."""
        return Client(self)

    def wipe(self) -> None:
        """FLUSHALL: everything is gone."""
        self.scheduler.note("redis loses everything")
        self.database.execute("FLUSHALL")

    def snapshot(self) -> Snapshot:
        """All data as of now, for `restore`."""
        return self.database.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back in time."""
        self.scheduler.note("redis goes back in time")
        self.database.restore(snapshot)

    def down(self, seconds: float) -> None:
        """Answer nobody for a while; requests under way fail."""
        self.scheduler.note(f"redis is down for {seconds:.3f} s")
        self._down_until = self.scheduler.clock + seconds
        self._outages += 1
        self._wake_readers("")

    def up(self) -> None:
        """Answer again."""
        self._down_until = 0.0

    def script(self, source: str) -> str:
        """Know a script; returns its digest."""
        digest = _digest(source)
        self._scripts[digest] = source
        return digest

    def send(self, commands: list[Command], atomic: bool = True) -> list[Any]:
        """Run commands and return their raw replies, errors among them.

        Raises:
            redis.ConnectionError, redis.TimeoutError: several tries failed.
        """
        try:
            return self._attempt(commands, atomic)
        except (redis.ConnectionError, redis.TimeoutError) as error:
            failure = error
        policy = retries.retrying(_is_transient, lambda _: None, self.scheduler.sleep, retries.REDIS)
        return policy(failing_first(failure, lambda: self._attempt(commands, atomic)))

    def _attempt(self, commands: list[Command], atomic: bool) -> list[Any]:
        scheduler = self.scheduler
        scheduler.request(commands[0][:3])
        self._check_up()
        outages, outcome = self._outages, self.faults.outcome()
        if outcome == "slow":
            scheduler.sleep(min(self.faults.slowness(), SOCKET_TIMEOUT), "slow redis")
            self._check_outage(outages)
        elif outcome in ("refused", "late"):
            if outcome == "late":
                scheduler.note("late redis request")
                scheduler.later(self.faults.lateness(), lambda: self._land(commands))
            self._refuse()
        if not atomic and len(commands) > 1:
            replies = self._run_apart(commands, outages, broken=outcome == "lost")
        elif commands[0][0] == "XREAD" and len(commands) == 1:
            replies = [self._read(commands[0], outages)]
        else:
            replies = self._run_all(commands)
        scheduler.pause("redis replies")
        if outcome == "lost":
            scheduler.note(f"lost reply of {commands[0][:3]}")
            raise redis.ConnectionError("simulated: the reply is lost")
        self._check_outage(outages)
        return replies

    def _refuse(self) -> None:
        if self.scheduler.random.random() < 0.5:
            self.scheduler.note("redis refuses")
            raise redis.ConnectionError("simulated: connection refused")
        self.scheduler.sleep(SOCKET_TIMEOUT, "redis is silent")
        raise redis.TimeoutError("simulated: timeout")

    def _check_up(self) -> None:
        if self.scheduler.clock < self._down_until:
            raise redis.ConnectionError("simulated: the server is down")

    def _check_outage(self, outages: int) -> None:
        if self._outages != outages:
            raise redis.ConnectionError("simulated: the connection is broken")

    def _land(self, commands: list[Command]) -> None:
        """Run commands whose sender no longer listens."""
        self._run_all(commands)

    def _run_all(self, commands: list[Command]) -> list[Any]:
        return [self._run(command) for command in commands]

    def _run_apart(self, commands: list[Command], outages: int, broken: bool) -> list[Any]:
        """Run a pipeline without a transaction: others come in between, and it may break off."""
        draw = self.scheduler.random.random
        end = int(draw() * (len(commands) + 1)) if broken else len(commands)
        replies = []
        for place, command in enumerate(commands[:end]):
            # a server takes in many commands at once, so it is rarely interrupted
            if place and draw() < 2.0 / len(commands):
                self.scheduler.pause("within a pipeline")
                self._check_outage(outages)
            replies.append(self._run(command))
        return replies

    def _run(self, command: Command) -> Any:
        try:
            if command[0] == "EVALSHA":
                keys = int(command[2]) + 3
                source = self._scripts[command[1]]
                return run_script(source, self.database, list(command[3:keys]), list(command[keys:]))
            return self.database.execute(*command)
        except redis.ResponseError as error:
            return error

    def _read(self, command: Command, outages: int) -> Any:
        """XREAD, waiting for data as long as BLOCK says."""
        scheduler = self.scheduler
        if "BLOCK" not in command or scheduler.actor is None:
            return self._run(command)
        milliseconds = int(command[command.index("BLOCK") + 1])
        end = scheduler.clock + (milliseconds / 1000 if milliseconds else float("inf"))
        while (reply := self._run(command)) is None and scheduler.clock < end:
            left = end - scheduler.clock
            scheduler.wait(self._readers, left if milliseconds else None, command[:3])
            self._check_outage(outages)
        return reply

    def _wake_readers(self, key: str) -> None:
        for actor in self._readers:
            self.scheduler.wake(actor)

    def _now(self) -> int:
        return int((WALL_START + self.scheduler.clock) * 1_000_000)


class _Commands:
    """redis-py's methods, as far as they are used. `_send` runs a command or queues it."""

    _server: MemoryRedis

    def _send(self, command: Command, parse: Parse) -> Any:
        raise NotImplementedError

    def execute_command(self, *arguments: object) -> Any:
        """Any command, with its raw reply."""
        return self._send(_texts(*arguments), _as_is)

    # Scripts

    def register_script(self, source: str) -> "Script":
        return Script(self, source)

    def evalsha(self, digest: str, number_of_keys: int, *arguments: object) -> Any:
        return self._send(("EVALSHA", digest, str(number_of_keys), *_texts(*arguments)), _as_is)

    def eval(self, source: str, number_of_keys: int, *arguments: object) -> Any:
        return self.evalsha(self._server.script(source), number_of_keys, *arguments)

    def script_load(self, source: str) -> str:
        return self._server.script(source)

    def script_flush(self) -> bool:
        return True  # a script that is gone is loaded again by its caller: nothing to be seen

    # Keys

    def ping(self) -> Any:
        return self._send(("PING",), bool)

    def time(self) -> Any:
        return self._send(("TIME",), lambda reply: (int(reply[0]), int(reply[1])))

    def delete(self, *keys: str) -> Any:
        return self._send(("DEL", *keys), _as_is)

    def exists(self, *keys: str) -> Any:
        return self._send(("EXISTS", *keys), _as_is)

    def type(self, key: str) -> Any:
        return self._send(("TYPE", key), str)

    def keys(self, pattern: str = "*") -> Any:
        return self._send(("KEYS", pattern), _as_is)

    def rename(self, old: str, new: str) -> Any:
        return self._send(("RENAME", old, new), bool)

    def expire(self, key: str, seconds: int) -> Any:
        return self._send(("EXPIRE", key, str(seconds)), bool)

    def pexpire(self, key: str, milliseconds: int) -> Any:
        return self._send(("PEXPIRE", key, str(milliseconds)), bool)

    def pexpireat(self, key: str, moment: int) -> Any:
        return self._send(("PEXPIREAT", key, str(moment)), bool)

    def persist(self, key: str) -> Any:
        return self._send(("PERSIST", key), bool)

    def ttl(self, key: str) -> Any:
        return self._send(("TTL", key), _as_is)

    def pttl(self, key: str) -> Any:
        return self._send(("PTTL", key), _as_is)

    def flushall(self) -> Any:
        return self._send(("FLUSHALL",), bool)

    def dbsize(self) -> Any:
        return self._send(("DBSIZE",), _as_is)

    # Strings

    def get(self, key: str) -> Any:
        return self._send(("GET", key), _as_is)

    def mget(self, keys: Iterable[str]) -> Any:
        return self._send(("MGET", *keys), _as_is)

    def set(
        self,
        key: str,
        value: object,
        ex: int | None = None,
        px: int | None = None,
        nx: bool = False,
        xx: bool = False,
        keepttl: bool = False,
        get: bool = False,
    ) -> Any:
        options = [
            *(("EX", str(ex)) if ex is not None else ()),
            *(("PX", str(px)) if px is not None else ()),
            *_flags(NX=nx, XX=xx, KEEPTTL=keepttl, GET=get),
        ]
        return self._send(("SET", key, _text(value), *options), _as_is if get else _ok_or_none)

    def incr(self, key: str, amount: int = 1) -> Any:
        return self._send(("INCRBY", key, str(amount)), _as_is)

    # Hashes

    def hset(
        self,
        key: str,
        field: str | None = None,
        value: object = None,
        mapping: Mapping[str, object] | None = None,
    ) -> Any:
        parts = [] if field is None else [_text(field), _text(value)]
        for name, item in (mapping or {}).items():
            parts += [_text(name), _text(item)]
        if not parts:
            raise redis.DataError("'hset' with no key value pairs")
        return self._send(("HSET", key, *parts), _as_is)

    def hsetnx(self, key: str, field: str, value: object) -> Any:
        return self._send(("HSETNX", key, _text(field), _text(value)), _as_is)

    def hget(self, key: str, field: object) -> Any:
        return self._send(("HGET", key, _text(field)), _as_is)

    def hmget(self, key: str, fields: Iterable[object]) -> Any:
        return self._send(("HMGET", key, *_texts(*fields)), _as_is)

    def hdel(self, key: str, *fields: object) -> Any:
        return self._send(("HDEL", key, *_texts(*fields)), _as_is)

    def hgetall(self, key: str) -> Any:
        return self._send(("HGETALL", key), _mapping)

    def hkeys(self, key: str) -> Any:
        return self._send(("HKEYS", key), _as_is)

    def hvals(self, key: str) -> Any:
        return self._send(("HVALS", key), _as_is)

    def hlen(self, key: str) -> Any:
        return self._send(("HLEN", key), _as_is)

    def hexists(self, key: str, field: object) -> Any:
        return self._send(("HEXISTS", key, _text(field)), bool)

    def hincrby(self, key: str, field: object, amount: int = 1) -> Any:
        return self._send(("HINCRBY", key, _text(field), str(amount)), _as_is)

    # Sets

    def sadd(self, key: str, *members: object) -> Any:
        return self._send(("SADD", key, *_texts(*members)), _as_is)

    def srem(self, key: str, *members: object) -> Any:
        return self._send(("SREM", key, *_texts(*members)), _as_is)

    def smembers(self, key: str) -> Any:
        return self._send(("SMEMBERS", key), _OrderedSet)

    def sismember(self, key: str, member: object) -> Any:
        return self._send(("SISMEMBER", key, _text(member)), _as_is)

    def scard(self, key: str) -> Any:
        return self._send(("SCARD", key), _as_is)

    # Sorted sets

    def zadd(
        self,
        key: str,
        mapping: Mapping[str, float],
        nx: bool = False,
        xx: bool = False,
        ch: bool = False,
        gt: bool = False,
        lt: bool = False,
    ) -> Any:
        if not mapping:
            raise redis.DataError("ZADD requires at least one element/score pair")
        parts = [part for member, score in mapping.items() for part in (_text(score), _text(member))]
        return self._send(("ZADD", key, *_flags(NX=nx, XX=xx, CH=ch, GT=gt, LT=lt), *parts), _as_is)

    def zincrby(self, key: str, amount: float, member: str) -> Any:
        return self._send(("ZINCRBY", key, _text(amount), _text(member)), float)

    def zrem(self, key: str, *members: object) -> Any:
        return self._send(("ZREM", key, *_texts(*members)), _as_is)

    def zrange(
        self,
        key: str,
        start: object,
        end: object,
        desc: bool = False,
        withscores: bool = False,
        byscore: bool = False,
    ) -> Any:
        flags = _flags(BYSCORE=byscore, REV=desc, WITHSCORES=withscores)
        command = ("ZRANGE", key, _text(start), _text(end), *flags)
        return self._send(command, _scored if withscores else _as_is)

    def zrangebyscore(
        self,
        key: str,
        min: object,
        max: object,
        start: int | None = None,
        num: int | None = None,
        withscores: bool = False,
    ) -> Any:
        limit = () if start is None else ("LIMIT", str(start), str(num))
        flags = _flags(WITHSCORES=withscores)
        command = ("ZRANGEBYSCORE", key, _text(min), _text(max), *flags, *limit)
        return self._send(command, _scored if withscores else _as_is)

    def zremrangebyscore(self, key: str, min: object, max: object) -> Any:
        return self._send(("ZREMRANGEBYSCORE", key, _text(min), _text(max)), _as_is)

    def zcount(self, key: str, min: object, max: object) -> Any:
        return self._send(("ZCOUNT", key, _text(min), _text(max)), _as_is)

    def zscore(self, key: str, member: object) -> Any:
        return self._send(("ZSCORE", key, _text(member)), _float_or_none)

    def zrank(self, key: str, member: object) -> Any:
        return self._send(("ZRANK", key, _text(member)), _as_is)

    def zcard(self, key: str) -> Any:
        return self._send(("ZCARD", key), _as_is)

    def zpopmin(self, key: str, count: int = 1) -> Any:
        return self._send(("ZPOPMIN", key, str(count)), _scored)

    # Streams

    def xadd(
        self,
        key: str,
        fields: Mapping[str, object],
        id: str = "*",
        maxlen: int | None = None,
        approximate: bool = True,
        nomkstream: bool = False,
    ) -> Any:
        options: list[str] = ["NOMKSTREAM"] if nomkstream else []
        if maxlen is not None:
            options += ["MAXLEN", "~" if approximate else "=", str(maxlen)]
        parts = [part for name, value in fields.items() for part in _texts(name, value)]
        return self._send(("XADD", key, *options, id, *parts), _as_is)

    def xread(self, streams: Mapping[str, object], count: int | None = None, block: int | None = None) -> Any:
        options = [
            *(("BLOCK", str(block)) if block is not None else ()),
            *(("COUNT", str(count)) if count is not None else ()),
        ]
        return self._send(("XREAD", *options, "STREAMS", *streams, *_texts(*streams.values())), _read)

    def xrange(self, key: str, min: str = "-", max: str = "+", count: int | None = None) -> Any:
        limit = () if count is None else ("COUNT", str(count))
        return self._send(("XRANGE", key, min, max, *limit), _entries)

    def xrevrange(self, key: str, max: str = "+", min: str = "-", count: int | None = None) -> Any:
        limit = () if count is None else ("COUNT", str(count))
        return self._send(("XREVRANGE", key, max, min, *limit), _entries)

    def xlen(self, key: str) -> Any:
        return self._send(("XLEN", key), _as_is)

    def xdel(self, key: str, *identities: str) -> Any:
        return self._send(("XDEL", key, *identities), _as_is)

    def xtrim(
        self, key: str, maxlen: int | None = None, approximate: bool = True, minid: str | None = None
    ) -> Any:
        strategy, threshold = ("MAXLEN", str(maxlen)) if minid is None else ("MINID", minid)
        return self._send(("XTRIM", key, strategy, "~" if approximate else "=", threshold), _as_is)

    def xinfo_stream(self, key: str) -> Any:
        return self._send(("XINFO", "STREAM", key), _stream_facts)

    def xgroup_create(self, key: str, group: str, id: str = "$", mkstream: bool = False) -> Any:
        return self._send(("XGROUP", "CREATE", key, group, id, *_flags(MKSTREAM=mkstream)), bool)

    def xgroup_destroy(self, key: str, group: str) -> Any:
        return self._send(("XGROUP", "DESTROY", key, group), bool)


class Client(_Commands):
    """What `penstock.common.redis.connect` returns, of a simulated server."""

    def __init__(self, server: MemoryRedis) -> None:
        self._server = server

    def _send(self, command: Command, parse: Parse) -> Any:
        return _parsed(self._server.send([command])[0], parse)

    def pipeline(self, transaction: bool = True) -> "Pipeline":
        """Commands to send together."""
        return Pipeline(self._server, transaction)

    def scan_iter(self, match: str = "*", count: int | None = None) -> Iterator[str]:
        """Keys that match."""
        yield from self._send(("SCAN", "0", "MATCH", match), lambda reply: reply[1])

    def close(self) -> None:
        """Nothing to do."""

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Pipeline(_Commands):
    """Commands that `execute` sends together: whole in a transaction, else with others in between."""

    def __init__(self, server: MemoryRedis, transaction: bool) -> None:
        self._server = server
        self._transaction = transaction
        self._queued: list[tuple[Command, Parse]] = []

    def _send(self, command: Command, parse: Parse) -> "Pipeline":
        self._queued.append((command, parse))
        return self

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send what was queued.

        Raises:
            redis.ResponseError: the first error among the replies; all commands have run.
        """
        queued, self._queued = self._queued, []
        if not queued:
            return []
        replies = self._server.send([command for command, _ in queued], self._transaction)
        if raise_on_error:
            for reply in replies:
                _parsed(reply, _as_is)
        return [
            reply if isinstance(reply, Exception) else parse(reply)
            for reply, (_, parse) in zip(replies, queued, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._queued)

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queued = []


class Script:
    """A registered script: call it with keys and arguments."""

    def __init__(self, client: _Commands, source: str) -> None:
        self._client = client
        self.script = source
        self.sha = client.script_load(source)

    def __call__(
        self, keys: Iterable[object] = (), args: Iterable[object] = (), client: _Commands | None = None
    ) -> Any:
        names = _texts(*keys)
        return (client or self._client).evalsha(self.sha, len(names), *names, *args)


class _OrderedSet(set[str]):
    """A set that is gone through in one order, whatever strings hash to."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))


@lru_cache(maxsize=1000)
def _digest(source: str) -> str:
    return hashlib.sha1(source.encode()).hexdigest()


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, (redis.ConnectionError, redis.TimeoutError))


def _text(value: object) -> str:
    """A value as redis-py sends it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(value)
    raise redis.DataError(f"Invalid input of type: '{type(value).__name__}'")


def _texts(*values: object) -> Command:
    return tuple(map(_text, values))


def _flags(**flags: bool) -> tuple[str, ...]:
    return tuple(name for name, on in flags.items() if on)


def _parsed(reply: Any, parse: Parse) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return parse(reply)


def _as_is(reply: Any) -> Any:
    return reply


def _ok_or_none(reply: Any) -> Any:
    return None if reply is None else True


def _float_or_none(reply: Any) -> Any:
    return None if reply is None else float(reply)


def _mapping(reply: list[str]) -> dict[str, str]:
    return dict(zip(reply[::2], reply[1::2], strict=True))


def _scored(reply: list[str]) -> list[tuple[str, float]]:
    return [(member, float(score)) for member, score in zip(reply[::2], reply[1::2], strict=True)]


def _entries(reply: list[Any]) -> list[tuple[str, dict[str, str]]]:
    return [(identity, _mapping(fields)) for identity, fields in reply]


def _read(reply: Any) -> list[Any]:
    return [[key, _entries(entries)] for key, entries in reply or ()]


def _stream_facts(reply: list[Any]) -> dict[str, Any]:
    facts = dict(zip(reply[::2], reply[1::2], strict=True))
    for end in ("first-entry", "last-entry"):
        if facts[end] is not None:
            facts[end] = _entries([facts[end]])[0]
    return facts
