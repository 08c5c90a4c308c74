"""A run: settings as the user writes them, and the resolved, immutable config.json."""

import hashlib
import json
from typing import Self

from pydantic import Field, ValidationError, model_validator

from penstock.common.errors import ConfigError, DamagedObject, UserError
from penstock.common.settings import Settings
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.heads import CHECKPOINTS_KEPT
from penstock.store.layout import FORMAT_VERSION, config_key
from penstock.store.manifest import check_format
from penstock.store.objects import ObjectStore
from penstock.store.order import ReadingOrder, batch_bounds
from penstock.store.retention import Reader, register_reader
from penstock.trainer.initial import InitialWeights, pin_initial, store_initial
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
    start: int
    """The position that the run begins at: chunks before it were deleted when it was submitted."""
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
    initial: dict[str, InitialWeights] = {}
    """What SAEs start from, by SAE, where that was imported."""
    loss_convention: str

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        pin = self.dataset
        if pin.n_chunks != len(pin.rows) or not 0 <= pin.start < max(1, pin.n_chunks):
            raise ValueError("dataset: rows, n_chunks and start do not fit together")
        if pin.start % self.settings.window_chunks or min(pin.rows, default=0) < 0:
            raise ValueError("dataset: start is not where a window begins, or rows are negative")
        if missing := set(self.hooks) - set(pin.widths):
            raise ValueError(f"dataset: no width of {min(missing)}")
        if self.initial.keys() != {sae.name for sae in self.settings.saes if sae.init_from is not None}:
            raise ValueError("initial: does not fit the SAEs' init_from")
        return self

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

    @property
    def windows(self) -> range:
        """Numbers of the windows that the run reads."""
        return range(self.order.window_starting_at(self.dataset.start), self.order.n_windows)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        batch_rows = self.settings.batch_rows
        return sum(len(batch_bounds(self.window_rows(number), batch_rows)) for number in self.windows)

    def total_rows(self) -> int:
        return sum(self.window_rows(number) for number in self.windows)


def chunks_needed(settings: RunSettings, n_chunks: int) -> int:
    """Chunks that a run must be able to have ahead of what it may still have to read again.

    That is the stretch from its older kept checkpoint, over the newest, to the head after that.
    """
    return min(n_chunks, CHECKPOINTS_KEPT * settings.head_interval * settings.window_chunks)


def check_budget(settings: RunSettings, n_chunks: int, budget_chunks: int | None) -> int:
    """What a run needs (`chunks_needed`); raises ConfigError if a budget does not hold that."""
    needs = chunks_needed(settings, n_chunks)
    if budget_chunks is not None and budget_chunks < needs:
        raise ConfigError(
            f"dataset.budget_bytes: holds {budget_chunks} chunks, but run {settings.name} needs {needs} "
            f"({CHECKPOINTS_KEPT} × head_interval × window_chunks); raise it, or lower these"
        )
    return needs


def resolve_run(settings: RunSettings, dataset: Dataset, start: int = 0) -> RunConfig:
    """Pin the dataset and name the run.

    Raises:
        UserError: the dataset does not hold a hook point.
        ConfigError: k is larger than d_sae, the dataset is gone before its second epoch, or an SAE cannot
            start from what its `init_from` names.
    """
    manifest = dataset.manifest
    widths = {sae.hook_name: manifest.d_in(sae.hook_name) for sae in settings.saes}
    for sae in settings.saes:
        k = getattr(sae, "k", 0)
        if k > sae.d_sae:
            raise ConfigError(f"saes: {sae.name}: k is {k}, more than its d_sae of {sae.d_sae}")
    if manifest.retention == "window" and settings.epochs > 1:
        raise ConfigError(
            f"runs: {settings.name}: epochs is {settings.epochs}, but the dataset keeps only a window "
            "(retention: window); use one epoch, or retention: keep"
        )
    pin = DatasetPin(
        url=dataset.url,
        manifest_digest=manifest.digest,
        n_chunks=manifest.n_chunks,
        rows=manifest.rows,
        start=start,
        widths=widths,
        corpus_digest=manifest.corpus.digest,
        source=manifest.source.name,
        weights_sha256=manifest.source.weights_sha256,
    )
    pins = {sae.name: pin_initial(sae, widths[sae.hook_name]) for sae in settings.saes}
    initial = {name: pin for name, pin in pins.items() if pin is not None}
    identity = _identity(settings, manifest.digest, initial)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return RunConfig(
        format_version=FORMAT_VERSION,
        run_id=f"{settings.name}-{digest[:8]}",
        dataset=pin,
        settings=settings,
        initial=initial,
        loss_convention=LOSS_CONVENTION,
    )


def _identity(
    settings: RunSettings, dataset_digest: str, initial: dict[str, InitialWeights]
) -> dict[str, object]:
    """What makes a run this run: of imported weights what they are, not where they were."""
    told = settings.model_dump(mode="json")
    for sae in told["saes"]:
        del sae["init_from"]
    identity: dict[str, object] = {"settings": told, "dataset": dataset_digest}
    if initial:
        identity["initial"] = {name: pin.model_dump(mode="json") for name, pin in initial.items()}
    return identity


def submit_run(
    runs: ObjectStore, dataset: Dataset, settings: RunSettings, budget_chunks: int | None = None
) -> tuple[RunConfig, bool]:
    """Store a run's config and register it as a reader of its dataset.

    Args:
        budget_chunks: what the dataset holds at a time, if it keeps only a window.

    Returns:
        The config, and whether this call submitted it (the same run can be submitted again).

    Raises:
        ConfigError: the budget is too small for the run.
        UserError: the dataset has nothing left for it.
    """
    config = resolve_run(settings, dataset)
    if runs.exists(config_key(config.run_id)):
        return load_run_config(runs, config.run_id), False
    order, needs = config.order, check_budget(settings, dataset.n_chunks, budget_chunks)
    # the reader record comes first: nothing the run needs may vanish once it exists
    reader = Reader(config.run_id, runs.url, 0, needs)
    floor = register_reader(dataset.store, reader, dataset.manifest.retention == "window")
    start = -(-floor // order.window_chunks) * order.window_chunks
    if start >= dataset.n_chunks:
        raise UserError(
            f"run {config.run_id}: {dataset.url} keeps only a window, and nothing of it is left to read"
        )
    config = resolve_run(settings, dataset, start)
    store_initial(runs, config.run_id, settings.saes, config.initial)
    new = runs.create_guarded(config_key(config.run_id), config.model_dump(mode="json"))
    return (config, True) if new else (load_run_config(runs, config.run_id), False)


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
        return RunConfig.model_validate(record)
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
