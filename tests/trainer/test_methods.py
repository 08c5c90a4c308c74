"""Methods: what they must give for dictionaries whose answer is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.producer.toy import READ, Toy, ToySettings
from penstock.trainer.kinds import StandardSettings
from penstock.trainer.methods.across import (
    Place,
    convergence,
    found_by_larger,
    mmcs_with_larger,
    seed_agreement,
)
from penstock.trainer.methods.matching import best_matching, matched_cosine
from penstock.trainer.methods.similarity import duplicates, max_cosines, mmcs, unit_rows
from penstock.trainer.methods.sparsity import basin, dead_after_minibatches, dead_after_rows, ssll
from penstock.trainer.step import SAETraining


def random(features: int, d: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(features, d, generator=torch.Generator().manual_seed(seed))


class TestMMCS:
    def test_a_dictionary_with_itself(self) -> None:
        assert mmcs(random(500), random(500)) == pytest.approx(1, abs=1e-6)

    def test_order_and_length_do_not_matter(self) -> None:
        truth = random(300, 32)
        shuffled = truth[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
        lengths = torch.linspace(0.01, 50, 300)[:, None]
        assert mmcs(shuffled * lengths, truth) == pytest.approx(1, abs=1e-6)

    def test_two_random_ones(self) -> None:
        assert mmcs(random(512), random(512, seed=1)) == pytest.approx(0.2, abs=0.02)

    def test_the_sign_counts(self) -> None:
        assert mmcs(-torch.eye(4), torch.eye(4)) == 0

    def test_it_is_the_reference_that_is_looked_for(self) -> None:
        truth = random(64)
        assert mmcs(truth, truth[:32]) == pytest.approx(1, abs=1e-6)
        assert mmcs(truth[:32], truth) < 0.65

    @pytest.mark.parametrize("block", [1, 7, 64, 4096])
    def test_blocks_change_nothing(self, block: int) -> None:
        one, two = random(130, 16), random(65, 16, seed=1)
        plain = (unit_rows(one) @ unit_rows(two).T).amax(dim=0)
        torch.testing.assert_close(max_cosines(one, two, block), plain)
        again = torch.cat([two, two[:3] * 2])
        assert duplicates(again, block=block) == 3

    def test_a_feature_of_nothing_is_like_no_other(self) -> None:
        assert mmcs(torch.zeros(3, 8), random(5, 8)) == 0

    def test_widths_that_differ_are_refused(self) -> None:
        with pytest.raises(ValueError, match="cannot compare"):
            mmcs(random(3, 8), random(3, 9))


class TestMatching:
    def test_it_is_the_best_there_is(self) -> None:
        random_ = np.random.default_rng(0)
        for rows, columns in [(1, 1), (3, 3), (4, 6), (5, 5), (2, 7)] * 20:
            values = random_.normal(size=(rows, columns)).round(1)  # ties among them
            chosen = best_matching(values)
            assert len(set(chosen)) == rows
            best = max(
                sum(values[i, c] for i, c in enumerate(way))
                for way in itertools.permutations(range(columns), rows)
            )
            assert values[np.arange(rows), chosen].sum() == pytest.approx(best)

    def test_a_duplicated_dictionary(self) -> None:
        truth = random(100, 64)
        doubled = torch.cat([truth, truth])
        assert mmcs(doubled, truth) == pytest.approx(1, abs=1e-6)
        assert matched_cosine(doubled, truth) == pytest.approx(1, abs=1e-6)
        assert duplicates(truth) == 0
        assert duplicates(doubled) == 100

    def test_one_feature_may_not_stand_for_two(self) -> None:
        """Between two true features: each finds it, only one may have it."""
        truth = torch.eye(3)
        between = torch.stack([truth[0] + truth[1], truth[2], -truth[2]])
        assert mmcs(between, truth) == pytest.approx((2 * math.sqrt(0.5) + 1) / 3)
        assert matched_cosine(between, truth) == pytest.approx((math.sqrt(0.5) + 1 + 0) / 3)

    def test_a_smaller_dictionary_is_matched_as_far_as_it_goes(self) -> None:
        truth = random(40, 32)
        assert matched_cosine(truth[10:20], truth) == pytest.approx(1, abs=1e-6)


class TestStarts:
    """At step 0, on toy data, where a row of nothing comes up now and then."""

    def found(self, way: str) -> float:
        toy = Toy(ToySettings(d_in=64, features=128, active=2.0, decay=1.0))
        rows = torch.from_numpy(np.concatenate([toy.rows(n)[READ] for n in range(4)])).bfloat16()
        assert (rows == 0).all(dim=1).any()
        settings = StandardSettings(
            architecture="standard",
            name="a",
            hook_name="toy",
            d_sae=128,
            l1_coefficient=0.1,
            initialisation=way,  # type: ignore[arg-type]
            decoder_bias="none",
        )
        training = SAETraining(64, settings, torch.device("cpu"))
        training.initialise(rows)
        return mmcs(training.sae.directions(), torch.from_numpy(toy.truth.features))

    def test_rows_know_more_than_chance(self) -> None:
        informed, orthogonal = self.found("data"), self.found("orthogonal")
        assert orthogonal < 0.4
        assert informed > orthogonal + 0.15


def test_dead_features_by_both_windows() -> None:
    since = torch.tensor([0, 2559, 2560, 99_999, 100_000])
    assert dead_after_minibatches(since, batch_rows=256) == 3
    assert dead_after_rows(since, 100_000) == 1


class TestSSLL:
    def test_it_is_the_sum_of_both_scaled_logarithms(self) -> None:
        assert ssll([1, math.e**2], [math.e**4, 1]) == pytest.approx([0, 0])
        assert ssll([1, math.e**2], [1, math.e**4]) == pytest.approx([-2, 2])

    def test_it_is_never_nan(self) -> None:
        values = ssll([0.0, 1.0, 2.0, math.nan, math.inf], [0.0, 0.0, 3.0, 4.0, 0.0])
        assert all(math.isfinite(value) for value in values)
        assert values[0] == 0
        assert values[1] < 0 < values[3]

    @pytest.mark.parametrize("losses", [[], [0.0, 0.0], [2.0, 2.0]])
    def test_nothing_to_scale(self, losses: list[float]) -> None:
        assert ssll(losses, losses) == [0.0] * len(losses)


class TestBasin:
    def test_flat_then_a_jump(self) -> None:
        penalties = [0.01 * math.e**i for i in range(6)]
        assert basin(penalties, [1.0, 3.0, 3.1, 3.3, 30.0, 31.0]) == (1, 3)

    def test_flat_then_zero(self) -> None:
        assert basin([1, 3, 9, 27], [5.0, 4.8, 4.7, 0.0]) == (0, 2)

    def test_nowhere_flat(self) -> None:
        assert basin([1, 2, 4], [1.0, 4.0, 16.0]) is None


class TestAcross:
    def places(self) -> tuple[list[Place], dict[str, Tensor]]:
        truth = random(64, 32)
        noise = random(64, 32, seed=9)
        found = {"half": truth[:32], "right": truth, "double": torch.cat([truth, noise])}
        grid = [Place(name, "relu", 0.1, len(d), 0) for name, d in found.items()]
        other = Place("other", "relu", 1.0, 16, 0)  # at another penalty
        return [*grid, other], found | {"other": random(16, 32, seed=4)}

    def test_larger_dictionaries_find_what_is_real(self) -> None:
        places, found = self.places()
        values = found_by_larger(places, found.__getitem__)
        assert values == pytest.approx({"half": 1.0, "right": 1.0}, abs=1e-6)

    def test_made_up_features_are_not_found_again(self) -> None:
        places = [Place("a", 0, 0, 8, 0), Place("b", 0, 0, 16, 0)]
        values = found_by_larger(places, {"a": random(8), "b": random(16, seed=1)}.__getitem__)
        assert values["a"] < 0.3

    def test_the_right_size_holds_most_of_larger_ones(self) -> None:
        truth = random(64, 128)
        found = {"half": truth[:32], "right": truth}
        found["double"] = torch.cat([truth, random(64, 128, seed=9)])
        found["quadruple"] = torch.cat([truth, random(192, 128, seed=5)])
        places = [Place(name, "relu", 0.1, len(d), 0) for name, d in found.items()]
        values = mmcs_with_larger(places, found.__getitem__)
        assert values["right"] > values["half"] + 0.05
        assert values["right"] > values["double"] + 0.05
        with_double, with_quadruple = (mmcs(found["right"], found[n]) for n in ("double", "quadruple"))
        assert values["right"] == pytest.approx((with_double + with_quadruple) / 2)

    def test_the_largest_have_none(self) -> None:
        places, found = self.places()
        for compare in (mmcs_with_larger, found_by_larger):
            assert "double" not in compare(places, found.__getitem__)
            assert compare(places[2:], found.__getitem__) == {}

    def test_seeds(self) -> None:
        truth = random(20, 16)
        dictionaries = {"a": truth, "b": truth.flip(0), "c": truth}
        places = [Place("a", 0, 1.0, 20, 0), Place("b", 0, 1.0, 20, 1), Place("c", 0, 2.0, 20, 1)]
        assert seed_agreement(places, dictionaries.__getitem__) == pytest.approx({"a": 1, "b": 1}, abs=1e-6)

    def test_convergence(self) -> None:
        first, last = random(20, 16), random(20, 16, seed=1)
        (moved, stayed) = convergence([{"a": first}, {"a": last}, {"a": last}])["a"]
        assert moved < 0.7
        assert stayed == pytest.approx(1, abs=1e-6)
        assert convergence([]) == {}
        assert convergence([{"a": first}]) == {"a": []}
