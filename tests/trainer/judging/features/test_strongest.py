"""Activity of features: sums against brute force, and the draw."""

import itertools

import pytest
import torch

from penstock.trainer.judging.features.strongest import BANDS, BINS, LOWEST, PER_OCTAVE, Activity, draw


@pytest.fixture(scope="module")
def acts() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.rand((500, 20), generator=generator) * 8
    values[torch.rand(values.shape, generator=generator) < 0.7] = 0.0
    values[:, 4] = 0.0
    values[:, 5] = 0.0
    values[77, 5] = 3.0
    return values


def summed(acts: torch.Tensor, at_once: int, k: int = 6) -> Activity:
    activity = Activity(20, k, torch.device("cpu"))
    for start in range(0, len(acts), at_once):
        activity.add(acts[start : start + at_once], 1000 + start)
    return activity


@pytest.mark.parametrize("at_once", [500, 37, 4])
def test_sums_are_those_of_all_rows_at_once(acts: torch.Tensor, at_once: int) -> None:
    activity = summed(acts, at_once)
    assert activity.rows == 500
    assert torch.equal(activity.fired, (acts > 0).sum(0))
    torch.testing.assert_close(activity.total, acts.double().sum(0))
    values, rows = acts.topk(6, dim=0)
    live = values.T > 0
    assert torch.equal(activity.values[live], values.T[live])
    assert torch.equal(activity.places[live], rows.T[live] + 1000)
    assert (activity.values[~live] == -torch.inf).all()
    assert activity.places[5, 0] == 1077


def test_of_equal_activations_those_added_earlier_stay() -> None:
    activity = Activity(1, 100, torch.device("cpu"))
    for start in range(150):
        activity.add(torch.tensor([[2.0]]), start)
    assert activity.places.tolist() == [list(range(100))]


def test_histograms_count_every_activation_in_its_bin(acts: torch.Tensor) -> None:
    activity = summed(acts, 37)
    assert torch.equal(activity.histogram.sum(1), activity.fired)
    for feature in (0, 5, 19):
        edges, counts = activity.histogram_of(feature)
        column = acts[:, feature][acts[:, feature] > 0]
        assert counts == [
            int(((column >= low) & (column < high)).sum()) for low, high in itertools.pairwise(edges)
        ]
        assert counts[0] > 0 < counts[-1]
    assert activity.histogram_of(4) == ([], [])


def test_activations_beyond_the_histogram_fall_into_its_ends() -> None:
    activity = Activity(1, 1, torch.device("cpu"))
    activity.add(torch.tensor([[1e-30], [1e30]]), 0)
    assert activity.histogram[0, 0] == 1
    assert activity.histogram[0, BINS - 1] == 1
    assert activity.histogram_of(0)[0][0] == 2.0**LOWEST
    assert len(activity.histogram_of(0)[1]) == BINS
    assert PER_OCTAVE == 2


def test_the_draw_takes_from_each_band_and_never_a_feature_twice() -> None:
    fired = torch.arange(100).flip(0)  # feature 0 most often, feature 99 never
    drawn = draw(fired, 3, 0, "sae")
    assert [band for _, band in drawn] == [band for band in BANDS for _ in range(3)]
    of = {band: [f for f, b in drawn if b == band] for band in BANDS}
    assert set(of["frequent"]) <= set(range(10))
    assert set(of["medium"]) <= set(range(39, 60))
    assert set(of["rare"]) <= set(range(89, 99))
    assert of["medium"] == sorted(of["medium"])  # by falling frequency
    assert draw(fired, 3, 0, "sae") == drawn
    assert draw(fired, 3, 1, "sae") != drawn
    assert draw(fired, 3, 0, "other") != drawn
    few = draw(torch.tensor([0, 4, 0, 2]), 3, 0, "sae")
    assert sorted(f for f, _ in few) == [1, 3]
    assert draw(torch.zeros(8, dtype=torch.int64), 3, 0, "sae") == []
