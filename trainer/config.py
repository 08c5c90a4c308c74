"""A run: settings as the user writes them, and the resolved, immutable config.json."""

import hashlib
import json
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from penstock.common.errors import ConfigError, DamagedObject, UserError
from penstock.common.settings import Settings
from penstock.store.heads import CHECKPOINTS_KEPT
from penstock.store.joined import JoinedDataset, chunk_name, open_datasets
from penstock.store.layout import FORMAT_VERSION, config_key
from penstock.store.manifest import check_format
from penstock.store.objects import ObjectStore
from penstock.store.order import ReadingOrder, locate
from penstock.store.retention import Reader, register_reader
from penstock.trainer.grid import expand_grid
from penstock.trainer.initial import InitialWeights, pin_initial, store_initial
from penstock.trainer.kinds import LOSS_CONVENTION, AnySettings


class RunSettings(Settings):
    """SAEs trained together from the same reads of one dataset, or of several read as one."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its id is the name and a digest of everything that defines it."""
    datasets: list[str] = []
    """URLs of the datasets read as one (paths are relative to workdir); none means the config's dataset."""
    saes: list[AnySettings] = Field(min_length=1)
    """The SAEs; each window is read once and every SAE steps on it."""
    grid: list[dict[str, Any]] = Field([], exclude=True)
    """Entries that stand for many SAEs: settings, each a value, a list or a range (docs/sweeps.md)."""
    batch_rows: int = Field(4096, ge=1)
    """Rows per step (B)."""
    window_chunks: int | None = Field(None, ge=1)
    """Chunks mixed in memory (K); null means as many as 1 GiB of the run's hook points."""
    epochs: int = Field(1, ge=1)
    """How often the dataset is read."""
    head_interval: int = Field(4, ge=1)
    """Windows between committed heads."""
    seed: int = 0
    """Seed of the order of windows' rows and of later epochs."""
    strict: bool = False
    """Bit-identical weights whatever is killed: one CPU thread, deterministic CUDA algorithms."""

    @model_validator(mode="before")
    @classmethod
    def _expand_grid(cls, data: Any) -> Any:
        """A grid becomes SAEs here, so that nothing that is stored depends on how they were written."""
        if not isinstance(data, dict) or not data.get("grid"):
            return data
        listed = data.get("saes", [])
        return (
            data | {"saes": [*listed, *expand_grid(data["grid"])], "grid": []}
            if isinstance(listed, list)
            else data
        )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [sae.name for sae in self.saes]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"saes: the name {min(twice)!r} is used twice")
        return self


class ResolvedSettings(RunSettings):
    """A run's settings with nothing left open."""

    window_chunks: int = Field(ge=1)
    """Chunks mixed in memory (K)."""


class DatasetPin(Settings):
    """A dataset that a run reads, for ever the same."""

    url: str
    manifest_digest: str
    n_chunks: int
    rows: list[int]
    corpus_digest: str
    source: str
    weights_sha256: str


class RunConfig(Settings):
    """config.json: everything that defines a run."""

    format_version: int
    run_id: str
    datasets: list[DatasetPin] = Field(min_length=1)
    """What it reads, in the order in which chunks are numbered."""
    start: int
    """The position that the run begins at: chunks before it were deleted when it was submitted."""
    widths: dict[str, int]
    """d_in of each hook point read."""
    settings: ResolvedSettings
    initial: dict[str, InitialWeights] = {}
    """What SAEs start from, by SAE, where that was imported."""
    loss_convention: str

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for pin in self.datasets:
            if pin.n_chunks != len(pin.rows) or min(pin.rows, default=0) < 0:
                raise ValueError("datasets: rows and n_chunks do not fit together")
        if not 0 <= self.start < max(1, sum(self.sizes)) or self.start % self.settings.window_chunks:
            raise ValueError("start: not where a window begins")
        if missing := set(self.hooks) - set(self.widths):
            raise ValueError(f"widths: no width of {min(missing)}")
        if self.initial.keys() != {sae.name for sae in self.settings.saes if sae.init_from is not None}:
            raise ValueError("initial: does not fit the SAEs' init_from")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Chunks in each dataset."""
        return tuple(pin.n_chunks for pin in self.datasets)

    @property
    def dataset_urls(self) -> list[str]:
        return [pin.url for pin in self.datasets]

    @property
    def order(self) -> ReadingOrder:
        s = self.settings
        return ReadingOrder(self.sizes, s.epochs, s.window_chunks, s.seed)

    def name_of(self, chunk: int) -> str:
        """What to call a chunk in messages."""
        return chunk_name(self.dataset_urls, self.sizes, chunk)

    @property
    def hooks(self) -> list[str]:
        """Hook points read, each once."""
        return list(dict.fromkeys(hook for sae in self.settings.saes for hook in sae.hooks))

    def window_rows(self, number: int) -> int:
        """Rows of a window, known before it exists."""
        order = self.order
        window = order.window(number)
        chunks = (order.chunk_at(p) for p in range(window.start, window.stop))
        return sum(self._rows_of(chunk) for chunk in chunks)

    @property
    def windows(self) -> range:
        """Numbers of the windows that the run reads."""
        return range(self.order.window_starting_at(self.start), self.order.n_windows)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int((-(-self._rows_of_windows() // self.settings.batch_rows)).sum())

    def total_rows(self) -> int:
        return int(self._rows_of_windows().sum())

    def _rows_of_windows(self) -> npt.NDArray[np.int64]:
        """[windows] `window_rows` of all windows, at once: there may be very many."""
        order = self.order
        rows = np.array([n for pin in self.datasets for n in pin.rows], np.int64)
        starts = np.arange(0, order.n_chunks, order.window_chunks)
        if not len(starts):
            return np.zeros(0, np.int64)
        epochs = [np.add.reduceat(rows[order.epoch_chunks(e)], starts) for e in range(order.epochs)]
        return np.concatenate(epochs)[self.windows.start :]

    def _rows_of(self, chunk: int) -> int:
        part, index = locate(self.sizes, chunk)
        return self.datasets[part].rows[index]


def chunks_needed(settings: ResolvedSettings, n_chunks: int) -> int:
    """Chunks that a run must be able to have ahead of what it may still have to read again.

    That is the stretch from its older kept checkpoint, over the newest, to the head after that.
    """
    return min(n_chunks, CHECKPOINTS_KEPT * settings.head_interval * settings.window_chunks)


def check_budget(config: RunConfig, budget_chunks: int | None) -> int:
    """What a run needs (`chunks_needed`); raises ConfigError if a budget does not hold that."""
    settings = config.settings
    needs = chunks_needed(settings, config.order.n_chunks)
    if budget_chunks is not None and budget_chunks < needs:
        raise ConfigError(
            f"dataset.budget_bytes: holds {budget_chunks} chunks, but run {settings.name} needs {needs} "
            f"({CHECKPOINTS_KEPT} × head_interval of {settings.head_interval} × window_chunks of "
            f"{settings.window_chunks}); raise it, or lower these"
        )
    return needs


def resolve_run(settings: RunSettings, data: JoinedDataset, start: int = 0) -> RunConfig:
    """Pin the datasets and name the run.

    Raises:
        UserError: a dataset does not hold a hook point, or in another width than the others.
        ConfigError: k is larger than d_sae, the dataset is gone before its second epoch, or an SAE cannot
            start from what its `init_from` names.
    """
    widths = {hook: data.d_in(hook) for sae in settings.saes for hook in sae.hooks}
    for sae in settings.saes:
        k = getattr(sae, "k", None) or 0
        if k > sae.d_sae:
            raise ConfigError(f"saes: {sae.name}: k is {k}, more than its d_sae of {sae.d_sae}")
    if data.keeps_window and settings.epochs > 1:
        raise ConfigError(
            f"runs: {settings.name}: epochs is {settings.epochs}, but the dataset keeps only a window "
            "(retention: window); use one epoch, or retention: keep"
        )
    pins = [
        DatasetPin(
            url=part.url,
            manifest_digest=part.manifest.digest,
            n_chunks=part.n_chunks,
            rows=part.manifest.rows,
            corpus_digest=part.manifest.corpus.digest,
            source=part.manifest.source.name,
            weights_sha256=part.manifest.source.weights_sha256,
        )
        for part in data.parts
    ]
    window = settings.window_chunks or data.default_window(list(widths))
    resolved = ResolvedSettings.model_validate({**dict(settings), "window_chunks": window})
    starts = {sae.name: pin_initial(sae, widths) for sae in settings.saes}
    initial = {name: start for name, start in starts.items() if start is not None}
    identity = _identity(resolved, pins, initial)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return RunConfig(
        format_version=FORMAT_VERSION,
        run_id=f"{settings.name}-{digest[:8]}",
        datasets=pins,
        start=start,
        widths=widths,
        settings=resolved,
        initial=initial,
        loss_convention=LOSS_CONVENTION,
    )


def _identity(
    settings: ResolvedSettings, datasets: list[DatasetPin], initial: dict[str, InitialWeights]
) -> dict[str, object]:
    """What makes a run this run: of datasets and imported weights what they are, not where they are."""
    told = settings.model_dump(mode="json", exclude={"datasets"})
    for sae in told["saes"]:
        del sae["init_from"]
    digests = [pin.manifest_digest for pin in datasets]
    identity: dict[str, object] = {"settings": told, "datasets": digests}
    if initial:
        identity["initial"] = {name: pin.model_dump(mode="json") for name, pin in initial.items()}
    return identity


def submit_run(
    runs: ObjectStore, data: JoinedDataset, settings: RunSettings, budget_chunks: int | None = None
) -> tuple[RunConfig, bool]:
    """Store a run's config and register it as a reader of its datasets.

    Args:
        budget_chunks: what the dataset holds at a time, if it keeps only a window.

    Returns:
        The config, and whether this call submitted it (the same run can be submitted again).

    Raises:
        ConfigError: the budget is too small for the run.
        UserError: the dataset has nothing left for it.
    """
    config = resolve_run(settings, data)
    if runs.exists(config_key(config.run_id)):
        return load_run_config(runs, config.run_id), False
    order, needs = config.order, check_budget(config, budget_chunks)
    # the reader records come first: nothing the run needs may vanish once it exists
    reader = Reader(config.run_id, runs.url, 0, needs)
    # what keeps only a window is read alone: its chunks' numbers are positions
    floor = max(register_reader(part.store, reader, data.keeps_window) for part in data.parts)
    start = -(-floor // order.window_chunks) * order.window_chunks
    if start >= data.n_chunks:
        raise UserError(
            f"run {config.run_id}: {data.url} keeps only a window, and nothing of it is left to read"
        )
    config = resolve_run(settings, data, start)
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


def open_pinned(config: RunConfig) -> JoinedDataset:
    """Open a run's datasets and check that they are those pinned.

    Raises:
        ConfigError: another dataset is at one of the URLs now.
    """
    data = open_datasets(config.dataset_urls)
    for pin, part in zip(config.datasets, data.parts, strict=True):
        if part.manifest.digest != pin.manifest_digest:
            raise ConfigError(
                f"run {config.run_id}: the dataset at {pin.url} is not the one it was submitted with (its "
                "manifest differs); restore that dataset or submit the run again"
            )
    return data
