"""How well rows are mixed: counted from what the loader really gives, and broken shuffles are found."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from penstock.common.errors import DamagedObject, UserError
from penstock.store import writer
from penstock.store.arrays import BFLOAT16
from penstock.store.chunks import Chunk
from penstock.store.dataset import Dataset
from penstock.store.mixing import (
    LAGS,
    Mixing,
    autocorrelation,
    chance_autocorrelation,
    measure_mixing,
    pair_counts,
    projection,
)
from penstock.store.objects import open_store
from penstock.store.order import ReadingOrder, Window, batch_bounds
from penstock.store.writer import DatasetWriter
from services.synthetic import CONTEXT, ROWS_PER_CHUNK, make_manifest

HOOK = "rows"
CHUNKS, SEQUENCES = 12, 10
BATCH_ROWS = 64


class Unmixed(ReadingOrder):
    """A reader that does not shuffle its windows."""

    def row_order(self, window: Window, n_rows: int) -> npt.NDArray[np.int64]:
        return np.arange(n_rows)


@dataclass
class Rows:
    """Rows of width 2: the sequence's number (exact in bfloat16), or noise around its vector."""

    topics: int = 0
    noise: bool = True

    def chunk(self, index: int) -> Chunk:
        place = np.arange(ROWS_PER_CHUNK)
        sequence = SEQUENCES * index + place // CONTEXT
        acts = np.stack([sequence, sequence], axis=1).astype(np.float64)
        if self.noise:
            vectors = np.random.default_rng(1).standard_normal((SEQUENCES * CHUNKS, 2))
            acts = vectors[sequence // self.topics if self.topics else sequence]
            acts = acts + np.random.default_rng([2, index]).standard_normal(acts.shape)
        return Chunk(
            index=index,
            acts={HOOK: acts.astype(np.float32).astype(BFLOAT16)},
            tokens=np.ones(ROWS_PER_CHUNK, np.int32),
            sequence=sequence,
            position=(place % CONTEXT).astype(np.int32),
        )


def write(directory: Path, source: Rows, chunks: int = CHUNKS) -> Dataset:
    manifest = make_manifest([ROWS_PER_CHUNK] * CHUNKS, {HOOK: 2})
    store = open_store(str(directory))
    writer = DatasetWriter(store, manifest)
    for index in range(chunks):
        writer.write(index, source.chunk(index))
    writer.close()
    return Dataset(store, manifest)


def measure(dataset: Dataset, window_chunks: int = 3, batch_rows: int = BATCH_ROWS) -> Mixing:
    order = ReadingOrder((CHUNKS,), 1, window_chunks, seed=5)
    return measure_mixing(dataset, order, batch_rows, [HOOK])


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write(tmp_path_factory.mktemp("shuffled"), Rows())


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Rows say which sequence they are of."""
    return write(tmp_path_factory.mktemp("numbered"), Rows(noise=False))


def pairs(sequence: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Pairs of rows, and those of one sequence, by looking at each."""
    alike = sequence[:, None] == sequence[None, :]
    n = len(sequence)
    return n * (n - 1) // 2, (int(alike.sum()) - n) // 2


@pytest.mark.parametrize(("window_chunks", "batch_rows"), [(1, 50), (3, 64), (5, 100), (12, 2520), (40, 7)])
def test_pairs_are_those_of_the_batches_that_a_reader_gets(
    numbered: Dataset, window_chunks: int, batch_rows: int
) -> None:
    seen = [
        pairs(batch[HOOK][:, 0].long().numpy())
        for batch in numbered.batches([HOOK], batch_rows, window_chunks, seed=5)
    ]
    found = measure(numbered, window_chunks, batch_rows).in_batches
    assert (found.pairs, found.same) == (sum(n for n, _ in seen), sum(same for _, same in seen))


def test_expectations_are_exact(shuffled: Dataset) -> None:
    mixing = measure(shuffled)
    one = CONTEXT - 1  # others of a row's own sequence
    assert mixing.exact
    assert mixing.dataset.sequences == CHUNKS * SEQUENCES
    assert mixing.dataset.rate == pytest.approx(one / (CHUNKS * ROWS_PER_CHUNK - 1))
    assert mixing.in_batches.expected_rate == pytest.approx(one / (3 * ROWS_PER_CHUNK - 1))
    assert mixing.as_stored.expected_rate == pytest.approx(one / (ROWS_PER_CHUNK - 1))
    assert mixing.window_rates[3] == pytest.approx(mixing.in_batches.expected_rate)
    assert mixing.window_rates[12] == pytest.approx(mixing.dataset.rate)
    assert list(mixing.window_rates) == [1, 2, 3, 4, 8, 12]


def test_the_rate_is_that_of_the_dataset_times_the_number_of_windows(shuffled: Dataset) -> None:
    """Every sequence lies in one window, whatever its size: only one window mixes like the dataset."""
    mixing = measure(shuffled)
    assert mixing.against_dataset == pytest.approx(4, rel=0.1)
    for size, rate in mixing.window_rates.items():
        assert rate / mixing.dataset.rate == pytest.approx(-(-CHUNKS // size), rel=0.05)
    assert mixing.within == CHUNKS
    whole = measure(shuffled, CHUNKS)
    assert whole.against_dataset == pytest.approx(1, abs=0.1)


def test_shuffled_rows_are_not_complained_about(shuffled: Dataset) -> None:
    mixing = measure(shuffled)
    assert not mixing.in_batches.too_many
    assert not mixing.as_stored.too_many
    assert not mixing.hooks[HOOK].drifts


def test_a_reader_that_does_not_shuffle_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "permutation", lambda n, *_: np.arange(n))
    dataset = write(tmp_path, Rows())
    mixing = measure_mixing(dataset, Unmixed((CHUNKS,), 1, 3, 5), BATCH_ROWS, [HOOK])
    assert mixing.in_batches.too_many
    assert mixing.in_batches.rate > 5 * mixing.in_batches.expected_rate
    assert mixing.hooks[HOOK].rows[0] > 0.3


def test_chunks_in_corpus_order_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window mixes them all the same; whoever reads in stored order gets whole sequences."""
    monkeypatch.setattr(writer, "permutation", lambda n, *_: np.arange(n))
    mixing = measure(write(tmp_path, Rows()))
    assert mixing.as_stored.too_many
    assert not mixing.in_batches.too_many


def test_a_corpus_that_was_not_permuted_is_found(tmp_path: Path) -> None:
    """Neighbouring sequences are of one document, so chunks differ."""
    hook = measure(write(tmp_path, Rows(topics=20))).hooks[HOOK]
    assert hook.drifts
    assert hook.drift > 5


def test_the_correlation_of_rows_of_one_sequence(shuffled: Dataset) -> None:
    """Rows are their sequence's vector plus noise of the same variance: 1/2."""
    hook = measure(shuffled).hooks[HOOK]
    rows = np.concatenate([Rows().chunk(i).acts[HOOK] for i in range(CHUNKS)]).astype(np.float64)
    rows -= rows.mean(axis=0)
    products = rows @ rows.T
    number = np.concatenate([Rows().chunk(i).sequence for i in range(CHUNKS)])
    alike = (number[:, None] == number) & ~np.eye(len(number), dtype=bool)
    direct = products[alike].mean() / np.trace(products) * len(rows)
    assert hook.sequence_correlation == pytest.approx(direct)
    assert hook.sequence_correlation == pytest.approx(0.5, abs=0.1)


def test_effective_rows_foretell_how_batch_means_vary(shuffled: Dataset) -> None:
    """Batches are drawn from 10 sequences of the 120, rows and sequences at random."""
    mixing = measure(shuffled, 1, 100)
    everything = np.concatenate([Rows().chunk(i).acts[HOOK] for i in range(CHUNKS)]).astype(np.float64)
    by_sequence = everything.reshape(CHUNKS * SEQUENCES, CONTEXT, 2)
    draw = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        window = by_sequence[draw.permutation(len(by_sequence))[:SEQUENCES]].reshape(-1, 2)
        means.append(window[draw.permutation(len(window))[: mixing.batch_rows]].mean(axis=0))
    varies = ((np.array(means) - everything.mean(axis=0)) ** 2).sum(axis=1).mean()
    rows = mixing.effective_rows(mixing.in_batches.expected_rate, mixing.hooks[HOOK])
    everywhere = everything.var(axis=0).sum() / rows * (1 - mixing.batch_rows / len(everything))
    assert varies == pytest.approx(everywhere, rel=0.1)
    assert mixing.effective_rows(mixing.dataset.rate, mixing.hooks[HOOK]) == mixing.batch_rows


def test_autocorrelation() -> None:
    wave = np.tile([1.0, -1.0], 500)
    assert autocorrelation(wave) == pytest.approx(
        [(-1) ** lag * (1 - lag / 1000) for lag in range(1, LAGS + 1)]
    )
    assert not autocorrelation(np.ones(5)).any()
    assert not autocorrelation(np.zeros(0)).any()


def test_autocorrelation_by_chance() -> None:
    draw = np.random.default_rng(0)
    values = draw.standard_normal(300)
    seen = np.array([autocorrelation(draw.permutation(values)) for _ in range(4000)])
    for lag in (1, 4):
        mean, deviation = chance_autocorrelation(len(values), lag)
        assert seen[:, lag - 1].mean() == pytest.approx(mean, abs=0.004)
        assert seen[:, lag - 1].std() == pytest.approx(deviation, rel=0.1)


def test_windows_are_read_evenly_when_there_are_many(shuffled: Dataset) -> None:
    order = ReadingOrder((CHUNKS,), 1, 2, seed=5)
    some = measure_mixing(shuffled, order, BATCH_ROWS, [HOOK], max_rows=3 * 2 * ROWS_PER_CHUNK)
    assert some.windows == 3
    assert not some.exact
    assert some.hooks[HOOK].n_rows == 6 * ROWS_PER_CHUNK
    whole = measure_mixing(shuffled, order, BATCH_ROWS, [HOOK])
    assert some.dataset == whole.dataset
    assert some.window_rates == pytest.approx(whole.window_rates)


def test_an_unfinished_dataset_is_measured_as_far_as_it_goes(tmp_path: Path) -> None:
    mixing = measure(write(tmp_path, Rows(), chunks=8))
    assert mixing.windows == 2
    assert mixing.dataset.rows == CHUNKS * ROWS_PER_CHUNK
    with pytest.raises(UserError, match="no whole window of 9 chunks yet"):
        measure(write(tmp_path, Rows(), chunks=8), 9)


def test_a_dataset_that_deletes_its_chunks_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest = make_manifest(retention="window")
    with pytest.raises(UserError, match="keeps only a window"):
        measure_mixing(Dataset(store, manifest), ReadingOrder((16,), 1, 2, 0), 64, [])


def test_damaged_chunks_are_not_measured(tmp_path: Path) -> None:
    dataset = write(tmp_path, Rows())
    file = tmp_path / "activations.zarr" / "sequence" / "c" / "2"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedObject, match="sequence/c/2"):
        measure(dataset)


def test_counting_pairs() -> None:
    counts = pair_counts(np.array([3, 1, 3, 3, 1, 9]))
    assert (counts.rows, counts.same, counts.sequences) == (6, 8, 3)
    assert counts.rate == pytest.approx(8 / 30)
    assert pair_counts(np.array([4])).rate == 0
    assert batch_bounds(0, 5) == []


def test_the_projection_never_changes() -> None:
    direction = projection("blocks.3.hook_resid_post", 192) * 192**0.5
    assert ((direction > 0).float() * 2 - 1).tolist() == pytest.approx(direction.tolist())
    assert abs(int(direction.sum())) < 40
    assert "".join("+" if x > 0 else "-" for x in direction[:16]) == "---+++--+------+"
    assert not (projection("blocks.2.hook_resid_post", 192) * 192**0.5 == direction).all()
