"""The simulated Redis: the same answers as a real server, and what it does when things go wrong."""

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import redis

from penstock.common.redis import Client
from penstock.store.queue import (
    ChunkQueue,
    Feed,
    FeedSpec,
    Presence,
    RunQueue,
    register_feed,
    registered_feeds,
    remove_feed,
    repairs_wanted,
)
from simulation.faults import Faults
from simulation.redis import MemoryRedis
from simulation.scheduler import Scheduler, in_turn
from simulation.world import patched_world

SEEDS = range(8)
STEPS = 250
LEASE = 3600.0


@pytest.fixture
def world() -> Iterator[Scheduler]:
    with patched_world(), Scheduler(1) as scheduler:
        yield scheduler


@pytest.fixture
def server(world: Scheduler) -> MemoryRedis:
    return MemoryRedis(world)


# The same answers


class Side:
    """Everything that uses Redis, on one server."""

    def __init__(self, client: Client, prefix: str) -> None:
        self.client, self.prefix = client, prefix
        self.chunks = {w: ChunkQueue(client, prefix, "/d", "digest", w, LEASE) for w in "ab"}
        self.repairs = ChunkQueue(client, prefix, "/d", "digest", "a", LEASE, repairs=True)
        # a lease that is over before the next command
        self.brief = ChunkQueue(client, prefix, "/d", "digest", "brief", 0.0)
        self.runs = {w: RunQueue(client, prefix, "/r", w, LEASE) for w in "ab"}
        self.feed = Feed(client, FeedSpec(f"{prefix}:feed", 0, (6,), 3, 2, 7))
        self.late_feed = Feed(client, FeedSpec(f"{prefix}:late", 5, (6,), 3, 2, 7))
        self.presence = {w: Presence(client, prefix, w) for w in "ab"}
        self.feeds_key = self.chunks["a"].feeds_key

    def contents(self) -> dict[str, Any]:
        """All keys below the prefix; ends of leases as far as they can agree between two clocks."""
        return {
            key.removeprefix(self.prefix): self._content(key)
            for key in self.client.scan_iter(f"{self.prefix}:*")
        }

    def _content(self, key: str) -> Any:
        kind, ends = self.client.type(key), self.client.pttl(key) > 0
        if kind == "zset":
            # claims are scored by the clock
            scored = not key.endswith(":claimed")
            found = self.client.zrange(key, 0, -1, withscores=scored)
            return kind, ends, found if scored else sorted(found)
        if kind == "stream":
            facts = self.client.xinfo_stream(key)
            names = ("length", "last-generated-id", "groups", "first-entry", "last-entry")
            return kind, ends, [facts[name] for name in names], self.client.xrange(key)
        if kind == "hash":
            return kind, ends, self.client.hgetall(key)
        return kind, ends, self.client.get(key)


Call = Callable[[Side], Any]


def draw_call(chance: random.Random) -> Call:
    """Something a worker might do next."""
    who, index, position = chance.choice("ab"), chance.randrange(6), chance.randrange(18)
    run = chance.choice(["run-1", "run-2", "run-3"])
    committed = set(chance.sample(range(6), chance.randrange(7)))
    late = chance.random() < 0.3

    def feed(side: Side) -> Feed:
        return side.late_feed if late else side.feed

    calls: list[Call] = [
        lambda side: side.chunks[who].reconcile(6, committed),
        lambda side: side.chunks[who].claim(index),
        lambda side: side.chunks[who].claim(100),
        lambda side: side.brief.claim(100),
        lambda side: side.chunks[who].renew(index),
        lambda side: side.chunks[who].release(index),
        lambda side: side.chunks[who].done(index),
        lambda side: side.chunks[who].claims(),
        lambda side: side.chunks[who].ask(index),
        lambda side: side.chunks[who].is_open(index),
        lambda side: side.repairs.ask(index),
        lambda side: side.repairs.claim(100),
        lambda side: side.repairs.done(index),
        lambda side: repairs_wanted(side.client, side.prefix, "/d", "digest"),
        lambda side: feed(side).open(),
        lambda side: feed(side).rebuild(position),
        lambda side: feed(side).add(position, index),
        lambda side: feed(side).advance(lambda chunk: chunk in committed),
        lambda side: feed(side).advance(lambda chunk: True),
        lambda side: feed(side).read(position, 1),
        lambda side: feed(side).length(),
        lambda side: feed(side).trim(position),
        lambda side: feed(side).delete() if index == 0 else None,
        lambda side: side.runs[who].add(run, position),
        lambda side: side.runs[who].remove(run),
        lambda side: list(side.runs[who].pending().items()),
        lambda side: side.runs[who].lease(),
        lambda side: side.runs[who].lease(["run-1", run]),
        lambda side: side.runs[who].renew(run),
        lambda side: side.runs[who].release(run),
        lambda side: side.runs[who].holder(run),
        lambda side: register_feed(side.client, side.feeds_key, run, side.feed.spec),
        lambda side: remove_feed(side.client, side.feeds_key, run),
        lambda side: [
            registered.advance(lambda chunk: True)
            for registered in registered_feeds(side.client, side.feeds_key)
        ],
        lambda side: side.presence[who].tell({"position": position}),
        lambda side: side.presence[who].leave(),
        lambda side: side.presence[who].everyone(),
    ]
    return chance.choice(calls)


def comparable(side: Side, answer: Any) -> Any:
    return json.loads(json.dumps(answer).replace(side.prefix, ""))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_queue_answers_as_on_a_real_server(
    client: Client, prefix: str, server: MemoryRedis, seed: int
) -> None:
    real, simulated = Side(client, prefix), Side(server.client(), prefix)
    chance = random.Random(seed)
    for step in range(STEPS):
        # so that a lease of no length is over, on both clocks
        server.scheduler.sleep(0.001)
        call = draw_call(chance)
        answers = [comparable(side, call(side)) for side in (real, simulated)]
        assert answers[0] == answers[1], f"step {step}"
        if step % 10 == 0:
            assert real.contents() == simulated.contents(), f"step {step}"
    assert real.contents() == simulated.contents()


def outcome(call: Callable[[Any], Any], client: Any) -> Any:
    """An answer, or the first word of an error."""
    try:
        answer = call(client)
    except redis.ResponseError as error:
        return type(error).__name__
    return sorted(answer) if isinstance(answer, (set, frozenset)) else answer


def draw_command(chance: random.Random, prefix: str) -> Callable[[Any], Any]:
    """Any command on one of a few keys, which may hold another type."""
    key, other = (f"{prefix}:{chance.choice('klmno')}" for _ in range(2))
    a, b = (chance.choice(["a", "b", "c", "ä", "10", "9"]) for _ in range(2))
    n, m = chance.randint(-3, 6), chance.randint(-3, 6)
    score = chance.choice([0, 1, -2, 2.5, 1e20, 0.1, 3])
    low, high = chance.choice(["-inf", "(1", "1", 0]), chance.choice(["+inf", "(2.5", "3", 1e20])
    flags = {"nx": chance.random() < 0.3}
    calls: list[Callable[[Any], Any]] = [
        lambda c: c.set(key, a),
        lambda c: c.set(key, a, px=100_000, **flags),
        lambda c: c.set(key, b, xx=True, keepttl=True),
        lambda c: c.set(key, n),
        lambda c: c.get(key),
        lambda c: c.mget([key, other]),
        lambda c: c.incr(key, n),
        lambda c: c.delete(key, other),
        lambda c: c.exists(key, other, key),
        lambda c: c.expire(key, 100),
        lambda c: c.pexpire(key, 100_000),
        lambda c: c.pexpire(key, 0),
        lambda c: c.persist(key),
        lambda c: c.pttl(key) > 0,
        lambda c: c.type(key),
        lambda c: sorted(c.keys(f"{prefix}:[k-m]")),
        lambda c: c.rename(key, other),
        lambda c: c.hset(key, a, b),
        lambda c: c.hset(key, mapping={a: n, b: score}),
        lambda c: c.hsetnx(key, a, b),
        lambda c: c.hget(key, a),
        lambda c: c.hmget(key, [a, b]),
        lambda c: c.hdel(key, a, b),
        lambda c: c.hgetall(key),
        lambda c: sorted(c.hkeys(key)),
        lambda c: sorted(c.hvals(key)),
        lambda c: c.hlen(key),
        lambda c: c.hexists(key, a),
        lambda c: c.hincrby(key, a, n),
        lambda c: c.sadd(key, a, b),
        lambda c: c.srem(key, a),
        lambda c: c.smembers(key),
        lambda c: c.sismember(key, a),
        lambda c: c.scard(key),
        lambda c: c.zadd(key, {a: score}),
        lambda c: c.zadd(key, {a: score, b: n}, ch=True, **flags),
        lambda c: c.zadd(key, {a: score}, xx=True),
        lambda c: c.zadd(key, {a: score}, gt=True),
        lambda c: c.zadd(key, {a: score}, lt=True, ch=True),
        lambda c: c.zincrby(key, score, a),
        lambda c: c.zrem(key, a, b),
        lambda c: c.zrange(key, n, m),
        lambda c: c.zrange(key, n, m, desc=True, withscores=True),
        lambda c: c.zrange(key, 0, -1, withscores=True),
        lambda c: c.zrangebyscore(key, low, high, withscores=True),
        lambda c: c.zrangebyscore(key, low, high, start=1, num=2),
        lambda c: c.zremrangebyscore(key, low, high),
        lambda c: c.zcount(key, low, high),
        lambda c: c.zscore(key, a),
        lambda c: c.zrank(key, a),
        lambda c: c.zcard(key),
        lambda c: c.zpopmin(key, 2),
        lambda c: c.xadd(key, {a: n, b: m}, id=f"{max(0, n)}-{max(0, m)}"),
        lambda c: c.xadd(key, {a: n}, id=f"{max(0, n)}-*", nomkstream=True),
        lambda c: c.xadd(key, {a: n}, id=f"{n}-1", maxlen=2, approximate=False),
        lambda c: c.xlen(key),
        lambda c: c.xread({key: f"{max(0, n)}-0"}, count=2),
        lambda c: c.xread({key: "0", other: "0"}),
        lambda c: c.xrange(key),
        lambda c: c.xrange(key, min=str(max(0, n)), max=str(max(0, m)), count=3),
        lambda c: c.xrevrange(key, count=2),
        lambda c: c.xdel(key, f"{max(0, n)}-{max(0, m)}"),
        lambda c: c.xtrim(key, minid=f"{max(0, n)}-1", approximate=False),
        lambda c: c.xtrim(key, maxlen=max(0, n), approximate=False),
        lambda c: c.execute_command("XSETID", key, f"{max(0, n)}-5"),
        lambda c: c.xgroup_create(key, a, id="0", mkstream=flags["nx"]),
        lambda c: c.xgroup_destroy(key, a),
        lambda c: {k: v for k, v in c.xinfo_stream(key).items() if k in FACTS},
        lambda c: pipeline(c, key, a, score, transaction=flags["nx"]),
    ]
    return chance.choice(calls)


FACTS = ("length", "last-generated-id", "groups", "first-entry", "last-entry", "entries-added")


def pipeline(client: Any, key: str, member: str, score: float, transaction: bool) -> Any:
    with client.pipeline(transaction=transaction) as pipe:
        pipe.zadd(key, {member: score})
        pipe.zrange(key, 0, -1, withscores=True)
        pipe.zcard(key)
        return pipe.execute()


@pytest.mark.parametrize("seed", SEEDS)
def test_commands_answer_as_on_a_real_server(
    client: Client, prefix: str, server: MemoryRedis, seed: int
) -> None:
    chance = random.Random(seed)
    simulated = server.client()
    for step in range(1000):
        call = draw_command(chance, prefix)
        assert outcome(call, client) == outcome(call, simulated), f"step {step}"


SCRIPTS = [
    "return 7.9",
    "return -7.9",
    "return 'text'",
    "return true",
    "return false",
    "return nil",
    "return {1, 2.5, 'three', {4, {5}}, false}",
    "return {1, nil, 3}",
    "return {}",
    "return {ok = 'FINE'}",
    "return {err = 'ERR own'}",
    "return redis.error_reply('ERR own')",
    "return redis.status_reply('FINE')",
    "return redis.call('SET', KEYS[1], 3.0)",
    # no fractions that are not exact: servers write them differently
    "redis.call('SET', KEYS[1], 0.5); return redis.call('GET', KEYS[1])",
    "redis.call('SET', KEYS[1], 1700000000123); return redis.call('GET', KEYS[1])",
    "redis.call('SET', KEYS[1], 1e15 + 0.5); return redis.call('GET', KEYS[1])",
    "return redis.call('GET', KEYS[1]) == false",
    "return type(redis.call('GET', KEYS[1]))",
    "return redis.call('SET', KEYS[1], 'x', 'XX') == false",
    "return redis.call('SET', KEYS[1], 'x').ok",
    "return redis.call('PING')",
    "return {redis.call('ZADD', KEYS[1], 1, 'a', 2.5, 'b'), redis.call('ZSCORE', KEYS[1], 'b')}",
    "redis.call('ZADD', KEYS[1], 3, 'a'); return redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')",
    "redis.call('ZADD', KEYS[1], 3, 'a'); return redis.call('GET', KEYS[1])",
    "redis.call('ZADD', KEYS[1], 3, 'a'); return redis.pcall('GET', KEYS[1]).err ~= nil",
    "redis.call('HSET', KEYS[1], 'a', 1, 'b', 2); return redis.call('HGETALL', KEYS[1])",
    "redis.call('HSET', KEYS[1], 'a', 1); return #redis.call('HMGET', KEYS[1], 'a', 'b', 'a')",
    "return redis.call('HMGET', KEYS[1], 'a', 'b')",
    "return ARGV[1] + 1 .. '-0'",
    "return tonumber(ARGV[1]) * 1e10 .. ''",
    "return #ARGV + #KEYS",
    "return ARGV[5] == nil",
    "nonsense = 1",
    "return nonsense",
    "return redis.call('SET', KEYS[1], true)",
    "local ok, err = pcall(redis.call, 'INCRBY', KEYS[1], 'x'); return ok",
    "return tonumber(redis.call('TIME')[1]) > 1600000000",
    "return cjson.encode({a = 1})",
    "return cjson.encode({1, 2, 'x'})",
    "return cjson.decode(ARGV[2]).list[2]",
    "local total = 0; for i = 1, 100 do total = total + i end; return total",
    "return string.format('%d %s', 5, table.concat({'a', 'b'}, ','))",
    "return {unpack(ARGV)}",
    "return redis.call('XADD', KEYS[1], '5-0', 'chunk', 3)",
    "redis.call('XADD', KEYS[1], '5-0', 'chunk', 3); return redis.call('XRANGE', KEYS[1], '-', '+')",
    "return select('#', redis.call('DEL', KEYS[1]))",
]


@pytest.mark.parametrize("source", SCRIPTS)
def test_scripts_answer_as_on_a_real_server(
    client: Client, prefix: str, server: MemoryRedis, source: str
) -> None:
    def call(target: Any) -> Any:
        script = target.register_script(source)
        return script(keys=[f"{prefix}:key"], args=[41, '{"list": [1, 22]}'])

    simulated = server.client()
    assert outcome(call, client) == outcome(call, simulated)
    assert outcome(lambda c: c.type(f"{prefix}:key"), client) == simulated.type(f"{prefix}:key")


# Time


def test_leases_end_in_virtual_time(world: Scheduler, server: MemoryRedis) -> None:
    client = server.client()
    dead, alive = (ChunkQueue(client, "p", "/d", "d", worker, 30.0) for worker in ("dead", "alive"))
    runs = RunQueue(client, "p", "/r", "dead", 30.0)
    dead.reconcile(1, set())
    runs.add("run", 0)
    assert (dead.claim(9), alive.claim(9), runs.lease()) == (0, None, "run")
    world.sleep(29.9)
    assert (alive.claim(9), runs.holder("run")) == (None, "dead")
    world.sleep(0.2)
    assert (alive.claim(9), runs.holder("run")) == (0, None)
    assert not dead.renew(0)


def test_a_reader_waits_for_data_or_for_its_time(world: Scheduler, server: MemoryRedis) -> None:
    spec = FeedSpec("feed", 0, (6,), 2, 2, 7)
    found: list[tuple[float, Any]] = []

    def read() -> None:
        feed = Feed(server.client(), spec)
        feed.open()
        for _ in range(2):
            found.append((world.clock, feed.read(0, 500)))
        found.append((world.clock, []))

    def write() -> None:
        world.sleep(0.7)
        Feed(server.client(), spec).add(0, 3)

    world.process("reader").spawn(read)
    world.process("writer").spawn(write)
    world.run()
    assert [answer for _, answer in found] == [[], [(0, 3)], []]
    assert [at for at, _ in found] == pytest.approx([0.0, 0.5, 0.7])


# What goes wrong


def test_a_script_whose_reply_is_lost_runs_again(world: Scheduler, server: MemoryRedis) -> None:
    chunks = ChunkQueue(server.client(), "p", "/d", "d", "a", 30.0)
    chunks.reconcile(10, set())
    server.faults.lost = 1.0
    claimed: list[int | None] = []

    def main() -> None:
        try:
            claimed.append(chunks.claim(10))
        except redis.ConnectionError:
            server.faults.quiet()
            claimed.append(chunks.claim(10))

    world.process("a").spawn(main)
    world.run()
    assert claimed == [4], "after four claims of which it knows nothing"
    assert len(chunks.claims()) == 5


def test_nobody_is_answered_while_the_server_is_down(world: Scheduler, server: MemoryRedis) -> None:
    client = server.client()
    client.set("a", "1")
    seen: list[object] = []

    def read(block: int) -> None:
        try:
            seen.append(client.xread({"feed": "0"}, block=block))
        except redis.ConnectionError:
            seen.append("broken")
        world.sleep(100.0)
        seen.append(client.get("a"))

    world.process("a").spawn(partial(read, 9000))
    world.process("b").spawn(in_turn(partial(world.sleep, 1.0), partial(server.down, 60.0)))
    world.run()
    assert seen == ["broken", "1"]


def test_it_may_lose_everything_or_go_back_in_time(server: MemoryRedis) -> None:
    client = server.client()
    side = Side(client, "p")
    chance = random.Random(3)
    for _ in range(300):
        draw_call(chance)(side)
    before, contents = server.snapshot(), side.contents()
    assert {"zset", "hash", "stream", "string"} == {content[0] for content in contents.values()}
    for _ in range(2):
        for _ in range(100):
            draw_call(chance)(side)
        assert side.contents() != contents
        server.restore(before)
        assert side.contents() == contents
    server.wipe()
    assert side.contents() == {}
    assert side.chunks["a"].claim(9) is None, "scripts are still known"


def test_faults_come_from_the_seed() -> None:
    def story(seed: int) -> list[object]:
        with patched_world(), Scheduler(seed, trace=None) as world:
            server = MemoryRedis(world, Faults(world, refused=0.1, lost=0.1, late=0.05, slow=0.1))

            def work(worker: str) -> None:
                chunks = ChunkQueue(server.client(), "p", "/d", "d", worker, 5.0)
                for _ in range(20):
                    try:
                        chunks.reconcile(10, set())
                        index = chunks.claim(10)
                        world.sleep(world.random.random())
                        if index is not None:
                            chunks.done(index)
                    except redis.RedisError:
                        world.note("redis does not answer")

            for worker in "abc":
                world.process(worker).spawn(partial(work, worker))
            world.run()
            return list(world.trace)

    assert story(5) == story(5)
    assert story(5) != story(6)
