"""Redis commands on data in memory, at the level of the protocol: strings in, raw replies out.

Scripts and clients both end here. A reply is an int, a str, None, a list of replies or a `Status`.
Commands and options that nobody here uses are missing, and say so when they are used.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import redis

from simulation.values import (
    MAX_ID,
    Hash,
    Set,
    SortedSet,
    Stream,
    StreamId,
    Value,
    format_id,
    kind,
    number,
    parse_id,
)

_V = TypeVar("_V")


class Status(str):
    """A reply such as OK, which is another type than a string in the protocol."""


OK = Status("OK")
Snapshot = tuple[dict[str, Value], dict[str, int]]

_WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"


class Database:
    """Keys, values, when they expire, and the commands on them.

    Args:
        now: server time in microseconds since the epoch.
        on_entry: called with the key of a stream that got an entry.
    """

    def __init__(self, now: Callable[[], int], on_entry: Callable[[str], None]) -> None:
        self.values: dict[str, Value] = {}
        self.expiry: dict[str, int] = {}  # ms
        self._now = now
        self._on_entry = on_entry
        self._commands: dict[str, Callable[..., Any]] = {
            name[5:]: getattr(self, name) for name in dir(type(self)) if name.startswith("_cmd_")
        }

    def execute(self, name: str, *arguments: str) -> Any:
        """Run one command.

        Raises:
            redis.ResponseError: as the server's error reply.
        """
        command = self._commands.get(name.lower())
        if command is None:
            raise NotImplementedError(f"the simulated Redis has no {name}")
        if self.expiry:
            self._expire()
        return command(*arguments)

    def snapshot(self) -> Snapshot:
        """All data as of now."""
        values = {k: v if isinstance(v, str) else v.copy() for k, v in self.values.items()}
        return values, self.expiry.copy()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, which may be used again."""
        values, expiry = snapshot
        self.values = {k: v if isinstance(v, str) else v.copy() for k, v in values.items()}
        self.expiry = expiry.copy()

    # Keys

    def _expire(self) -> None:
        now = self._now() // 1000
        for key in [key for key, end in self.expiry.items() if end <= now]:
            del self.expiry[key]
            self.values.pop(key, None)

    def _find(self, key: str, type_: type[_V]) -> _V | None:
        value = self.values.get(key)
        if value is not None and type(value) is not type_:
            raise redis.ResponseError(_WRONG_TYPE)
        return value

    def _make(self, key: str, type_: type[_V]) -> _V:
        value = self._find(key, type_)
        if value is None:
            value = type_()
            self.values[key] = value  # type: ignore[assignment]
        return value

    def _tidy(self, key: str) -> None:
        """Collections without members do not exist, streams excepted."""
        if not self.values[key]:
            self._cmd_del(key)

    def _cmd_ping(self) -> Status:
        return Status("PONG")

    def _cmd_time(self) -> list[str]:
        seconds, microseconds = divmod(self._now(), 1_000_000)
        return [str(seconds), str(microseconds)]

    def _cmd_del(self, *keys: str) -> int:
        found = 0
        for key in keys:
            found += self.values.pop(key, None) is not None
            self.expiry.pop(key, None)
        return found

    _cmd_unlink = _cmd_del

    def _cmd_exists(self, *keys: str) -> int:
        return sum(key in self.values for key in keys)

    def _cmd_type(self, key: str) -> Status:
        return Status(kind(self.values[key]) if key in self.values else "none")

    def _cmd_keys(self, pattern: str) -> list[str]:
        matches = _glob(pattern)
        return [key for key in self.values if matches(key)]

    def _cmd_scan(self, cursor: str, *options: str) -> list[Any]:
        chosen = _pairs(options, {"MATCH", "COUNT", "TYPE"})
        matches, type_ = _glob(chosen.get("MATCH", "*")), chosen.get("TYPE")
        found = [k for k, v in self.values.items() if matches(k) and type_ in (None, kind(v))]
        return ["0", found]  # whole at once: a SCAN promises no more to keys that stay

    def _cmd_dbsize(self) -> int:
        return len(self.values)

    def _cmd_flushall(self, *options: str) -> Status:
        self.values.clear()
        self.expiry.clear()
        return OK

    def _cmd_rename(self, old: str, new: str) -> Status:
        if old not in self.values:
            raise redis.ResponseError("ERR no such key")
        value, end = self.values.pop(old), self.expiry.pop(old, None)
        self._cmd_del(new)
        self.values[new] = value
        if end is not None:
            self.expiry[new] = end
        return OK

    def _end_at(self, key: str, moment: int) -> int:
        if key not in self.values:
            return 0
        self.expiry[key] = moment
        self._expire()
        return 1

    def _cmd_expire(self, key: str, seconds: str) -> int:
        return self._end_at(key, self._now() // 1000 + _integer(seconds) * 1000)

    def _cmd_pexpire(self, key: str, milliseconds: str) -> int:
        return self._end_at(key, self._now() // 1000 + _integer(milliseconds))

    def _cmd_pexpireat(self, key: str, moment: str) -> int:
        return self._end_at(key, _integer(moment))

    def _cmd_persist(self, key: str) -> int:
        return int(self.expiry.pop(key, None) is not None)

    def _cmd_pttl(self, key: str) -> int:
        if key not in self.values:
            return -2
        return self.expiry[key] - self._now() // 1000 if key in self.expiry else -1

    def _cmd_ttl(self, key: str) -> int:
        left = self._cmd_pttl(key)
        return left if left < 0 else (left + 500) // 1000

    # Strings

    def _cmd_get(self, key: str) -> str | None:
        return self._find(key, str)

    def _cmd_mget(self, *keys: str) -> list[str | None]:
        values = [self.values.get(key) for key in keys]
        return [value if isinstance(value, str) else None for value in values]

    def _cmd_set(self, key: str, value: str, *options: str) -> Any:
        chosen = [option.upper() for option in options]
        known = {"NX", "XX", "GET", "KEEPTTL", "PX", "EX", "PXAT"}
        old = self._find(key, str) if "GET" in chosen else None
        end, place = None, 0
        while place < len(chosen):
            option = chosen[place]
            if option not in known:
                raise redis.ResponseError("ERR syntax error")
            if option in ("PX", "EX", "PXAT"):
                place += 1
                amount = _integer(chosen[place])
                if amount <= 0:
                    raise redis.ResponseError("ERR invalid expire time in 'set' command")
                end = amount
                if option != "PXAT":
                    end = self._now() // 1000 + amount * (1000 if option == "EX" else 1)
            place += 1
        there = key in self.values
        if ("NX" in chosen and there) or ("XX" in chosen and not there):
            return old
        self.values[key] = value
        if "KEEPTTL" not in chosen:
            self.expiry.pop(key, None)
        if end is not None:
            self.expiry[key] = end
        return old if "GET" in chosen else OK

    def _cmd_incrby(self, key: str, amount: str) -> int:
        value = _integer(self._find(key, str) or "0") + _integer(amount)
        self.values[key] = str(value)
        return value

    def _cmd_incr(self, key: str) -> int:
        return self._cmd_incrby(key, "1")

    def _cmd_decr(self, key: str) -> int:
        return self._cmd_incrby(key, "-1")

    # Hashes

    def _cmd_hset(self, key: str, *fields: str) -> int:
        if not fields or len(fields) % 2:
            raise redis.ResponseError("ERR wrong number of arguments for 'hset' command")
        found = self._make(key, dict)
        before = len(found)
        found.update(zip(fields[::2], fields[1::2], strict=True))
        return len(found) - before

    def _cmd_hsetnx(self, key: str, field: str, value: str) -> int:
        if self._cmd_hexists(key, field):
            return 0
        return self._cmd_hset(key, field, value)

    def _cmd_hget(self, key: str, field: str) -> str | None:
        return self._hash(key).get(field)

    def _cmd_hmget(self, key: str, *fields: str) -> list[str | None]:
        found = self._hash(key)
        return [found.get(field) for field in fields]

    def _cmd_hdel(self, key: str, *fields: str) -> int:
        found = self._find(key, dict)
        if found is None:
            return 0
        gone = sum(found.pop(field, None) is not None for field in fields)
        self._tidy(key)
        return gone

    def _cmd_hgetall(self, key: str) -> list[str]:
        return [part for pair in self._hash(key).items() for part in pair]

    def _cmd_hkeys(self, key: str) -> list[str]:
        return list(self._hash(key))

    def _cmd_hvals(self, key: str) -> list[str]:
        return list(self._hash(key).values())

    def _cmd_hlen(self, key: str) -> int:
        return len(self._hash(key))

    def _cmd_hexists(self, key: str, field: str) -> int:
        return int(field in self._hash(key))

    def _cmd_hincrby(self, key: str, field: str, amount: str) -> int:
        value = _integer(self._hash(key).get(field, "0")) + _integer(amount)
        self._cmd_hset(key, field, str(value))
        return value

    def _hash(self, key: str) -> Hash:
        found: Hash | None = self._find(key, dict)
        return {} if found is None else found

    # Sets

    def _cmd_sadd(self, key: str, *members: str) -> int:
        found = self._make(key, Set)
        before = len(found)
        found.update(dict.fromkeys(members))
        return len(found) - before

    def _cmd_srem(self, key: str, *members: str) -> int:
        found = self._find(key, Set)
        if found is None:
            return 0
        before = len(found)
        for member in members:
            found.pop(member, None)
        gone = before - len(found)
        self._tidy(key)
        return gone

    def _cmd_smembers(self, key: str) -> list[str]:
        return list(self._find(key, Set) or ())

    def _cmd_sismember(self, key: str, member: str) -> int:
        return int(member in (self._find(key, Set) or ()))

    def _cmd_scard(self, key: str) -> int:
        return len(self._find(key, Set) or ())

    # Sorted sets

    def _cmd_zadd(self, key: str, *arguments: str) -> int:
        place = 0
        while arguments[place].upper() in ("NX", "XX", "GT", "LT", "CH"):
            place += 1
        options, pairs = {option.upper() for option in arguments[:place]}, arguments[place:]
        scores = [_score(text) for text in pairs[::2]]
        found = self._make(key, SortedSet)
        added = changed = 0
        for score, member in zip(scores, pairs[1::2], strict=True):
            old = found.scores.get(member)
            if (old is None and "XX" in options) or (old is not None and "NX" in options):
                continue
            if old is not None and (
                score == old or ("GT" in options and score < old) or ("LT" in options and score > old)
            ):
                continue
            found.add(member, score)
            added += old is None
            changed += 1
        self._tidy(key)
        return changed if "CH" in options else added

    def _cmd_zincrby(self, key: str, amount: str, member: str) -> str:
        score = self._zset(key).scores.get(member, 0.0) + _score(amount)
        self._make(key, SortedSet).add(member, score)
        return number(score)

    def _cmd_zrem(self, key: str, *members: str) -> int:
        found = self._find(key, SortedSet)
        if found is None:
            return 0
        gone = sum(found.remove(member) for member in members)
        self._tidy(key)
        return gone

    def _cmd_zrange(self, key: str, start: str, stop: str, *options: str) -> list[str]:
        names = [option.upper() for option in options]
        if "BYSCORE" in names:
            names.remove("BYSCORE")
            return self._cmd_zrangebyscore(key, start, stop, *names)
        if unknown := set(names) - {"WITHSCORES", "REV"}:
            raise NotImplementedError(f"ZRANGE {unknown}")
        if "REV" in names:
            found = list(self._zset(key))[::-1]
            low, high = _integer(start), _integer(stop)
            size = len(found)
            low, high = max(0, low + size if low < 0 else low), high + size if high < 0 else high
            found = found[low : high + 1] if high >= 0 else []
        else:
            found = self._zset(key).by_rank(_integer(start), _integer(stop))
        return _members(found, "WITHSCORES" in names)

    def _cmd_zrevrange(self, key: str, start: str, stop: str, *options: str) -> list[str]:
        return self._cmd_zrange(key, start, stop, "REV", *options)

    def _cmd_zrangebyscore(self, key: str, low: str, high: str, *options: str) -> list[str]:
        found = self._zset(key).by_score(low, high)
        names = [option.upper() for option in options]
        if "LIMIT" in names:
            place = names.index("LIMIT")
            offset, count = _integer(names[place + 1]), _integer(names[place + 2])
            found = found[offset:] if count < 0 else found[offset : offset + count]
        return _members(found, "WITHSCORES" in names)

    def _cmd_zremrangebyscore(self, key: str, low: str, high: str) -> int:
        found = self._zset(key).by_score(low, high)
        return self._cmd_zrem(key, *(member for _, member in found))

    def _cmd_zcount(self, key: str, low: str, high: str) -> int:
        return len(self._zset(key).by_score(low, high))

    def _cmd_zscore(self, key: str, member: str) -> str | None:
        score = self._zset(key).scores.get(member)
        return None if score is None else number(score)

    def _cmd_zmscore(self, key: str, *members: str) -> list[str | None]:
        return [self._cmd_zscore(key, member) for member in members]

    def _cmd_zrank(self, key: str, member: str) -> int | None:
        found = self._zset(key)
        score = found.scores.get(member)
        return None if score is None else list(found).index((score, member))

    def _cmd_zcard(self, key: str) -> int:
        return len(self._zset(key))

    def _cmd_zpopmin(self, key: str, count: str = "1") -> list[str]:
        popped = self._zset(key).by_rank(0, _integer(count) - 1)
        if popped:
            self._cmd_zrem(key, *(member for _, member in popped))
        return _members(popped, True)

    def _zset(self, key: str) -> SortedSet:
        return self._find(key, SortedSet) or SortedSet()

    # Streams

    def _cmd_xadd(self, key: str, *arguments: str) -> str | None:
        place, make, trim = 0, True, []
        while arguments[place].upper() in ("NOMKSTREAM", "MAXLEN", "MINID"):
            if arguments[place].upper() == "NOMKSTREAM":
                make, place = False, place + 1
            else:
                width = 3 if arguments[place + 1] in ("~", "=") else 2
                trim, place = list(arguments[place : place + width]), place + width
        identity, fields = arguments[place], list(arguments[place + 1 :])
        if not fields or len(fields) % 2:
            raise redis.ResponseError("ERR wrong number of arguments for 'xadd' command")
        stream = self._find(key, Stream)
        if stream is None and not make:
            return None
        last = (0, 0) if stream is None else stream.last
        new = self._new_id(identity, last)
        if new <= last:
            raise redis.ResponseError(
                "ERR The ID specified in XADD is equal or smaller than the target stream top item"
                if new != (0, 0)
                else "ERR The ID specified in XADD must be greater than 0-0"
            )
        stream = self._make(key, Stream)
        stream.entries.append((new, fields))
        stream.last = new
        stream.added += 1
        if trim:
            self._cmd_xtrim(key, *trim)
        self._on_entry(key)
        return format_id(new)

    def _new_id(self, text: str, last: StreamId) -> StreamId:
        if text == "*":
            now = self._now() // 1000
            return (now, 0) if now > last[0] else (last[0], last[1] + 1)
        if text.endswith("-*"):
            first = int(text[:-2])
            return (first, last[1] + 1) if first == last[0] else (first, 0)
        return _id(text)

    def _cmd_xlen(self, key: str) -> int:
        stream = self._find(key, Stream)
        return 0 if stream is None else len(stream.entries)

    def _cmd_xread(self, *arguments: str) -> list[Any] | None:
        count, place = None, 0
        while arguments[place].upper() != "STREAMS":
            if arguments[place].upper() == "COUNT":
                count = _integer(arguments[place + 1])
            place += 2  # BLOCK is the client's affair: nothing waits in here
        rest = arguments[place + 1 :]
        answer = []
        for key, last in zip(rest[: len(rest) // 2], rest[len(rest) // 2 :], strict=True):
            stream = self._find(key, Stream)
            if stream is not None and last != "$":
                found = stream.after(_id(last))[:count]
                if found:
                    answer.append([key, _entries(found)])
        return answer or None

    def _cmd_xrange(self, key: str, low: str = "-", high: str = "+", *options: str) -> list[Any]:
        stream = self._find(key, Stream)
        count = _integer(options[1]) if options else None
        first = (0, 0) if low == "-" else _id(low)
        last = MAX_ID if high == "+" else _id(high, MAX_ID[1])
        entries = [] if stream is None else stream.entries
        return _entries([entry for entry in entries if first <= entry[0] <= last][:count])

    def _cmd_xrevrange(self, key: str, high: str = "+", low: str = "-", *options: str) -> list[Any]:
        found = self._cmd_xrange(key, low, high)[::-1]
        return found[: _integer(options[1])] if options else found

    def _cmd_xdel(self, key: str, *identities: str) -> int:
        stream = self._find(key, Stream)
        return 0 if stream is None else sum(stream.delete(_id(text)) for text in identities)

    def _cmd_xtrim(self, key: str, strategy: str, *arguments: str) -> int:
        stream = self._find(key, Stream)
        if stream is None or arguments[0] == "~":
            return 0  # "about" may always be nothing
        threshold = arguments[-1]
        if strategy.upper() == "MINID":
            return stream.trim_before(_id(threshold))
        return stream.drop(len(stream.entries) - _integer(threshold))

    def _cmd_xsetid(self, key: str, identity: str) -> Status:
        stream = self._find(key, Stream)
        if stream is None:
            raise redis.ResponseError("ERR no such key")
        new = _id(identity)
        if stream.entries and new < stream.entries[-1][0]:
            raise redis.ResponseError(
                "ERR The ID specified in XSETID is smaller than the target stream top item"
            )
        if new < stream.max_deleted:
            raise redis.ResponseError(
                "ERR The ID specified in XSETID is smaller than current max_deleted_entry_id"
            )
        stream.last = new
        return OK

    def _cmd_xgroup(self, action: str, key: str, group: str, *options: str) -> Any:
        stream = self._find(key, Stream)
        if action.upper() == "CREATE":
            if stream is None:
                if "MKSTREAM" not in [option.upper() for option in options]:
                    raise redis.ResponseError(
                        "ERR The XGROUP subcommand requires the key to exist. Note that for CREATE you may "
                        "want to use the MKSTREAM option to create an empty stream automatically."
                    )
                stream = self._make(key, Stream)
            if group in stream.groups:
                raise redis.ResponseError("BUSYGROUP Consumer Group name already exists")
            stream.groups[group] = stream.last if options[0] == "$" else _id(options[0])
            return OK
        if action.upper() == "DESTROY":
            if stream is None:
                raise redis.ResponseError("ERR The XGROUP subcommand requires the key to exist.")
            return int(stream.groups.pop(group, None) is not None)
        raise NotImplementedError(f"XGROUP {action}")

    def _cmd_xinfo(self, what: str, key: str) -> list[Any]:
        stream = self._find(key, Stream)
        if stream is None:
            raise redis.ResponseError("ERR no such key")
        if what.upper() != "STREAM":
            raise NotImplementedError(f"XINFO {what}")
        ends = _entries([*stream.entries[:1], *stream.entries[-1:]])
        return [
            *("length", len(stream.entries), "radix-tree-keys", 1, "radix-tree-nodes", 2),
            *("last-generated-id", format_id(stream.last)),
            *("max-deleted-entry-id", format_id(stream.max_deleted)),
            *("entries-added", stream.added),
            *("recorded-first-entry-id", ends[0][0] if ends else "0-0"),
            *("groups", len(stream.groups)),
            *("first-entry", ends[0] if ends else None, "last-entry", ends[-1] if ends else None),
        ]


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise redis.ResponseError("ERR value is not an integer or out of range") from None


def _score(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise redis.ResponseError("ERR value is not a valid float") from None


def _id(text: str, sequence: int = 0) -> StreamId:
    try:
        return parse_id(text, sequence)
    except ValueError:
        raise redis.ResponseError("ERR Invalid stream ID specified as stream command argument") from None


def _members(found: list[tuple[float, str]], with_scores: bool) -> list[str]:
    if not with_scores:
        return [member for _, member in found]
    return [part for score, member in found for part in (member, number(score))]


def _entries(found: list[tuple[StreamId, list[str]]]) -> list[Any]:
    return [[format_id(identity), list(fields)] for identity, fields in found]


def _pairs(options: tuple[str, ...], known: set[str]) -> dict[str, str]:
    chosen = {name.upper(): value for name, value in zip(options[::2], options[1::2], strict=True)}
    if unknown := set(chosen) - known:
        raise NotImplementedError(f"option {unknown}")
    return chosen


@lru_cache(maxsize=1000)
def _glob(pattern: str) -> Callable[[str], object]:
    """A matcher for a pattern with Redis' `*`, `?`, `[...]` and backslash."""
    parts = re.findall(r"\\.|\[[^\]]*\]|.", pattern, re.DOTALL)
    translated = ""
    for part in parts:
        if part in ("*", "?"):
            translated += ".*" if part == "*" else "."
        elif part[0] == "[" and len(part) > 2:
            translated += part
        else:
            translated += re.escape(part[-1] if part[0] == "\\" else part)
    return re.compile(translated, re.DOTALL).fullmatch
