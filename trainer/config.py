"""A run: settings as the user writes them, and the resolved, immutable config.json."""

import hashlib
import json
from typing import Any, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from penstock.common.errors import ConfigError, DamagedObject
from penstock.common.settings import Settings
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.layout import FORMAT_VERSION, config_key, reader_key
from penstock.store.manifest import check_format
from penstock.store.objects import ObjectStore
from penstock.store.order import ReadingOrder, batch_bounds
from penstock.trainer.sae import AnySettings
from penstock.trainer.sae.base import LOSS_CONVENTION


class RunSettings(Settings):
    """SAEs trained together from the same reads of one dataset."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its id is the name and a digest of everything that defines it."""
    saes: list[AnySettings] = Field(min_length=1)
    """The SAEs; each window is read once and every SAE steps on it."""
    batch_rows: int = Field(4096, ge=1)
    """Rows per step (B)."""
    window_chunks: int = Field(8, ge=1)
    """Chunks mixed in memory (K)."""
    epochs: int = Field(1, ge=1)
    """How often the dataset is read."""
    head_interval: int = Field(4, ge=1)
    """Windows between committed heads."""
    seed: int = 0
    """Seed of the order of windows' rows and of later epochs."""
    strict: bool = False
    """Bit-identical weights whatever is killed: one CPU thread, deterministic CUDA algorithms."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [sae.name for sae in self.saes]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"saes: the name {min(twice)!r} is used twice")
        return self


class DatasetPin(Settings):
    """The dataset a run reads, for ever the same."""

    url: str
    manifest_digest: str
    n_chunks: int
    rows: list[int]
    widths: dict[str, int]
    corpus_digest: str
    source: str
    weights_sha256: str


class RunConfig(Settings):
    """config.json: everything that defines a run."""

    format_version: int
    run_id: str
    dataset: DatasetPin
    settings: RunSettings
    loss_convention: str

    @property
    def order(self) -> ReadingOrder:
        s = self.settings
        return ReadingOrder(self.dataset.n_chunks, s.epochs, s.window_chunks, s.seed)

    @property
    def hooks(self) -> list[str]:
        """Hook points read, each once."""
        return list(dict.fromkeys(sae.hook_name for sae in self.settings.saes))

    def window_rows(self, number: int) -> int:
        """Rows of a window, known before it exists."""
        order = self.order
        window = order.window(number)
        chunks = (order.chunk_at(p) for p in range(window.start, window.stop))
        return sum(self.dataset.rows[chunk] for chunk in chunks)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        windows = range(self.order.n_windows)
        return sum(
            len(batch_bounds(self.window_rows(number), self.settings.batch_rows)) for number in windows
        )

    def total_rows(self) -> int:
        return sum(self.dataset.rows) * self.settings.epochs


def resolve_run(settings: RunSettings, dataset: Dataset) -> RunConfig:
    """Pin the dataset and name the run.

    Raises:
        UserError: the dataset does not hold a hook point.
        ConfigError: k is larger than d_sae.
    """
    manifest = dataset.manifest
    widths = {sae.hook_name: manifest.d_in(sae.hook_name) for sae in settings.saes}
    for sae in settings.saes:
        k = getattr(sae, "k", 0)
        if k > sae.d_sae:
            raise ConfigError(f"saes: {sae.name}: k is {k}, more than its d_sae of {sae.d_sae}")
    pin = DatasetPin(
        url=dataset.url,
        manifest_digest=manifest.digest,
        n_chunks=manifest.n_chunks,
        rows=manifest.rows,
        widths=widths,
        corpus_digest=manifest.corpus.digest,
        source=manifest.source.name,
        weights_sha256=manifest.source.weights_sha256,
    )
    identity = {"settings": settings.model_dump(mode="json"), "dataset": manifest.digest}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return RunConfig(
        format_version=FORMAT_VERSION,
        run_id=f"{settings.name}-{digest[:8]}",
        dataset=pin,
        settings=settings,
        loss_convention=LOSS_CONVENTION,
    )


def submit_run(runs: ObjectStore, dataset: Dataset, settings: RunSettings) -> tuple[RunConfig, bool]:
    """Store a run's config and register it as a reader of its dataset.

    Returns:
        The config, and whether this call submitted it (the same run can be submitted again).
    """
    config = resolve_run(settings, dataset)
    reader: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "run": config.run_id,
        "runs_url": runs.url,
        "start": 0,
    }
    # the reader record comes first: nothing the run needs may vanish once it exists
    dataset.store.create_record(reader_key(config.run_id), reader)
    created = runs.create_record(config_key(config.run_id), config.model_dump(mode="json"))
    return (config, True) if created else (load_run_config(runs, config.run_id), False)


def load_run_config(runs: ObjectStore, run_id: str) -> RunConfig:
    """Read a run's config.json.

    Raises:
        ObjectMissing: no such run.
        DamagedObject: it is damaged.
    """
    key = config_key(run_id)
    record = runs.get_record(key)
    check_format(record, f"{runs.url}/{key}")
    try:
        return TypeAdapter(RunConfig).validate_python(record)
    except ValidationError as error:
        raise DamagedObject(f"{runs.url}/{key} is not a run config") from error


def run_ids(runs: ObjectStore) -> list[str]:
    """Ids of all runs below a runs URL."""
    found = set()
    for key, _ in runs.list(""):
        parts = key.split("/")
        if len(parts) == 2 and parts[1] == "config.json":
            found.add(parts[0])
    return sorted(found)


def open_pinned(config: RunConfig) -> Dataset:
    """Open a run's dataset and check that it is the one pinned.

    Raises:
        ConfigError: another dataset is at that URL now.
    """
    dataset = open_dataset(config.dataset.url)
    if dataset.manifest.digest != config.dataset.manifest_digest:
        raise ConfigError(
            f"run {config.run_id}: the dataset at {config.dataset.url} is not the one it was submitted "
            "with (its manifest differs); restore that dataset or submit the run again"
        )
    return dataset
