"""The exporter: what scaling and watching read is right whoever works, and whoever does not."""

import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from penstock.common.errors import Unavailable
from penstock.common.health import Health
from penstock.common.metrics import REGISTRY
from penstock.common.redis import Client
from penstock.deploy import exporter as exporter_module
from penstock.deploy import survey as survey_module
from penstock.deploy.config import Config, load_config
from penstock.deploy.exported import GAUGES
from penstock.deploy.exporter import Exporter, Published, count_space, free_space
from penstock.store.dataset import open_dataset
from penstock.store.joined import JoinedDataset
from penstock.store.layout import FORMAT_VERSION, MANIFEST, head_key, quarantine_key
from penstock.store.objects import ObjectStore, open_store
from penstock.store.queue import ChunkQueue, Presence, RunQueue
from penstock.store.retention import Retention
from penstock.trainer.config import submit_run
from services.big import write_big
from services.command import COMMAND
from services.counting import CountingStore
from services.fleet import CHUNKS, COMMITTED, plan, run_of, write_fleet, write_heads
from services.synthetic import RESID, make_manifest
from services.valkey import kill_server, valkey_server
from services.waiting import eventually

ROOT = Path(__file__).parents[2]
Samples = dict[tuple[str, tuple[str, ...]], float]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for name in ("PENSTOCK_REDIS_URL", "PENSTOCK_REDIS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        return write_fleet(tmp_path_factory.mktemp("fleet"), runs=10)


def with_redis(config: Config, url: str, prefix: str) -> Config:
    return config.model_copy(update={"redis": config.redis.model_copy(update={"url": url, "prefix": prefix})})


class Watched:
    """An exporter that looks when it is told to."""

    def __init__(self, config: Config) -> None:
        self.published, self.health = Published(), Health()
        self.exporter = Exporter(config, self.published, self.health, 0.01)

    def look(self) -> Samples:
        self.exporter.look()
        return self.scrape()

    def scrape(self) -> Samples:
        registry = CollectorRegistry()
        registry.register(self.published)
        return parsed(generate_latest(registry).decode())


def parsed(text: str) -> Samples:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(samples: Samples, name: str) -> dict[str, float]:
    """The only label's value -> the metric's."""
    return {labels[0]: value for (found, labels), value in samples.items() if found == name and labels}


def test_every_metric_is_documented_with_its_labels() -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    rows = re.findall(r"^\| `(penstock_\w+)` \| ([^|]*)\| gauge \|", text, re.MULTILINE)
    documented = {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert documented == {name: labels for name, (_, labels) in GAUGES.items()}


def test_no_other_process_publishes_the_same() -> None:
    names = {family.name for family in REGISTRY.collect()}
    assert not names & GAUGES.keys()
    assert not {f"{name}_total" for name in names} & GAUGES.keys()


def test_all_is_published_while_nobody_works_and_redis_is_down(fleet: Path) -> None:
    config = with_redis(load_config(str(fleet)), "unix:///nowhere", "x")
    samples = Watched(config).look()
    assert samples["penstock_runs_pending", ()] == 4
    assert of(samples, "penstock_runs") == {
        "pending": 2,
        "running": 2,
        "done": 2,
        "failed": 2,
        "cancelled": 2,
        "unreadable": 0,
    }
    urls = [f"{config.directory}/dataset-{number}" for number in range(3)]
    assert of(samples, "penstock_dataset_chunks_planned") == dict(zip(urls, CHUNKS, strict=True))
    assert of(samples, "penstock_dataset_chunks_committed") == dict(zip(urls, COMMITTED, strict=True))
    assert of(samples, "penstock_dataset_rows_committed")[urls[0]] == 200 * COMMITTED[0]
    assert of(samples, "penstock_dataset_chunks_wanted") == {urls[0]: CHUNKS[0] - COMMITTED[0]}
    assert of(samples, "penstock_dataset_blocked") == {urls[0]: 0}
    backlog = {run[:6]: value for run, value in of(samples, "penstock_backlog_chunks").items()}
    assert backlog == {"run-00": 25, "run-01": 20, "run-05": 20, "run-06": 15}
    # one window of five chunks each
    assert set(of(samples, "penstock_run_next_head_chunks").values()) == {5}
    ages = of(samples, "penstock_run_head_age_seconds")
    assert {run[:6] for run in ages} == {"run-01", "run-06"}
    assert all(3600 <= age < 3700 for age in ages.values())
    assert set(of(samples, "penstock_run_head_interval_seconds").values()) == {100.0}
    assert len(of(samples, "penstock_run_position")) == 10
    assert samples["penstock_redis_up", ()] == 0
    assert samples["penstock_exporter_look_success", ()] == 1
    # what Redis alone knows is absent, not zero
    names = {name for name, _ in samples}
    of_redis = {"penstock_run_held", "penstock_workers", "penstock_dataset_chunks_claimed"}
    assert not names & {*of_redis, "penstock_workers_waiting"}


def test_what_redis_adds(fleet: Path, client: Client, redis_url: str, prefix: str) -> None:
    config = with_redis(load_config(str(fleet)), redis_url, prefix)
    runs = RunQueue(client, prefix, config.runs_url, "trainer-a", 30.0)
    held = next(path.name for path in Path(config.runs_url).iterdir() if path.name.startswith("run-06"))
    runs.add(held, 10)
    runs.lease()
    Presence(client, prefix, "trainer-a").tell({"kind": "trainer", "run": held, "waiting_for": "chunk 25"})
    Presence(client, prefix, "producer-b").tell({"kind": "producer", "waiting": ""})
    digest = open_dataset(config.dataset.url).manifest.digest
    ChunkQueue(client, prefix, config.dataset.url, digest, "x", 30.0, repairs=True).ask(3)
    samples = Watched(config).look()
    assert samples["penstock_redis_up", ()] == 1
    assert {run[:6]: v for run, v in of(samples, "penstock_run_held").items()} == {
        "run-00": 0,
        "run-01": 0,
        "run-05": 0,
        "run-06": 1,
    }
    assert of(samples, "penstock_workers") == {"producer": 1, "trainer": 1}
    assert of(samples, "penstock_workers_waiting") == {"producer": 0, "trainer": 1}
    assert of(samples, "penstock_dataset_chunks_wanted")[config.dataset.url] == 15 + 1
    assert of(samples, "penstock_dataset_chunks_claimed")[config.dataset.url] == 0


def test_redis_may_go_and_come_back(fleet: Path, prefix: str) -> None:
    with valkey_server() as server:
        watched = Watched(with_redis(load_config(str(fleet)), server.url, prefix))
        before = watched.look()
        assert before["penstock_redis_up", ()] == 1
        kill_server(server)
        gone = watched.look()
        assert gone["penstock_redis_up", ()] == 0
        assert gone["penstock_exporter_look_success", ()] == 1
        assert gone["penstock_runs_pending", ()] == before["penstock_runs_pending", ()] == 4
        assert of(gone, "penstock_run_held") == {}
        server.ensure()
        server.wait_until_ready()
        back = watched.look()
        assert back["penstock_redis_up", ()] == 1
        assert of(back, "penstock_run_held") == of(before, "penstock_run_held") != {}


class Unsteady(CountingStore):
    """A store that may be away."""

    away = False

    def get(self, key: str) -> bytes:
        self._answer()
        return super().get(key)

    def folders(self, prefix: str) -> set[str]:
        self._answer()
        return super().folders(prefix)

    def _answer(self) -> None:
        if Unsteady.away:
            raise Unavailable(f"{self.url} does not answer")


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Unsteady]]:
    found: list[Unsteady] = []

    def open_unsteady(url: str) -> ObjectStore:
        found.append(Unsteady(open_store(url)))
        return found[-1]

    monkeypatch.setattr(survey_module, "open_store", open_unsteady)
    yield found
    Unsteady.away = False


def test_a_store_that_is_away_leaves_the_last_look_standing(
    fleet: Path, stores: list[Unsteady], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "free_space", lambda config: {})
    watched = Watched(load_config(str(fleet)))
    assert not watched.health.ready
    Unsteady.away = True
    assert watched.look() == {("penstock_exporter_look_success", ()): 0}
    Unsteady.away = False
    before = watched.look()
    assert watched.health.ready
    Unsteady.away = True
    after = watched.look()
    assert after.pop(("penstock_exporter_look_success", ())) == 0
    assert before.pop(("penstock_exporter_look_success", ())) == 1
    ages = [key for key in before if key[0] == "penstock_run_head_age_seconds"]
    for key in ages:
        assert after.pop(key) >= before.pop(key)
    assert after == before
    assert watched.health.alive


def test_a_scrape_asks_nothing_and_a_look_asks_little(fleet: Path, stores: list[Unsteady]) -> None:
    watched = Watched(load_config(str(fleet)))
    watched.look()
    for store in stores:
        store.take()
    watched.scrape()
    assert [store.take() for store in stores] == [[] for _ in stores]
    watched.look()
    asked = [question for store in stores for question in store.take()]
    # ended runs are not asked for again, each of the other four for its next head
    of_runs = [question for question in asked if "/heads/" in question[1]]
    assert len([1 for what, _ in of_runs if what == "get"]) == 4
    assert len([1 for what, _ in of_runs if what == "list"]) == 2
    assert not [1 for what, key in asked if key.endswith("config.json")]


def config_of(directory: Path, **dataset: Any) -> Config:
    return Config.model_validate(
        {
            "workdir": str(directory),
            "dataset": {"url": str(directory / "dataset"), "hooks": [RESID]} | dataset,
            "runs_url": str(directory / "runs"),
            "runs": [run_of("run", str(directory / "dataset"))],
        }
    )


def test_a_dataset_that_nobody_planned_yet_wants_a_producer(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    samples = Watched(config).look()
    assert of(samples, "penstock_dataset_chunks_wanted") == {config.dataset.url: 1}
    assert samples["penstock_runs_pending", ()] == 0
    assert of(samples, "penstock_dataset_chunks_planned") == {}
    idle = config.model_copy(update={"producers": 0})
    assert of(Watched(idle).look(), "penstock_dataset_chunks_wanted") == {config.dataset.url: 0}


def test_producers_are_wanted_as_soon_as_the_readers_have_moved_on(tmp_path: Path) -> None:
    """Who raises the floor is a producer, and there is none: what it would find is said."""
    manifest = make_manifest([200] * 40, retention="window")
    budget = 10 * manifest.chunk_bytes()
    config = config_of(tmp_path, retention="window", budget_bytes=budget)
    url, store = config.dataset.url, open_store(config.dataset.url)
    write_big(store, manifest, range(10))
    settings = config.runs[0].model_copy(update={"datasets": []})
    run, _ = submit_run(open_store(config.runs_url), JoinedDataset([open_dataset(url)]), settings, 10)
    watched = Watched(config)
    samples = watched.look()
    assert of(samples, "penstock_dataset_chunks_wanted") == {url: 0}
    assert of(samples, "penstock_dataset_blocked") == {url: 1}
    assert watched.published.survey is not None
    waits = watched.published.survey.datasets[url].blocked
    assert waits == f"run {run.run_id}, which still needs chunk 0"
    # two checkpoints, the older one at position 5: chunks below are needed no longer
    write_heads(open_store(config.runs_url), run, "running", time.time(), checkpoints=True)
    samples = watched.look()
    assert of(samples, "penstock_dataset_chunks_wanted") == {url: 5}
    assert of(samples, "penstock_dataset_blocked") == {url: 0}
    # it only looked
    assert not [key for key, _ in store.list("") if key.startswith(("floor/", "detached/"))]


def test_readers_that_cannot_be_asked_are_no_reason_to_take_producers_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest([200] * 40, retention="window")
    config = config_of(tmp_path, retention="window", budget_bytes=10 * manifest.chunk_bytes())
    url = config.dataset.url
    write_big(open_store(url), manifest, range(5))
    settings = config.runs[0].model_copy(update={"datasets": []})
    submit_run(open_store(config.runs_url), JoinedDataset([open_dataset(url)]), settings, 10)
    watched = Watched(config)
    assert of(watched.look(), "penstock_dataset_chunks_wanted") == {url: 5}

    def away(self: Retention) -> None:
        raise Unavailable("the store of another run does not answer")

    monkeypatch.setattr(Retention, "look", away)
    samples = watched.look()
    assert of(samples, "penstock_dataset_chunks_planned") == {url: 40}
    # absent, not zero
    assert of(samples, "penstock_dataset_chunks_wanted") == {}
    assert of(samples, "penstock_dataset_blocked") == {}


def test_what_a_newer_version_wrote_hides_nothing_else(tmp_path: Path) -> None:
    config = load_config(str(write_fleet(tmp_path, runs=10)))
    runs = open_store(config.runs_url)
    ids = {name[:6]: name for name in runs.folders("")}
    for key in (f"{ids['run-00']}/config.json", f"{ids['run-01']}/heads/2.json"):
        runs.put_guarded(key, runs.get_record(key) | {"format_version": FORMAT_VERSION + 1})
    other = open_store(config.dataset_urls()[2])
    other.put_guarded(MANIFEST, other.get_record(MANIFEST) | {"format_version": FORMAT_VERSION + 1})
    watched = Watched(config)
    samples = watched.look()
    assert samples["penstock_exporter_look_success", ()] == 1
    assert of(samples, "penstock_runs")["unreadable"] == 2
    assert samples["penstock_runs_pending", ()] == 2
    assert watched.published.survey is not None
    survey = watched.published.survey
    assert "upgrade penstock" in str(survey.runs[ids["run-00"]].reason)
    assert "upgrade penstock" in str(survey.runs[ids["run-01"]].reason)
    assert "upgrade penstock" in str(survey.datasets[other.url].problem)


def test_how_long_heads_take_is_known_after_a_takeover_and_a_restart(tmp_path: Path) -> None:
    config = load_config(str(write_fleet(tmp_path, runs=2)))
    runs = open_store(config.runs_url)
    (run_id,) = (name for name in runs.folders("") if name.startswith("run-01"))
    watched = Watched(config)
    assert of(watched.look(), "penstock_run_head_interval_seconds") == {run_id: 100.0}
    record = runs.get_record(head_key(run_id, 2)) | {"n": 3, "parent": 2, "kind": "takeover"}
    runs.create_guarded(head_key(run_id, 3), record | {"time": time.time()})
    assert of(watched.look(), "penstock_run_head_interval_seconds") == {run_id: 100.0}
    assert of(Watched(config).look(), "penstock_run_head_interval_seconds") == {run_id: 100.0}


def test_a_quarantined_chunk_is_counted_until_it_is_gone(fleet: Path) -> None:
    config = load_config(str(fleet))
    store = open_store(config.dataset.url)
    record = {"format_version": FORMAT_VERSION, "index": 4, "reason": "x", "time": 1.0}
    store.create_guarded(quarantine_key(4), record)
    assert of(Watched(config).look(), "penstock_chunks_quarantined")[config.dataset.url] == 1
    for key, _ in list(store.list("quarantine/")):
        store.delete(key)
    assert of(Watched(config).look(), "penstock_chunks_quarantined")[config.dataset.url] == 0


def test_backlog_ends_at_the_first_gap_and_goes_on_through_epochs(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    store, manifest = open_store(config.dataset.url), make_manifest([200] * 12)
    write_big(store, manifest, [0, 1, 2, 4, 5])
    settings = config.runs[0].model_copy(update={"epochs": 2, "window_chunks": 3})
    submit_run(open_store(config.runs_url), JoinedDataset([open_dataset(config.dataset.url)]), settings)
    watched = Watched(config)
    assert list(of(watched.look(), "penstock_backlog_chunks").values()) == [3]
    write_big(store, manifest, range(12))
    assert list(of(watched.look(), "penstock_backlog_chunks").values()) == [24]


def test_another_dataset_in_the_place_of_a_runs_own_is_no_backlog(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    store = open_store(config.dataset.url)
    write_big(store, make_manifest([200] * 12), range(12))
    data = JoinedDataset([open_dataset(config.dataset.url)])
    submit_run(open_store(config.runs_url), data, config.runs[0])
    watched = Watched(config)
    assert list(of(watched.look(), "penstock_backlog_chunks").values()) == [12]
    write_big(store, make_manifest([100] * 12))
    samples = watched.look()
    assert of(samples, "penstock_backlog_chunks") == {}
    assert samples["penstock_runs_pending", ()] == 1
    assert of(samples, "penstock_dataset_rows_committed") == {config.dataset.url: 1200}


def test_nothing_that_a_look_meets_ends_the_exporter(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(load_config(str(fleet)))
    before = watched.look()
    monkeypatch.setattr(survey_module, "look_at_dataset", lambda *_: 1 / 0)
    after = watched.look()
    assert after["penstock_exporter_look_success", ()] == 0
    assert after["penstock_runs_pending", ()] == before["penstock_runs_pending", ()] == 4


def test_bytes_below_each_url(fleet: Path) -> None:
    config = load_config(str(fleet))
    quota = config.model_copy(update={"dataset": config.dataset.model_copy(update={"quota_bytes": 10**9})})
    spaces = count_space(quota, threading.Event())
    assert set(spaces) == {*config.dataset_urls(), config.runs_url}
    for url, space in spaces.items():
        assert space.used == sum(file.stat().st_size for file in Path(url).rglob("*") if file.is_file())
    assert spaces[config.dataset.url].quota == 10**9
    assert spaces[config.runs_url].quota is None
    stopped = threading.Event()
    stopped.set()
    assert count_space(config, stopped)[config.runs_url].used is None


def test_free_space_is_asked_at_every_look_also_while_the_store_is_away(
    fleet: Path, stores: list[Unsteady], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(str(fleet))
    assert set(free_space(config)) == {config.workdir, *config.dataset_urls(), config.runs_url}
    # an S3 server on the same machine fills the same disk
    dataset = config.dataset.model_copy(update={"url": "s3://bucket/dataset"})
    on_s3 = config.model_copy(update={"runs_url": "s3://bucket/runs", "dataset": dataset, "runs": []})
    assert set(free_space(on_s3)) == {config.workdir}
    left = iter([7 * 10**9, 5 * 10**9, 3 * 10**9])
    monkeypatch.setattr(exporter_module, "_free", lambda path: next(left) if path == config.runs_url else 0)
    watched = Watched(config)
    for expected in (7e9, 5e9):
        assert of(watched.look(), "penstock_store_free_bytes")[config.runs_url] == expected
    Unsteady.away = True
    assert of(watched.look(), "penstock_store_free_bytes")[config.runs_url] == 3e9


@pytest.mark.parametrize("error", [Unavailable("no answer"), FileNotFoundError("it was deleted meanwhile")])
def test_bytes_that_cannot_be_counted_do_not_end_it(
    fleet: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stop, counted = threading.Event(), threading.Semaphore(0)
    monkeypatch.setattr(exporter_module, "COUNT_SECONDS", 0.01)

    def refuse(config: Config, stop: threading.Event) -> dict[str, Any]:
        counted.release()
        raise error

    monkeypatch.setattr(exporter_module, "count_space", refuse)
    watched = Watched(load_config(str(fleet)))
    thread = threading.Thread(target=watched.exporter.run, args=(stop,))
    thread.start()
    # it is tried again
    assert counted.acquire(timeout=30)
    assert counted.acquire(timeout=30)
    eventually(lambda: watched.health.ready)
    stop.set()
    thread.join()
    assert watched.published.succeeded


def test_the_process_answers_probes_and_scrapes_goes_on_looking_and_stops(tmp_path: Path) -> None:
    fleet = write_fleet(tmp_path, runs=10)
    command = [*COMMAND, "exporter", "--every", "0.1", str(fleet)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = re.search(r"port=(\d+)", process.stderr.readline())
        assert found
        base = f"http://127.0.0.1:{found[1]}"

        def answer(path: str) -> str:
            with urllib.request.urlopen(base + path, timeout=10) as reply:
                return str(reply.read().decode())

        def ready() -> bool:
            try:
                return answer("/readyz") == "ok\n"
            except urllib.error.HTTPError:
                return False

        eventually(ready)
        assert answer("/livez") == "ok\n"
        samples = parsed(answer("/metrics"))
        assert samples["penstock_runs_pending", ()] == 4
        assert samples["penstock_redis_up", ()] == 0
        assert "penstock_build_info" in {name for name, _ in samples}
        write_big(open_store(f"{tmp_path}/dataset-0"), plan(0, CHUNKS[0]), range(CHUNKS[0]))

        def complete() -> bool:
            wanted = of(parsed(answer("/metrics")), "penstock_dataset_chunks_wanted")
            return wanted == {f"{tmp_path}/dataset-0": 0}

        eventually(complete)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(timeout=30) == 0
    assert "Traceback" not in said
