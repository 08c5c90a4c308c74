"""How long processes take that share a machine.

Every piece of work has a time that it takes alone, and takes up some of one resource meanwhile: processors,
or a GPU. As long as more is wanted of a resource than there is, all who want it are slowed down alike. A
trainer cannot be further in the rows than the producers are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CPU = "cpu"
_SLICES = 4000


@dataclass(frozen=True)
class Job:
    """Work of one process: seconds alone, and how much of which resource it takes up meanwhile.

    Attributes:
        epochs: of a training, how often it reads the rows that are being made.
        window: of a training, the share of them that it waits for at a time.
    """

    seconds: float
    resource: str = CPU
    amount: float = 1.0
    epochs: int = 1
    window: float = 0.0


@dataclass(frozen=True)
class Course:
    """Seconds from the start at which the last producer and the last training end."""

    produced: float
    trained: float


def overlap(
    producing: Sequence[Job], training: Sequence[Job], trainers: int, capacity: Mapping[str, float]
) -> Course:
    """Producers and trainers side by side.

    Args:
        producing: one job per producer.
        training: one job per run; `trainers` of them go on at a time, in this order.
        capacity: how much there is of each resource.
    """
    made, read = [0.0] * len(producing), [0.0] * len(training)
    busy = [1.0] * len(training)
    longest = sum(job.seconds for job in (*producing, *training))
    if longest <= 0:
        return Course(0.0, 0.0)
    now, produced, trained, step = 0.0, 0.0, 0.0, longest / _SLICES
    while True:
        makers = [i for i, done in enumerate(made) if done < producing[i].seconds]
        pending = [i for i, done in enumerate(read) if done < training[i].seconds][:trainers]
        if not makers and not pending:
            return Course(produced, trained)
        wanted: dict[str, float] = {}
        for job, share in [(producing[i], 1.0) for i in makers] + [(training[i], busy[i]) for i in pending]:
            wanted[job.resource] = wanted.get(job.resource, 0.0) + share * job.amount
        speed = {name: min(1.0, capacity.get(name, 1.0) / want) for name, want in wanted.items()}
        now += step
        for i in makers:
            made[i] += step * speed[producing[i].resource]
        total = sum(job.seconds for job in producing)
        share_made = sum(min(done, j.seconds) for done, j in zip(made, producing, strict=True)) / max(
            total, 1e-9
        )
        for i in pending:
            job, there = training[i], read[i]
            step_alone = step * speed[job.resource]
            ahead = max(0.0, share_made - job.window) / job.epochs
            limit = job.seconds * (ahead if makers and share_made < 1 else 1.0)
            read[i] = max(there, min(there + step_alone, limit))
            # who waits for rows takes up less
            busy[i] = 1.0 if limit > read[i] else min(1.0, max(0.05, (read[i] - there) / step_alone))
            trained = now
        produced = now if makers else produced
