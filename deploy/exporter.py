"""`penstock exporter`: publishes what the store and Redis hold, whether or not anybody works.

It looks in intervals, in threads of its own; a scrape reads the last look and asks nothing.
"""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from penstock.common.errors import PenstockError
from penstock.common.health import Health, HealthServer
from penstock.common.logs import LOGGER, tell_about
from penstock.common.metrics import REGISTRY
from penstock.common.process import stop_on_signals, worker_name
from penstock.deploy.config import Config
from penstock.deploy.exported import Space, families, free_samples, space_samples, survey_samples
from penstock.deploy.survey import Survey, Surveyor
from penstock.store.objects import ObjectStore, open_store

COUNT_SECONDS = 600.0
"""Pause between counts of the bytes stored, which list every object."""
REMIND_SECONDS = 300.0
"""A trouble that lasts is said again this often."""


class Published(Collector):
    """The last look, as Prometheus takes it."""

    def __init__(self) -> None:
        self.survey: Survey | None = None
        self.succeeded = False
        self.spaces: dict[str, Space] = {}
        self.free: dict[str, int] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield from families(self._samples())

    def _samples(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        yield "penstock_exporter_look_success", (), float(self.succeeded)
        if self.survey is not None:
            yield from survey_samples(self.survey)
        yield from space_samples(self.spaces)
        yield from free_samples(self.free)


class Exporter:
    """Looks again and again.

    Args:
        pause: seconds between looks.
    """

    def __init__(self, config: Config, published: Published, health: Health, pause: float) -> None:
        self._config = config
        self._published = published
        self._health = health
        self._pause = pause
        self._surveyor = Surveyor(config)
        self._said: dict[str, tuple[str, float]] = {}

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set."""
        counter = threading.Thread(target=self._count_until, args=(stop,), name="count", daemon=True)
        counter.start()
        while not stop.is_set():
            self.look()
            stop.wait(self._pause)

    def look(self) -> None:
        """Look once; what cannot be seen now stays as it was."""
        published = self._published
        try:
            # first: a disk that fills may be why the look fails
            published.free = free_space(self._config)
            survey = self._surveyor.look()
        except PenstockError as error:
            published.succeeded = False
            self._say("store", str(error))
        except Exception as error:
            # nothing that it meets may end what scaling reads
            published.succeeded = False
            LOGGER.exception("the look failed: %s", error)
        else:
            published.survey, published.succeeded = survey, True
            self._health.ready = True
            self._say("store", None)
            self._say("redis", survey.redis_error)
        # the loop itself is well: it says what it cannot see
        self._health.beat()

    def _say(self, what: str, trouble: str | None) -> None:
        """Say a trouble once, and again while it lasts; say when it is over."""
        before, at = self._said.pop(what, (None, 0.0))
        now = time.monotonic()
        if trouble is None:
            if before is not None:
                LOGGER.info("%s: answers again", what)
            return
        if trouble != before or now - at > REMIND_SECONDS:
            LOGGER.warning("%s: %s", what, trouble)
            at = now
        self._said[what] = trouble, at

    def _count_until(self, stop: threading.Event) -> None:
        while not stop.is_set():
            started = time.monotonic()
            try:
                self._published.spaces = count_space(self._config, stop)
            except PenstockError as error:
                LOGGER.warning("bytes stored are not counted: %s", error)
            except Exception as error:
                # as for a look
                LOGGER.exception("bytes stored are not counted: %s", error)
            # what takes long is done less often
            stop.wait(max(COUNT_SECONDS, 10 * (time.monotonic() - started)))


def count_space(config: Config, stop: threading.Event) -> dict[str, Space]:
    """Bytes below the URLs of the datasets and of the runs, by URL."""
    found = {}
    for url in dict.fromkeys([*config.dataset_urls(), config.runs_url]):
        store = open_store(url)
        quota = config.dataset.quota_bytes if url == config.dataset.url else None
        found[store.url] = Space(store.url, _bytes(store, stop), quota)
    return found


def free_space(config: Config) -> dict[str, int]:
    """Free bytes below the work directory and the URLs of datasets and runs that are local, by URL.

    With S3 from the same machine the work directory commonly shares its disk.
    It is asked at every look, and costs no listing: a disk may fill while bytes are being counted.
    """
    stored = [config.workdir, *config.dataset_urls(), config.runs_url]
    urls = (url.removeprefix("file://") for url in stored)
    paths = [str(Path(url).absolute()) for url in urls if "://" not in url]
    return {path: free for path in paths if (free := _free(path)) is not None}


def _bytes(store: ObjectStore, stop: threading.Event) -> int | None:
    total = 0
    for _, size in store.list(""):
        if stop.is_set():
            return None
        total += size
    return total


def _free(path: str) -> int | None:
    # before anything is stored there is no directory yet
    there = next((path for path in (Path(path), *Path(path).parents) if path.exists()), None)
    return shutil.disk_usage(there).free if there else None


def export(config: Config, pause: float) -> None:
    """Publish until SIGTERM or SIGINT.

    Args:
        pause: seconds between looks.

    Raises:
        ConfigError: the port is taken.
    """
    from importlib.metadata import version

    from penstock.common import metrics

    stop = stop_on_signals()
    tell_about(role="exporter", worker=worker_name("exporter"))
    health, published = Health(), Published()
    REGISTRY.register(published)
    metrics.build_info.labels(version("penstock"), version("torch")).set(1)
    server = HealthServer(health, config.metrics.host, config.metrics.port)
    LOGGER.info("exporting what is below %s", config.runs_url, extra={"port": server.port})
    try:
        Exporter(config, published, health, pause).run(stop)
    finally:
        server.close()
        REGISTRY.unregister(published)
