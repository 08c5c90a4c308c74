"""The dataset card: what it says, that its code runs, and that it gives nothing of the machine away."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml

from penstock.deploy.card import Licences, shown_url, write_card
from penstock.deploy.cli import main
from penstock.store.arrays import BFLOAT16, BLOSC
from penstock.store.chunks import Chunk
from penstock.store.dataset import open_dataset
from penstock.store.objects import open_store
from penstock.store.statistics import BINS, measure_statistics
from penstock.store.writer import DatasetWriter
from services.moto import MotoServer
from services.synthetic import MLP, RESID, ROWS, SyntheticSource, make_manifest, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("somewhere") / "my-activations"
    write_dataset(directory)
    return directory


def card_of(url: object, out: Path, licences: Licences | None = None) -> str:
    return write_card(str(url), out / "README.md", licences or Licences())[0].read_text(encoding="utf-8")


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def run_code(code: str, cwd: Path, then: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{then}"], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_can_be_opened_as_the_card_says(dataset: Path, tmp_path: Path) -> None:
    """Also without Penstock: the last two never import it."""
    ours, tensorstore, plain = code_blocks(card_of(dataset, tmp_path))
    opened = open_dataset(str(dataset))
    *_, last = opened.batches([RESID], batch_rows=4096)
    total = int(last[RESID].view(torch.int16).long().sum())
    then = "import torch; print(rows.dtype, rows.shape[1], int(rows.view(torch.int16).long().sum()))"
    assert run_code(ours, dataset.parent, then) == f"torch.bfloat16 8 {total}"
    first = opened.read_chunk(0, [RESID]).acts[RESID].view(np.uint16)
    for code in (tensorstore, plain):
        assert len([line for line in code.splitlines() if line]) <= 5
        then = "import sys; assert 'penstock' not in sys.modules\nprint(chunk.dtype, chunk.shape, "
        then += f"int(chunk[:{len(first)}].view('uint16').astype('int64').sum()))"
        said = run_code(code, dataset.parent, then)
        assert said == f"bfloat16 (210, 8) {int(first.astype(np.int64).sum())}"


def test_an_unfinished_dataset_can_be_opened_as_the_card_says(tmp_path: Path) -> None:
    write_dataset(tmp_path / "half", indices=[3, 5])
    card = card_of(tmp_path / "half", tmp_path)
    assert "not complete: 2 of 16 chunks" in card
    rows = open_dataset(str(tmp_path / "half")).read_chunk(3, [RESID]).acts[RESID]
    total = int(rows.view(np.uint16).astype(np.int64).sum())
    then = "import numpy as np; a = globals().get('rows', globals()['chunk'])\n"
    then += f"print(int(a[:{len(rows)}].view(np.uint16).astype(np.int64).sum()))"
    for code in code_blocks(card):
        assert run_code(code, tmp_path, then) == str(total)


def test_a_compressed_dataset_can_be_opened_as_the_card_says(tmp_path: Path) -> None:
    manifest = make_manifest(ROWS[:2]).model_copy(update={"codec": BLOSC})
    rows = write_dataset(tmp_path / "small", manifest).read_chunk(0, [RESID]).acts[RESID]
    ours, tensorstore = code_blocks(card_of(tmp_path / "small", tmp_path))
    assert run_code(ours, tmp_path, "print(rows.shape[1])") == "8"
    then = f"print(int(chunk[:{len(rows)}].view('uint16').astype('int64').sum()))"
    assert run_code(tensorstore, tmp_path, then) == str(int(rows.view(np.uint16).astype(np.int64).sum()))


def test_the_same_dataset_gives_the_same_bytes_wherever_it_lies(dataset: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other" / dataset.name
    write_dataset(elsewhere)
    written = [
        write_card(str(place), tmp_path / out / "README.md", Licences())
        for place, out in ((dataset, "a"), (elsewhere, "b"))
    ]
    for one, other in zip(*written, strict=True):
        assert one.read_bytes() == other.read_bytes()
        text = one.read_text(encoding="utf-8")
        assert str(dataset.parent) not in text
        assert str(tmp_path) not in text


def test_front_matter_and_licences(dataset: Path, tmp_path: Path) -> None:
    plain = yaml.safe_load(card_of(dataset, tmp_path).split("---")[1])
    assert plain["license"] == "unknown"
    assert plain["size_categories"] == ["1K<n<10K"]
    assert "activations" in plain["tags"]
    stated = Licences("cc-by-4.0", "apache-2.0", "PSF | 2")
    card = card_of(dataset, tmp_path, stated)
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-4.0"
    assert "| licence of the model | apache-2.0 |" in card
    assert "| licence of the text | PSF \\| 2 |" in card


def test_licences_are_not_guessed(dataset: Path, tmp_path: Path) -> None:
    card = card_of(dataset, tmp_path)
    for line in ("licence", "licence of the model", "licence of the text"):
        assert f"| {line} | not stated |" in card


def test_what_it_was_made_from(dataset: Path, tmp_path: Path) -> None:
    card, manifest = card_of(dataset, tmp_path), make_manifest()
    for word in (
        manifest.digest,
        "w" * 64,
        "c" * 64,
        "t" * 64,
        "`bytes+crc32c`",
        f"{sum(ROWS):,} of",
        RESID,
        MLP,
    ):
        assert word in card


def test_figures(dataset: Path) -> None:
    opened = open_dataset(str(dataset))
    found = measure_statistics(opened)
    everything = [opened.read_chunk(i) for i in range(16)]
    assert (found.chunks, found.rows, found.first) == (16, sum(ROWS), 0)
    objects = [file for file in (dataset / "activations.zarr").rglob("c/**/*") if file.is_file()]
    assert len(objects) == 5 * 16
    assert found.stored_bytes == sum(file.stat().st_size for file in objects)
    for hook in found.hooks:
        rows = np.concatenate([chunk.acts[hook.name] for chunk in everything]).astype(np.float64)
        norms = np.linalg.norm(rows, axis=1)
        assert hook.mean_norm == pytest.approx(norms.mean())
        assert hook.rms == pytest.approx(np.sqrt((rows**2).mean()))
        assert hook.max_abs == np.abs(rows).max()
        assert hook.counts.sum() == found.sampled_rows == sum(ROWS[::2])
        assert len(hook.counts) == BINS
        sampled = np.concatenate([norms[sum(ROWS[:i]) : sum(ROWS[: i + 1])] for i in range(0, 16, 2)])
        assert hook.edges[-1] == pytest.approx(sampled.max())
        assert (hook.counts == np.histogram(sampled, hook.edges)[0]).all()


def test_dead_and_constant_dimensions(tmp_path: Path) -> None:
    manifest = make_manifest([210, 200], {RESID: 8})
    writer = DatasetWriter(open_store(str(tmp_path / "d")), manifest)
    for index in range(2):
        made = SyntheticSource(manifest).chunk(index)
        acts = made.acts[RESID].astype(np.float32)
        acts[:, [1, 4]], acts[:, 6], acts[:, 7] = 0, 2.5, index  # the last differs between chunks
        writer.write(
            index,
            Chunk(index, {RESID: acts.astype(BFLOAT16)}, made.tokens, made.sequence, made.position),
        )
    writer.close()
    hook = measure_statistics(open_dataset(str(tmp_path / "d"))).hooks[0]
    assert (hook.dead, hook.constant) == (2, 1)
    assert "| 2 (25.0%) | 1 (12.5%) |" in card_of(tmp_path / "d", tmp_path)


def test_plots_lie_beside_the_card(dataset: Path, tmp_path: Path) -> None:
    card, *plots = write_card(str(dataset), tmp_path / "card.md", Licences())
    named = re.findall(r"!\[.*?\]\((.*?)\)", card.read_text(encoding="utf-8"))
    assert [card.parent / name for name in named] == plots
    for plot in plots:
        root = ElementTree.fromstring(plot.read_text(encoding="utf-8"))
        bars = [e for e in root if e.tag.endswith("rect")][1:]
        heights = [float(bar.attrib["height"]) for bar in bars]
        assert len(bars) > 3
        assert max(heights) == pytest.approx(92)
        assert all(float(b.attrib["y"]) + float(b.attrib["height"]) == pytest.approx(118) for b in bars)


@pytest.fixture
def moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[MotoServer]:
    with MotoServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_dataset_on_s3(moto: MotoServer, tmp_path: Path) -> None:
    bucket = moto.make_bucket()
    url = f"s3://{bucket}/some/activations"
    store = open_store(url)
    manifest = make_manifest(ROWS[:3])
    writer = DatasetWriter(store, manifest)
    for index in range(3):
        writer.write(index, SyntheticSource(manifest).chunk(index))
    writer.close()
    card = card_of(url, tmp_path)
    assert f"| dataset | `{url}` |" in card
    ours, tensorstore, plain = code_blocks(card)
    assert f'"bucket": "{bucket}", "path": "some/activations/activations.zarr/acts/{RESID}/"' in tensorstore
    endpoint = f'"endpoint": "{moto.url}", "aws_region": "us-east-1", "bucket"'
    first = open_dataset(url).read_chunk(0, [RESID]).acts[RESID].view(np.uint16)
    total = int(first.astype(np.int64).sum())
    then = f"print(int(chunk[:{len(first)}].view('uint16').astype('int64').sum()))"
    assert run_code(tensorstore.replace('"bucket"', endpoint), tmp_path, then) == str(total)
    assert run_code(plain, tmp_path, then) == str(total)
    assert run_code(ours, tmp_path, "print(rows.shape[1])") == "8"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/home/someone/data/acts", "acts"),
        ("file:///home/someone/acts/", "acts"),
        ("acts", "acts"),
        ("s3://b/p/acts", "s3://b/p/acts"),
    ],
)
def test_local_paths_are_not_shown(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["card", *map(str, arguments)])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_nothing_to_describe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "empty", indices=[])
    said = refused(capsys, tmp_path / "empty", "--out", tmp_path / "README.md")
    assert "no rows yet" in said
    assert not (tmp_path / "README.md").exists()


def test_a_card_that_cannot_be_written(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    said = refused(capsys, dataset, "--out", tmp_path / "file" / "README.md")
    assert "--out" in said
    assert len(said.splitlines()) == 1


def test_the_command(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["card", str(dataset), "--out", str(tmp_path / "CARD.md"), "--text-license", "PSF-2.0"])
    written = capsys.readouterr().out.split()
    assert [Path(name).exists() for name in written] == [True] * 3
    assert "PSF-2.0" in (tmp_path / "CARD.md").read_text(encoding="utf-8")
