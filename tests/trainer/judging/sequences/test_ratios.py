"""Ratios over sequences, against what resampling and plain formulas say."""

import numpy as np
import pytest
import torch

from penstock.trainer.judging.sequences.ratios import Ratio


def filled(above: torch.Tensor, below: torch.Tensor | None, keep: torch.Tensor, trained: int) -> Ratio:
    """As if it came in batches of three sequences."""
    ratio = Ratio(trained)
    for first in range(0, len(above), 3):
        some = slice(first, first + 3)
        ratio.add(above[some], None if below is None else below[some], keep[some])
    return ratio


def test_means_and_their_errors_by_position() -> None:
    values = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0], [5.0, 12.0, 9.0], [7.0, 1.0, 9.0]])
    keep = torch.tensor([[True, True, False], [True, True, False], [True, True, False], [True, False, True]])
    mean, error = filled(values, None, keep, 2).by_position()
    np.testing.assert_allclose(mean, [4.0, 6.0, 9.0])
    wanted = [np.std([1, 3, 5, 7], ddof=1) / 2, np.std([2, 4, 12], ddof=1) / np.sqrt(3)]
    np.testing.assert_allclose(error[:2], wanted)
    assert np.isnan(error[2])
    record = filled(values, None, keep, 2).record()
    assert record["by_position"]["error"][2] is None
    # rows count alike, and those of one sequence belong together
    assert record["overall"]["mean"] == pytest.approx(43 / 8)
    assert record["within"]["mean"] == pytest.approx(34 / 7)
    assert record["beyond"]["mean"] == pytest.approx(9.0)
    assert record["beyond_over_within"]["mean"] == pytest.approx(9 / (34 / 7))


def test_nothing_beyond_is_null() -> None:
    ratio = filled(torch.ones(4, 3), None, torch.ones(4, 3, dtype=torch.bool), 3)
    assert ratio.beyond() == {"mean": None, "error": None}
    assert ratio.beyond_over_within() == {"mean": None, "error": None}
    assert ratio.within() == {"mean": 1.0, "error": 0.0}


def test_one_sequence_has_no_error() -> None:
    record = filled(torch.ones(1, 3), None, torch.ones(1, 3, dtype=torch.bool), 2).record()
    assert record["overall"] == {"mean": 1.0, "error": None}


def test_standard_errors_are_those_of_repeated_draws() -> None:
    """Positions of a sequence share most of their deviation: the error must know it."""
    generator = torch.Generator().manual_seed(1)

    def drawn() -> Ratio:
        shared = torch.randn(200, 1, generator=generator)
        below = 2 + 0.2 * shared + 0.1 * torch.randn(200, 8, generator=generator)
        above = 3 + 0.8 * shared + 0.3 * torch.randn(200, 8, generator=generator)
        above[:, 5:] *= 2
        keep = torch.rand(200, 8, generator=generator) < 0.8
        return filled(above, below, keep, 5)

    ratios = [drawn() for _ in range(150)]
    for name in ("overall", "within", "beyond", "beyond_over_within"):
        found = [getattr(ratio, name)() for ratio in ratios]
        spread = np.std([one["mean"] for one in found])
        assert np.mean([one["error"] for one in found]) == pytest.approx(spread, rel=0.2), name
    values, errors = zip(*(ratio.by_position() for ratio in ratios), strict=True)
    np.testing.assert_allclose(np.mean(errors, 0), np.std(values, 0), rtol=0.25)
