"""Who is at it, as Redis says: holders, claims, repairs and what workers say of themselves."""

from dataclasses import dataclass
from typing import Any

from penstock.common.redis import Client, RedisSettings
from penstock.store.queue import ChunkQueue, Presence, RunQueue


@dataclass(frozen=True)
class Crew:
    """What Redis says.

    Attributes:
        workers: worker -> what it last said of itself.
        holders: run id -> worker.
        claims: dataset URL -> chunk -> worker.
        repairs: dataset URL -> chunks asked to be made again, or being made again.
    """

    workers: dict[str, dict[str, Any]]
    holders: dict[str, str | None]
    claims: dict[str, dict[int, str]]
    repairs: dict[str, int]

    def at_run(self, run_id: str) -> dict[str, Any]:
        """What the worker that is at a run said; nothing if there is none."""
        for worker, word in self.workers.items():
            if word.get("run") == run_id and self.holders.get(run_id) in (None, worker):
                return word
        return {}

    def rows_per_second(self, url: str) -> float | None:
        """Of all producers of a dataset together; None if none says so."""
        rates = [word.get("rows_per_second") for word in self.workers.values() if word.get("dataset") == url]
        return sum(rate for rate in rates if rate) or None


def look_at_redis(
    client: Client, settings: RedisSettings, runs_url: str, run_ids: list[str], digests: dict[str, str]
) -> Crew:
    """Ask Redis.

    Args:
        runs_url: as the runs' store spells it; workers find each other by it.
        digests: dataset URL, as its store spells it, -> digest of its manifest.

    Raises:
        redis.RedisError: it does not answer.
    """
    prefix, lease = settings.prefix, settings.lease_seconds
    runs = RunQueue(client, prefix, runs_url, "status", lease)
    claims, repairs = {}, {}
    for url, digest in digests.items():
        claims[url] = ChunkQueue(client, prefix, url, digest, "status", lease).claims()
        queue = ChunkQueue(client, prefix, url, digest, "status", lease, repairs=True)
        repairs[url] = queue.waiting() + len(queue.claims())
    return Crew(Presence(client, prefix, "status").everyone(), runs.holders(run_ids), claims, repairs)
