"""Toy data: the statistics that define them, options that are off, and what decides their bits."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.common.errors import ConfigError
from penstock.common.settings import parse
from penstock.producer.plan import DatasetSettings
from penstock.producer.toy import READ, TARGET, Toy, ToySettings, rescaled
from penstock.producer.toy_source import ToySource, plan_toy
from penstock.store.commits import read_commit
from penstock.store.dataset import open_dataset
from penstock.store.objects import open_store
from penstock.store.truth import store_truth
from penstock.store.writer import DatasetWriter
from services.trees import tree_digests

SMALL: dict[str, Any] = {"d_in": 16, "features": 40, "active": 4.0, "rows_per_sequence": 32}
HARDER: dict[str, Any] = {
    "direction_jitter": 0.2,
    "input_noise": 0.1,
    "label_noise": 0.1,
    "strictly_positive": True,
    "extra_features": 8,
    "correlation_factors": 2,
    "power_decay": 0.5,
    "scale_spread": 0.3,
    "decay": 0.9,
    "draw": "row",
}
OFF: dict[str, Any] = {
    "direction_jitter": 0.0,
    "input_noise": 0.0,
    "label_noise": 0.0,
    "strictly_positive": False,
    "extra_features": 0,
    "correlation_factors": 0,
    "power_decay": 0.0,
    "scale_spread": 0.0,
}


@pytest.fixture(scope="module")
def toy() -> Toy:
    """The base data, 512 features in 256 dimensions."""
    return Toy(ToySettings())


def small(**changes: Any) -> Toy:
    return Toy(ToySettings(**SMALL | changes))


def plan_of(toy: Toy, **changes: Any) -> Any:
    settings = {"hooks": [READ], "max_rows": 320, "sequences_per_chunk": 3} | changes
    return plan_toy(DatasetSettings.model_validate(settings), toy)


def bits(toy: Toy, sequences: int = 3) -> list[bytes]:
    return [acts.tobytes() for n in range(sequences) for acts in toy.rows(n).values()] + [toy.truth.encode()]


def test_features_are_unit_vectors_uniform_on_the_sphere(toy: Toy) -> None:
    features = toy.truth.features.astype(np.float64)
    assert features.shape == (512, 256)
    assert np.abs(np.linalg.norm(features, axis=1) - 1).max() < 1e-6
    cosines = (features @ features.T)[np.triu_indices(512, 1)]
    # 130,816 cosines of sd 1/16: their sd is known to 1/√(2·130816) = 0.2 %, their mean to 0.0002
    assert cosines.std() == pytest.approx(1 / 16, rel=0.01)
    assert abs(cosines.mean()) < 0.001
    # uniform: along no coordinate more than along another
    assert np.abs(features.mean(axis=0)).max() < 5 / 16 / math.sqrt(512)


def test_probabilities_have_their_mean_and_decay(toy: Toy) -> None:
    p = toy.truth.probabilities
    assert p.sum() == pytest.approx(5.0, abs=1e-12)
    assert p.mean() == pytest.approx(5 / 512, abs=1e-15)
    assert 0 < p.min() <= p.max() <= 1
    slope, _ = np.polyfit(np.arange(512), np.log(p), 1)
    # log Φ(z) has a standard deviation of 1: that of the slope is √12 / 512^1.5 = 0.0003
    assert slope == pytest.approx(math.log(0.99), abs=0.0012)


def test_z_is_normal_of_unit_variance_with_random_correlations() -> None:
    """Σ has ones on its diagonal, so that Φ(z) is uniform; off it, a random covariance of as many factors."""
    toy = Toy(ToySettings(draw="row", features=128, d_in=64, decay=1.0))
    z = toy._factors(np.random.default_rng(0).standard_normal((20_000, 128)))
    sigma = z.T @ z / len(z)
    assert np.abs(z.std(axis=0) - 1).max() < 0.03
    off = sigma[np.triu_indices(128, 1)]
    # those of 128 random directions in as many dimensions, measured on 20,000 draws
    assert off.std() == pytest.approx(1 / math.sqrt(128), rel=0.05)
    uniform = toy._likelihoods(z)
    assert np.abs(np.histogram(uniform, 10, (0, 1))[0] / uniform.size - 0.1).max() < 0.003


def test_coefficients_are_bernoulli_times_uniform(toy: Toy) -> None:
    n, rows = 200, 200 * 256
    found = [toy.coefficients("rows", sequence) for sequence in range(n)]
    feature = np.concatenate([entry[1] for entry in found])
    value = np.concatenate([entry[2] for entry in found])
    # 51,200 rows of 5 ± √5
    assert len(feature) / rows == pytest.approx(5.0, abs=0.05)
    frequency = np.bincount(feature, minlength=512) / rows
    p = toy.truth.probabilities
    assert np.abs((frequency - p) / np.sqrt(p * (1 - p) / rows)).max() < 5
    # 256,000 values: 0.5 ± 0.0006; 0.25 would be a product of two uniform numbers
    assert value.mean() == pytest.approx(0.5, abs=0.003)
    assert 0 <= value.min() < value.max() < 1
    assert np.abs(np.histogram(value, 10, (0, 1))[0] / len(value) - 0.1).max() < 0.004


def test_rows_are_the_sums_of_their_features(toy: Toy) -> None:
    row, feature, value = toy.coefficients("rows", 7)
    dense = np.zeros((256, 512))
    dense[row, feature] = value
    expected = dense @ toy.truth.features.astype(np.float64)
    assert np.abs(toy.rows(7)[READ] - expected).max() < 1e-6


@pytest.mark.parametrize("option", sorted(OFF))
def test_an_option_at_zero_changes_no_bit(option: str) -> None:
    assert bits(small(**{option: OFF[option]})) == bits(small())
    assert bits(small(**{option: HARDER[option]})) != bits(small())


@pytest.mark.parametrize("option", sorted(OFF))
def test_each_option_leaves_the_others_alone(option: str) -> None:
    """Off beside all the others at work, it changes no bit either: its draws are its own."""
    others = {name: value for name, value in HARDER.items() if name != option}
    assert bits(small(**others | {option: OFF[option]})) == bits(small(**others))


def test_what_is_off_is_not_in_the_digest() -> None:
    """Options to come must not change the digest of the data that there are."""
    assert small().truth.settings.keys() == {*SMALL, "decay", "draw", "seed"}
    assert small(input_noise=0.1).truth.settings.keys() - small().truth.settings.keys() == {"input_noise"}


def test_noises_are_on_the_hook_points_that_they_belong_to() -> None:
    clean = small().rows(0)
    assert clean[READ].tobytes() == clean[TARGET].tobytes()
    read, label = small(input_noise=0.3).rows(0), small(label_noise=0.3).rows(0)
    assert read[TARGET].tobytes() == label[READ].tobytes() == clean[READ].tobytes()
    for noisy in (read[READ], label[TARGET]):
        assert (noisy - clean[READ]).std() == pytest.approx(0.3, rel=0.15)
    both = small(label_noise=0.3, input_noise=0.3).rows(0)
    assert (
        np.abs(np.corrcoef((both[READ] - clean[READ]).ravel(), (both[TARGET] - clean[READ]).ravel())[0, 1])
        < 0.2
    )


def test_directions_jitter_by_as_much_as_is_said(toy: Toy) -> None:
    jittered = Toy(ToySettings(direction_jitter=0.5))
    feature = toy.coefficients("rows", 0)[1]
    moved = jittered._jittered("rows", 0, feature)
    assert np.abs(np.linalg.norm(moved, axis=1) - 1).max() < 1e-6
    cosine = (moved * toy.truth.features[feature]).sum(axis=1)
    assert cosine.mean() == pytest.approx(1 / math.sqrt(1 + 0.25), abs=0.01)


def test_the_other_options_do_what_they_say() -> None:
    assert small(strictly_positive=True).truth.features.min() > 0
    more = small(extra_features=20)
    assert more.truth.features[:40].tobytes() == small().truth.features.tobytes()
    assert more.truth.probabilities.mean() == pytest.approx(4 / 40)
    scales = Toy(ToySettings(scale_spread=0.5)).truth.scales
    assert np.log(scales).std() == pytest.approx(0.5, rel=0.15)
    loaded = small(scale_spread=0.5)
    plain = small().coefficients("rows", 0)
    assert np.array_equal(loaded.coefficients("rows", 0)[2], plain[2] * loaded.truth.scales[plain[1]])
    steep, flat = (
        np.polyfit(np.log(np.arange(512) + 1), np.log(Toy(ToySettings(power_decay=a)).truth.probabilities), 1)
        for a in (1.0, 0.0)
    )
    assert steep[0] == pytest.approx(flat[0] - 1, abs=1e-6)


def test_few_factors_correlate_strongly() -> None:
    def correlation(**changes: Any) -> float:
        toy = small(draw="row", **changes)
        z = toy._factors(np.random.default_rng(0).standard_normal((4000, toy._n_factors)))
        return float(np.abs((z.T @ z / len(z))[np.triu_indices(40, 1)]).mean())

    assert correlation(correlation_factors=1) == pytest.approx(1.0, rel=0.1)
    assert 0.5 < correlation(correlation_factors=2) < 0.8
    assert correlation() < 0.2


@pytest.mark.parametrize("draw", ["batch", "row"])
def test_probabilities_drawn_again_and_again(draw: Any) -> None:
    toy = small(draw=draw)
    one, other = (toy._probabilities("rows", n) for n in range(2))
    assert len(one) == (1 if draw == "batch" else 32)
    assert not np.array_equal(one, other)
    if draw == "row":
        assert not np.array_equal(one[0], one[1])
    means = np.mean([toy._probabilities("rows", n).mean(axis=0) for n in range(600)], axis=0)
    assert np.abs(means.mean() - 0.1) < 1e-12
    assert np.abs(means / toy.truth.probabilities - 1).max() < 0.15
    assert max(toy._probabilities("rows", n).max() for n in range(50)) <= 1


def test_what_would_be_more_than_certain_is_certain() -> None:
    q = np.array([[8.0, 1.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0], [9.0, 5.0, 0.1, 0.1]])
    p = rescaled(q, 2.5)
    assert p.sum(axis=1) == pytest.approx(2.5)
    assert p.max() <= 1
    assert p[0].tolist() == pytest.approx([1, 0.6, 0.6, 0.3])
    assert p[2].tolist() == pytest.approx([1, 1, 0.25, 0.25])
    assert rescaled(q, 4.0)[0].tolist() == pytest.approx([1, 1, 1, 1])


def test_rows_do_not_depend_on_chunks_or_their_order() -> None:
    toy, stored = small(), set()
    for size in (1, 4, 10):
        manifest = plan_of(toy, sequences_per_chunk=size)
        source = ToySource(manifest, small())
        chunks = [source.chunk(index) for index in reversed(range(manifest.n_chunks))]
        stored.add(b"".join(chunk.acts[READ].tobytes() for chunk in reversed(chunks)))
    assert [len(data) for data in stored] == [320 * 16 * 2]


def test_a_later_dataset_goes_on_where_the_earlier_ends(tmp_path: Path) -> None:
    toy = small()
    whole = ToySource(plan_of(toy, sequences_per_chunk=10), toy).chunk(0)
    DatasetWriter(open_store(str(tmp_path / "a")), plan_of(toy, max_rows=96)).close()
    later = plan_of(toy, max_rows=224, after=[str(tmp_path / "a")], sequences_per_chunk=7)
    chunk = ToySource(later, toy).chunk(0)
    assert later.corpus.first_sequence == 3
    assert chunk.sequence.tolist() == whole.sequence[96:].tolist()
    assert chunk.acts[READ].tobytes() == whole.acts[READ][96:].tobytes()
    with pytest.raises(ConfigError, match=r"dataset\.after"):
        plan_of(small(seed=1), after=[str(tmp_path / "a")])


def test_held_out_rows_are_none_of_the_dataset() -> None:
    toy = small()
    rows = {row.tobytes() for n in range(20) for row in toy.rows(n)[READ]}
    held = [row.tobytes() for n in range(20) for row in toy.rows(n, held_out=True)[READ]]
    empty = np.zeros(16, np.float32).tobytes()
    assert len(set(held)) > 500
    assert not (set(held) - {empty}) & rows


def test_no_thread_count_and_no_instruction_set_changes_a_bit(tmp_path: Path) -> None:
    """The one matrix product is exact, so that OpenBLAS's kernels must all give the same."""
    code = (
        "import hashlib\n"
        "from penstock.producer.toy import Toy, ToySettings\n"
        "toy = Toy(ToySettings(draw='row', d_in=32, features=300))\n"
        "z = toy._factors(toy._normal('z').standard_normal((64, 300))).tobytes()\n"
        "rows = b''.join(toy.rows(n)['toy'].tobytes() for n in range(2))\n"
        "print(hashlib.sha256(z + rows + toy.truth.encode()).hexdigest())"
    )
    found = set()
    for kernel, threads in (("", "1"), ("", "2"), ("Nehalem", "1"), ("Sandybridge", "1"), ("Haswell", "1")):
        told = {"OPENBLAS_NUM_THREADS": threads} | ({"OPENBLAS_CORETYPE": kernel} if kernel else {})
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | told, check=True
        )
        found.add(ran.stdout)
    assert len(found) == 1


def test_a_producer_that_died_is_carried_on_to_the_same_bytes(tmp_path: Path) -> None:
    """One dies in the middle of a chunk; another one, which shares nothing with it, makes the rest."""
    toy = small(input_noise=0.1)
    manifest = plan_of(toy, hooks=[READ, TARGET])
    for name, parts in (("whole", [range(4)]), ("resumed", [range(2), range(4)])):
        store = open_store(str(tmp_path / name))
        for part in parts:
            writer = DatasetWriter(store, manifest)
            fresh = small(input_noise=0.1)
            store_truth(store, manifest, fresh.truth)
            source = ToySource(manifest, fresh)
            for index in reversed(part):
                writer.write(index, source.chunk(index))
            writer.close()
            if len(part) == 2:
                store.delete("commits/0/1.json")
                store.delete(f"activations.zarr/acts/{READ}/c/1/0")
    assert tree_digests(tmp_path / "whole") == tree_digests(tmp_path / "resumed")
    assert read_commit(open_dataset(str(tmp_path / "whole")).store, 3).rows == 32


def test_the_bits_of_this_format() -> None:
    """The same for ever: datasets are grown, repaired and compared by them."""
    found = []
    for toy in (Toy(ToySettings()), small(**HARDER)):
        rows = b"".join(acts.tobytes() for acts in toy.rows(0).values())
        found.append((hashlib.sha256(rows).hexdigest()[:16], toy.truth.digest[:16]))
    assert found == GOLDEN


GOLDEN = [("113a5e2fd4a24c3f", "cb4534a3c352b6e5"), ("c3ee9034332a1ede", "334e8aeaf209183e")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hooks": ["blocks.0.hook_out"]}, "dataset.hooks: toy data have no 'blocks.0.hook_out'"),
        ({"hooks": ["tpy"]}, "Did you mean toy"),
        ({"max_rows": None}, "dataset.max_rows"),
        ({"sequences_per_chunk": 100_000, "max_rows": 4_000_000}, "dataset.sequences_per_chunk"),
    ],
)
def test_a_plan_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_of(small(), **changes)


def test_label_noise_without_anyone_who_would_see_it() -> None:
    with pytest.raises(ConfigError, match=r"toy.label_noise.*toy.target"):
        plan_of(small(label_noise=0.1))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"features": 4, "active": 5.0}, "active: 5 of 4"),
        ({"features": 8192, "d_in": 4096}, "60 MiB"),
        ({"jitter": 1.0}, "jitter: unknown setting"),
    ],
)
def test_settings_that_cannot_be(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(ToySettings, data, "toy")
