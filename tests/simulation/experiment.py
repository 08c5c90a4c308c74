"""One schedule: producers, trainers and runs of one or two tiny datasets, and everything that goes wrong.

The produce loop, work and sink, the feeds, the worker, its training loop, supply and mender, heads,
retention, the queue with its scripts and `S3Store` are the real ones. Random choices of the seed decide the
shape of the experiment, who is killed, frozen or told to stop when, and which requests fail.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from penstock.common.errors import PenstockError, UserError
from penstock.common.health import Health
from penstock.common.heartbeat import Heartbeat
from penstock.common.redis import RedisSettings
from penstock.producer.loop import produce
from penstock.producer.sink import Sink
from penstock.producer.work import Work
from penstock.store.arrays import dataset_arrays, zarr_metadata
from penstock.store.joined import open_datasets
from penstock.store.layout import acts_array, chunk_key
from penstock.store.manifest import Manifest
from penstock.store.objects import open_store
from penstock.store.queue import ChunkQueue, Presence
from penstock.store.retention import Retention
from penstock.store.writer import DatasetWriter
from penstock.trainer.config import ResolvedSettings, RunSettings, chunks_needed, submit_run
from penstock.trainer.worker import work
from penstock.trainer.workplace import Workplace
from simulation.faults import Faults
from simulation.invariants import Invariants
from simulation.model import BATCH_ROWS, HOOK, Inline, TinyGroup, TinyLoader, TinySource, tiny_manifest
from simulation.redis import MemoryRedis
from simulation.s3 import MemoryS3, Object
from simulation.scheduler import Event, Process, Scheduler

DATASETS, RUNS = ("s3://house/dataset", "s3://house/more"), "s3://house/runs"
LEASE_SECONDS = 10.0
STORM_SECONDS = 300.0
REDIS_FATES = ("wipe", "roll back", "fail over", "silence")
CALM_SECONDS = 6000.0
"""What must be done in the virtual time after the last fault; else something waits for ever."""


class Experiment:
    """Datasets being made and trained on. `run` raises if any invariant is broken."""

    def __init__(self, seed: int, plan: "Plan | None" = None) -> None:
        self.world = Scheduler(seed, stickiness=0.5)
        draw = self.world.random
        self.plan = plan or Plan(draw)
        self.s3 = MemoryS3(self.world)
        self.redis = MemoryRedis(self.world)
        self.manifests: dict[str, Manifest] = {}
        end = 0
        for url, rows in zip(DATASETS, self.plan.rows, strict=False):
            self.manifests[url] = tiny_manifest(rows, self.plan.retention, end)
            end = self.manifests[url].corpus.end
            # zarr-python has a thread of its own, which must not be a simulated one
            zarr_metadata(tuple(dataset_arrays(self.manifests[url])))
        self.calm = False
        self._submitted: set[str] = set()
        self._refused: set[str] = set()
        self._over: set[str] = set()
        self._names: dict[str, int] = {}
        self._stops: dict[str, Event] = {}
        self.invariants = Invariants(
            self.s3,
            self.redis,
            {_prefix(url): manifest for url, manifest in self.manifests.items()},
            self.plan,
        )

    def run(self) -> None:
        """The whole schedule: a storm, then calm until everything is done."""
        with self.s3.installed(), self.world:
            self._set_faults()
            operator = self.world.process("operator")
            for number in range(self.plan.producers):
                url = list(self.manifests)[number % len(self.manifests)]
                making = partial(self._produce, url)
                operator.spawn(partial(self._keep, f"producer-{number}", making), f"p{number}")
            for number in range(self.plan.trainers):
                operator.spawn(partial(self._keep, f"trainer-{number}", self._train), f"t{number}")
            for number, settings in enumerate(self.plan.runs):
                submit = partial(self._submit, settings, number)
                operator.spawn(partial(self._keep, f"submit-{number}", submit), f"s{number}")
            self.world.process("fate").spawn(self._fate)
            self.world.run(seconds=STORM_SECONDS + CALM_SECONDS, until=self._finished)
            assert self._finished(), "nobody is left, and not everything is done"
            self.invariants.at_the_end()

    def _set_faults(self) -> None:
        rate = self.plan.fault_rate
        settings: dict[str, Any] = {"refused": rate, "lost": rate, "late": rate / 2, "slow": rate}
        self.s3.faults = Faults(self.world, **settings)
        self.redis.faults = Faults(self.world, **settings)

    def _finished(self) -> bool:
        if not self.calm or len(self._submitted) + len(self._refused) < len(self.plan.runs):
            return False
        return self.invariants.everything_is_done(self._submitted)

    # The processes

    def _keep(self, name: str, main: Callable[[Process, Event], None]) -> None:
        """What a supervisor does: start it, start it again."""
        while name not in self._over:
            self._names[name] = self._names.get(name, -1) + 1
            process = self.world.process(f"{name}.{self._names[name]}", accepts=(PenstockError,))
            stop = Event()
            self._stops[process.name] = stop
            process.spawn(partial(main, process, stop))
            while not process.ended:
                self.world.sleep(5.0, f"looks after {name}")
            self.world.sleep(self.world.random.random() * 10)

    def _produce(self, url: str, process: Process, stop: Event) -> None:
        store = open_store(url)
        writer = DatasetWriter(store, self.manifests[url], Inline())
        client: Any = self.redis.client()
        address = (client, "sim", store.url, writer.manifest.digest, process.name, LEASE_SECONDS)
        queue, repairs = ChunkQueue(*address), ChunkQueue(*address, repairs=True)
        presence = Presence(client, "sim", process.name)
        retention = Retention(store, writer.manifest, self.plan.budget)
        producing = Work(queue, repairs, writer, retention, lambda: heartbeat.beat())

        def renew() -> None:
            producing.renew()
            presence.tell({"kind": "producer", "dataset": store.url}, 3 * LEASE_SECONDS)

        heartbeat = Heartbeat(renew, LEASE_SECONDS, Health())
        maker = sum(map(ord, process.name)) % 50 if self.plan.mixed else 0
        sink = Sink(
            writer, producing, client, queue.feeds_key, process.name, lambda index, rows: None, Inline()
        )
        try:
            produce(producing, TinySource(writer.manifest, maker, self.plan.work_seconds), sink, stop)
        finally:
            heartbeat.close()
        producing.release()

    def _train(self, process: Process, stop: Event) -> None:
        group: Any = partial(TinyGroup, seconds=self.plan.work_seconds)
        place = Workplace(
            runs=open_store(RUNS),
            client=self.redis.client(),
            redis=RedisSettings(prefix="sim", lease_seconds=LEASE_SECONDS),
            worker=process.name,
            device=torch.device("cpu"),
            threads=1,
            port=-1,
            group=group,
            loader=TinyLoader,
        )
        work(place, Health(), stop, drain=False)

    def _submit(self, settings: RunSettings, number: int, process: Process, stop: Event) -> None:
        if number:  # while others read already
            self._turns(self.world.random.randrange(2000))
        while not stop.is_set() and process.name not in self._over:
            try:
                data = open_datasets(self.plan.reads[number])
                config, _ = submit_run(open_store(RUNS), data, settings, self.plan.budget)
                self.invariants.submitted(config)
                self._submitted.add(settings.name)
                self._over |= {process.name, f"submit-{number}"}
            except UserError as error:
                if "nothing of it is left" in str(error):
                    self._refused.add(settings.name)
                    self._over |= {process.name, f"submit-{number}"}
            except PenstockError:
                pass
            self.world.sleep(3.0, "submits again")

    # What goes wrong

    def _fate(self) -> None:
        """Faults until the storm is over."""
        draw = self.world.random
        memories = deque([self.redis.snapshot()], maxlen=6)
        while self.world.clock < STORM_SECONDS and not self._all_trained():
            self.world.sleep(draw.random() * self.plan.pause, "fate waits")
            # time moves only while nobody is busy: strike in the middle of something, too
            self._turns(draw.randrange(self.plan.lurks))
            if draw.random() < 0.5:
                memories.append(self.redis.snapshot())
            what = draw.choices(list(self.plan.fates), list(self.plan.fates.values()))[0]
            victims = [p for p in self.world.processes if not p.dead and p.name in self._stops]
            victim = draw.choice(victims) if victims else None
            if what == "wipe":
                self.redis.wipe()
            elif what == "roll back":
                self.redis.restore(draw.choice(memories))
            elif what == "fail over":
                # to a replica that lags behind
                state = self.redis.snapshot()
                self._turns(draw.randrange(100))
                self.redis.restore(state)
            elif what == "silence":
                self.redis.down(draw.random() * 60)
            elif what == "damage":
                self._damage()
            elif victim is None or victim.frozen:
                continue
            elif what == "kill":
                victim.crash()
            elif what == "kill soon":
                victim.crash_at = victim.requests + draw.randrange(30)
            elif what == "freeze":
                victim.freeze(draw.random() * 6 * LEASE_SECONDS)
            elif what == "stop":
                self._stops[victim.name].set()
        self.s3.faults.quiet()
        self.redis.faults.quiet()
        self.calm = True

    def _turns(self, number: int) -> None:
        """Wait until others have had so many turns."""
        came, target = Event(), self.world.steps + number
        self.world.when(lambda: self.world.steps >= target, came.set)
        came.wait(60.0)

    def _all_trained(self) -> bool:
        names = {settings.name for settings in self.plan.runs}
        known = names == self._submitted | self._refused
        return known and self.invariants.everything_is_done(self._submitted)

    def _damage(self) -> None:
        """Flip a bit of a committed chunk, or lose one of its objects."""
        draw = self.world.random
        url = draw.choice(list(self.manifests))
        index = draw.randrange(self.manifests[url].n_chunks)
        committed = f"{_prefix(url)}commits/0/{index}.json" in self.s3.objects
        name = _prefix(url) + chunk_key("activations.zarr", acts_array(HOOK), index, 2)
        # while numerics are mixed nobody else can make a chunk as it was
        if committed and name in self.s3.objects and not self.plan.mixed:
            found = self.s3.objects[name]
            self.world.note(f"damage chunk {index} of {url}")
            if draw.random() < 0.3:
                del self.s3.objects[name]
            else:
                data = bytearray(found.data)
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                self.s3.objects[name] = Object(bytes(data), found.metadata, found.modified)


def _prefix(url: str) -> str:
    """Where the keys of a dataset begin in the simulated S3."""
    return url.removeprefix("s3://") + "/"


class Plan:
    """The shape of an experiment, drawn from its seed."""

    def __init__(self, draw: Any) -> None:
        n = draw.randint(4, 7)
        self.rows = [[draw.randint(2, 4) for _ in range(n)]]
        self.retention = draw.choice(["window", "keep"])
        several = self.retention == "keep" and draw.random() < 0.4
        if several:
            self.rows.append([draw.randint(2, 4) for _ in range(draw.randint(2, 4))])
        self.mixed = draw.random() < 0.4
        self.producers, self.trainers = draw.randint(len(self.rows), 3), draw.randint(1, 2)
        self.window_chunks, self.head_interval = draw.randint(1, 2), draw.randint(1, 2)
        epochs = 1 if self.retention == "window" else draw.randint(1, 2)
        # where chunks go away, the moment at which another run comes matters
        runs = draw.randint(2, 3) if self.retention == "window" else draw.randint(1, 2)
        self.runs = [self._run(number, epochs) for number in range(runs)]
        both = list(DATASETS)
        ways = [both, both[::-1], both[:1], both[1:]] if several else [both[:1]]
        self.reads = [draw.choices(ways, [4, 2, 1, 1][: len(ways)])[0] for _ in self.runs]
        needs = max(chunks_needed(settings, n) for settings in self.runs)
        self.budget = needs + draw.randint(0, 1) if self.retention == "window" else None
        self.fault_rate = draw.choice([0.0, 0.01, 0.03])
        self.work_seconds = draw.choice([0.0, 1.0, 8.0])
        self.pause, self.lurks = draw.choice([1.0, 4.0, 16.0]), draw.choice([1, 30, 200])
        of_processes, of_redis = draw.choice([(4, 1), (4, 0), (1, 12)])
        self.fates = {fate: of_processes * draw.random() for fate in ("kill", "kill soon", "freeze")}
        self.fates |= {fate: of_redis * draw.random() for fate in REDIS_FATES}
        self.fates |= {fate: draw.random() for fate in ("stop", "damage")}

    def _run(self, number: int, epochs: int) -> ResolvedSettings:
        sae: dict[str, Any] = {"name": "tiny", "architecture": "standard", "hook_name": HOOK}
        sae |= {"d_sae": 1, "l1_coefficient": 1.0}
        return ResolvedSettings.model_validate(
            {
                "name": f"run{number}",
                "saes": [sae],
                "batch_rows": BATCH_ROWS,
                "window_chunks": self.window_chunks,
                "head_interval": self.head_interval,
                "epochs": epochs,
                "seed": number,
                "strict": True,
            }
        )
