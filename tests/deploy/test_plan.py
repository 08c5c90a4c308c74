"""The planner: its figures against what is really stored, what it refuses, and that it writes nothing."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from penstock.common.model import language_model
from penstock.deploy.cli import main
from penstock.deploy.config import Config, load_config
from penstock.deploy.plan import fit as plan_fit
from penstock.deploy.plan import rows as plan_rows
from penstock.deploy.plan.cost import price
from penstock.deploy.plan.make import make_plan
from penstock.deploy.plan.record import Plan, Prices
from penstock.deploy.plan.time import Course, Job, overlap
from penstock.store.objects import open_store
from penstock.store.writer import DatasetWriter
from services.command import small_config, write_config
from services.lm import shipped_model
from services.moto import MotoServer
from services.trees import tree_digests


@pytest.fixture(autouse=True)
def model_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model is loaded once for all plans."""
    monkeypatch.setattr(language_model, "LanguageModel", lambda files, settings: shipped_model())


def config_file(tmp_path: Path, **changes: Any) -> Path:
    return write_config(tmp_path / "config.yaml", small_config(tmp_path / "work", **changes))


def small(tmp_path: Path, **changes: Any) -> Config:
    return load_config(str(config_file(tmp_path, **changes)))


def stored(directory: Path) -> tuple[int, int]:
    files = [file for file in directory.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files), len(files)


def test_bytes_and_objects_are_those_of_a_run(small_run: Path, tmp_path: Path) -> None:
    plan = make_plan(small(tmp_path), Prices(), probing=False)
    total = [0, 0]
    for part in ("dataset", "corpus", "runs"):
        size, objects = stored(small_run / part)
        assert plan.parts[part]["bytes"] == pytest.approx(size, rel=0.02)
        assert plan.parts[part]["objects"] == objects
        total[0], total[1] = total[0] + size, total[1] + objects
    assert plan.total["bytes"] == pytest.approx(total[0], rel=0.02)
    assert plan.total["objects"] == total[1]
    for name, hook in plan.hooks.items():
        size, _ = stored(small_run / "dataset" / "activations.zarr" / "acts" / name / "c")
        assert hook["bytes"] == size
    metadata = stored(small_run / "dataset")[0] - stored(small_run / "dataset" / "activations.zarr")[0]
    zarr = (small_run / "dataset" / "activations.zarr").rglob("zarr.json")
    metadata += sum(file.stat().st_size for file in zarr)
    assert plan.parts["metadata"]["bytes"] == pytest.approx(metadata, rel=0.05)
    assert not plan.estimated


def test_compressed_bytes_are_measured(tmp_path: Path) -> None:
    from penstock.producer.corpus import ensure_corpus
    from penstock.producer.plan import plan_dataset
    from penstock.producer.source import LanguageModelSource
    from services.lm import shipped_tokenizer

    config = small(tmp_path, dataset__codec="bytes+blosc+crc32c", dataset__max_rows=8_000, runs=[])
    plan = make_plan(config, Prices())
    corpus = ensure_corpus(config.corpus, shipped_tokenizer(), lambda done, wanted: None)
    manifest = plan_dataset(config.dataset, corpus, shipped_model())
    writer = DatasetWriter(open_store(config.dataset.url), manifest)
    source = LanguageModelSource(manifest, corpus, shipped_model())
    for index in range(manifest.n_chunks):
        writer.write(index, source.chunk(index))
    writer.close()
    for name, hook in plan.hooks.items():
        size, _ = stored(Path(config.dataset.url) / "activations.zarr" / "acts" / name / "c")
        plain = 2 * hook["d_in"] * manifest.n_chunks * manifest.rows_per_chunk
        assert size < 0.9 * plain
        assert hook["bytes"] == pytest.approx(size, rel=0.02)


def test_a_long_text_is_estimated_from_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(tmp_path, corpus__max_tokens=300_000, dataset__max_rows=None)
    exact = make_plan(config, Prices(), probing=False)
    monkeypatch.setattr(plan_rows, "SAMPLE_TOKENS", 50_000)
    plan = make_plan(config, Prices(), probing=False)
    assert plan.estimated
    assert plan.rows == pytest.approx(exact.rows, rel=0.02)
    assert plan.parts["dataset"]["bytes"] == pytest.approx(exact.parts["dataset"]["bytes"], rel=0.02)
    limited = small(tmp_path, corpus__max_tokens=None, dataset__max_rows=200_000)
    plan = make_plan(limited, Prices(), probing=False)
    assert 200_000 <= plan.rows < 203_000


def test_it_writes_nothing(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(config_file(tmp_path)), "--gb-month", "0.02", "--gpu-hour", "2"])
    said = capsys.readouterr().out
    assert "storing pays off from" in said
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    before = tree_digests(small_run)
    main(["plan", str(small_run.parent / "config.yaml"), "--no-probe"])
    assert "16 chunks are there already" in capsys.readouterr().out
    assert tree_digests(small_run) == before


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(config_file(tmp_path)), "--json", "--gb-month", "1", "--gpu-hour", "1"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["rows"] >= 31_000
    assert plan["hooks"]["blocks.0.mlp.hook_post"]["d_in"] == 768
    seconds = plan["seconds"]
    assert 0 < seconds["producing"] < 120
    assert 0 < seconds["training"] < 120
    assert max(seconds["producing"], seconds["training"]) < seconds["whole"]
    for rate in plan["rates"].values():
        assert 50 < rate < 1e7
    assert plan["memory"]["producer"] > 2 * plan["parts"]["dataset"]["bytes"] / plan["chunks"]
    assert set(plan["costs"]) > {"storing", "making once", "stored", "made again", "pays off from passes"}


Usage = namedtuple("Usage", "free")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset__quota_bytes": 1_000_000}, ["dataset.quota_bytes", "1,000,000"]),
        ({"dataset__max_rows": 10_000_000}, ["dataset.max_rows", "10000000"]),
        ({"dataset__sequences_per_chunk": 400}, ["dataset.sequences_per_chunk", "64 MiB"]),
        ({"dataset__memory_bytes": 1_000_000}, ["dataset.memory_bytes"]),
        (
            {"dataset__retention": "window", "dataset__budget_bytes": 8_000_000},
            ["dataset.budget_bytes", "small"],
        ),
        ({"dataset__hooks": ["blocks.1.hook_resid_post"]}, ["blocks.0.mlp.hook_post"]),
    ],
)
def test_what_cannot_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    refused(capsys, config_file(tmp_path, **changes), *words)


def refused(capsys: pytest.CaptureFixture[str], file: Path, *words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(file), "--no-probe"])
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert not (file.parent / "work" / "runs").exists()


def test_too_little_disk_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000_000))
    refused(capsys, config_file(tmp_path), "dataset.url", "10,000,000 are free")


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (0.3e9, ["runs: small", "window_chunks"]),
        (0.9e9, ["producers, trainers: 3 and 1 processes"]),
    ],
)
def test_too_little_memory_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    free: float,
    words: list[str],
) -> None:
    monkeypatch.setattr("penstock.common.memory.held_bytes", lambda: 300_000_000)
    monkeypatch.setattr(plan_fit, "held_bytes", lambda: 0)
    monkeypatch.setattr(plan_fit, "free_bytes", lambda device: int(free))
    refused(capsys, config_file(tmp_path, producers=3), *words)


def test_another_dataset_at_the_url_is_refused(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_run / "dataset", tmp_path / "work" / "dataset")
    refused(capsys, config_file(tmp_path, dataset__seed=7), "another dataset", "seed is 0 there and 7 here")


def test_prices() -> None:
    plan = Plan("somewhere", parts={"dataset": {"bytes": 500_000_000_000, "objects": 1}})
    price(plan, Prices(gb_month=0.02, gpu_hour=2.5, months=6), hours=8, passes=5)
    assert plan.costs["storing"] == pytest.approx(60)
    assert plan.costs["making once"] == pytest.approx(20)
    assert plan.costs["stored"] == pytest.approx(80)
    assert plan.costs["made again"] == pytest.approx(100)
    # four passes cost 80 either way, five cost 100 against 80
    assert plan.costs["pays off from passes"] == 5
    without = Plan("somewhere", parts=plan.parts)
    price(without, Prices(), hours=8, passes=5)
    assert not without.costs
    assert without.notes == ["cost: give --gb-month and --gpu-hour"]


@pytest.mark.parametrize(
    ("producing", "training", "trainers", "cores", "expected"),
    [
        # each alone
        ([10, 10], [], 0, 2, (10, 0)),
        ([], [10, 10, 4], 2, 2, (0, 14)),
        # three processes on two processors get 2/3 each until the producers end
        ([20, 20], [60], 1, 2, (30, 70)),
        # enough processors: a trainer that is faster ends with the producers
        ([10], [1], 1, 4, (10, 10)),
        ([10], [30], 1, 4, (10, 30)),
    ],
)
def test_processes_share_a_machine(
    producing: list[float],
    training: list[float],
    trainers: int,
    cores: float,
    expected: tuple[float, float],
) -> None:
    course = overlap([Job(s) for s in producing], [Job(s) for s in training], trainers, {"cpu": cores})
    assert (course.produced, course.trained) == pytest.approx(expected, rel=0.01)


def test_the_last_window_is_trained_after_the_last_chunk() -> None:
    training = Job(10, window=0.5)
    assert overlap([Job(100)], [training], 1, {"cpu": 4}).trained == pytest.approx(105, rel=0.01)
    twice = Job(10, epochs=2)
    assert overlap([Job(100)], [twice], 1, {"cpu": 4}).trained == pytest.approx(105, rel=0.01)
    assert overlap([], [], 1, {"cpu": 4}) == Course(0, 0)


def test_a_bucket_is_written_to_only_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MotoServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        url = f"s3://{server.make_bucket()}/acts"
        config = small(tmp_path, dataset__url=url, dataset__max_rows=4_000, runs=[], trainers=0)
        seen: list[str] = []
        monkeypatch.setattr(
            "penstock.store.s3.S3Store._create", _seeing(seen, "penstock.store.s3.S3Store._create")
        )
        plan = make_plan(config, Prices())
        assert any("--probe-store" in note for note in plan.notes)
        assert not seen
        plan = make_plan(config, Prices(), probe_store=True)
        assert not any("--probe-store" in note for note in plan.notes)
        assert seen
        assert list(open_store(url).list("")) == []


def _seeing(seen: list[str], name: str) -> Any:
    from penstock.store.s3 import S3Store

    create = S3Store._create

    def spy(self: S3Store, key: str, data: bytes) -> bool:
        seen.append(key)
        return create(self, key, data)

    return spy
