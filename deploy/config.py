"""The configuration file: one YAML file describes corpus, dataset, runs and the processes for them."""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator

from penstock.common.errors import ConfigError
from penstock.common.model.files import ModelSettings
from penstock.common.redact import public_url
from penstock.common.redis import RedisSettings
from penstock.common.settings import Settings, load_yaml, parse
from penstock.producer.corpus import CorpusSettings
from penstock.producer.plan import DatasetSettings
from penstock.producer.toy import ToySettings
from penstock.trainer.config import RunSettings
from penstock.trainer.judging.settings import JudgingSettings

S = TypeVar("S", bound=Settings)


class TrainerSettings(Settings):
    """Where SAEs train."""

    device: str = "cpu"
    """torch device of each trainer: cpu, cuda, cuda:1, …"""
    threads: int | None = Field(None, ge=1)
    """CPU threads per trainer; null leaves it to torch. Runs with `strict` always use one."""
    evaluate_every: int = Field(0, ge=0)
    """Rows trained between evaluations inside the language model, each after a head; 0 makes none."""


class MetricsSettings(Settings):
    """Each process's own HTTP port for /metrics, /livez and /readyz."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 in containers."""
    port: int = Field(0, ge=-1, le=65535)
    """TCP port; 0 takes a free one (shown in the log and by status), −1 serves nothing."""


class EvaluationSettings(JudgingSettings):
    """The evaluation that ends a run (`sequences`), and `penstock evaluate` (all the others)."""

    sequences: int = Field(64, ge=1)
    """Held-out sequences used for the report that ends a run."""
    live_sequences: int = Field(4, ge=1)
    """Held-out sequences used by each evaluation during training (trainer.evaluate_every)."""


class Config(Settings):
    """Everything. Relative URLs are below `workdir`; other relative paths are below the current directory."""

    workdir: str = "."
    """Directory for everything that has no URL of its own; created if missing."""
    model: ModelSettings = ModelSettings()
    """The language model."""
    corpus: CorpusSettings = CorpusSettings()
    """The text."""
    toy: ToySettings | None = None
    """Toy data with a known ground truth; a config with it has neither `model` nor `corpus`."""
    dataset: DatasetSettings
    """The activations."""
    runs_url: str = "runs"
    """Where runs are stored: a path (relative to workdir) or s3://…"""
    runs: list[RunSettings] = []
    """The trainings."""
    producers: int = Field(1, ge=0)
    """Producer processes started by `penstock run`; one per device is best on GPUs."""
    trainers: int = Field(1, ge=0)
    """Trainer processes started by `penstock run`."""
    trainer: TrainerSettings = TrainerSettings()
    """Settings of trainer processes."""
    redis: RedisSettings = RedisSettings()
    """The queue."""
    metrics: MetricsSettings = MetricsSettings()
    """Monitoring."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Evaluation and report."""
    json_logs: bool = False
    """Log JSON lines instead of text."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    library_logs: bool = False
    """Log what libraries say, too, from log_level on; otherwise their warnings."""

    def encode(self) -> str:
        """As JSON that `load_config` takes, for a file that stays: without the password of `redis.url`."""
        without = {"model", "corpus"} if self.toy is not None else set()
        redis = self.redis
        if redis.url is not None:
            redis = redis.model_copy(update={"url": public_url(redis.url)})
        stays = self.model_copy(update={"redis": redis})
        return stays.model_dump_json(indent=1, exclude=without) + "\n"

    @model_validator(mode="before")
    @classmethod
    def _frame_grids(cls, data: Any) -> Any:
        """Grids of toy data are relative to what these are made of."""
        if not isinstance(data, dict) or "toy" not in data:
            return data
        from penstock.deploy.toy_grid import with_frames

        return with_frames(data)

    @property
    def directory(self) -> Path:
        return Path(self.workdir)

    def datasets_of(self, run: RunSettings) -> list[str]:
        """URLs of the datasets that a run reads as one."""
        return run.datasets or [self.dataset.url]

    def dataset_urls(self) -> list[str]:
        """URLs of all datasets, each once: the one that is made here, and those that runs read besides."""
        read = (url for run in self.runs for url in self.datasets_of(run))
        return list(dict.fromkeys([self.dataset.url, *read]))


def load_config(path: str, workdir: str | None = None) -> Config:
    """Read and resolve a config file.

    Args:
        workdir: overrides the file's.

    Raises:
        ConfigError: naming the file, the field and the fix.
    """
    data = load_yaml(Path(path))
    if workdir is not None:
        data["workdir"] = workdir
    config = parse(Config, data, path)
    if both := sorted({"model", "corpus"} & data.keys()) if config.toy is not None else []:
        raise ConfigError(
            f"{path}: {both[0]}: toy data are made from no model and no text; leave out {both[0]} or toy"
        )
    names = [run.name for run in config.runs]
    if len(set(names)) != len(names):
        raise ConfigError(f"{path}: runs: two runs have the same name")
    base = _expanded(config.workdir, f"{path}: workdir").absolute()

    def resolved(url: str, field: str) -> str:
        return url if "://" in url else str(base / _expanded(url, f"{path}: {field}"))

    dataset = _with(
        config.dataset,
        url=resolved(config.dataset.url, "dataset.url"),
        after=[resolved(url, "dataset.after") for url in config.dataset.after],
    )
    if dataset.url in dataset.after:
        raise ConfigError(f"{path}: dataset.after: {dataset.url} is the dataset itself; name an earlier one")
    runs = [
        _with(run, datasets=[resolved(url, f"runs.{run.name}.datasets") for url in run.datasets])
        for run in config.runs
    ]
    return _with(
        config,
        workdir=str(base),
        runs_url=resolved(config.runs_url, "runs_url"),
        corpus=_with(config.corpus, url=resolved(config.corpus.url, "corpus.url")),
        dataset=dataset,
        runs=runs,
    )


def _with(settings: S, **changes: Any) -> S:
    return settings.model_copy(update=changes)


def _expanded(path: str, field: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{field}: {path}: there is no such home directory") from error
