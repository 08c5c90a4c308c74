"""Grids: what one entry stands for, the same names everywhere, and refusals in one line."""

import math
import re
from typing import Any

import pytest
import torch

from penstock.common.errors import ConfigError
from penstock.common.settings import parse
from penstock.trainer.config import RunSettings
from penstock.trainer.grid import MAX_SAES, GridFrame
from penstock.trainer.kinds import SAESettings, StandardSettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.sae import build

FRAME = {"features": 512, "d_in": 256, "mean_square": 5 / 3}
RELU = {"architecture": "standard", "hook_name": "toy", "d_sae": 64, "l1_coefficient": 0.1}


def run(*entries: object, **settings: Any) -> RunSettings:
    return parse(RunSettings, {"name": "sweep", "grid": list(entries), **settings}, "c.yaml")


def saes(*entries: object) -> list[SAESettings]:
    return run(*entries).saes


class TestExpansion:
    def test_the_grid_of_the_report_is_one_entry(self) -> None:
        made = saes(
            {
                "architecture": "standard",
                "hook_name": "toy",
                "alpha": {"log10": [-2, 2], "n": 17},
                "size_ratio": {"log2": [-2, 5], "n": 8},
                "relative_to": FRAME,
            }
        )
        assert len(made) == len({sae.name for sae in made}) == 136
        assert {sae.d_sae for sae in made} == {128 << e for e in range(8)}
        assert [sae.name for sae in made][:2] == ["standard-a0.01-r0.25", "standard-a0.01-r0.5"]
        expected = 0.01 * 256 / 128 * math.sqrt(256 / (5 / 3))
        first = made[0]
        assert isinstance(first, StandardSettings)
        assert first.l1_coefficient == pytest.approx(expected, rel=1e-5)

    def test_each_kind_takes_the_settings_it_has(self) -> None:
        entry = {**RELU, "architecture": ["standard", "topk"], "l1_coefficient": [0.1, 1], "k": [4, 8, 16]}
        names = [sae.name for sae in saes({**entry, "seed": [0, 1]})]
        assert len(names) == 2 * (2 + 3)
        assert names[0] == "standard-l1-0.1-s0"
        assert names[-1] == "topk-k16-s1"

    def test_whole_numbers_of_a_range_are_rounded(self) -> None:
        assert [s.d_sae for s in saes({**RELU, "d_sae": {"log10": [1, 2], "n": 3}})] == [10, 32, 100]

    def test_hook_points_become_names(self) -> None:
        made = saes({**RELU, "name": "a", "hook_name": ["blocks.1.hook_out", "my layer"]})
        assert [sae.name for sae in made] == ["a-blocks.1.hook_out", "a-my_layer"]

    def test_saes_may_be_listed_besides(self) -> None:
        made = run({**RELU, "seed": [1, 2]}, saes=[{**RELU, "name": "alone"}])
        assert [sae.name for sae in made.saes] == ["alone", "standard-s1", "standard-s2"]

    def test_a_run_is_the_same_however_it_was_written(self) -> None:
        short = run({**RELU, "seed": [1, 2]})
        long = parse(RunSettings, short.model_dump(mode="json"), "again")
        assert short == long
        assert "grid" not in short.model_dump()

    def test_equal_values_everywhere(self) -> None:
        """Six digits: the last bits of a power are not the same in every C library."""
        values = [s.lr for s in saes({**RELU, "lr": {"ln": [-7, -3], "n": 5}})]
        assert all(value == float(f"{value:.6g}") for value in values)


class TestRefusals:
    @pytest.mark.parametrize(
        ("entry", "said"),
        [
            ({**RELU, "l1_coeficient": 1}, r"grid\[0\]: l1_coeficient: unknown.*mean l1_coefficient"),
            ({**RELU, "k": 3}, r"grid\[0\]: k: unknown setting"),
            ({**RELU, "d_sae": 0}, r"grid\[0\]: d_sae: .* greater than or equal to 1, not 0"),
            ({**RELU, "d_sae": 3.5}, r"d_sae: .*integer.*3\.5"),
            ({**RELU, "seed": []}, r"seed: an empty list"),
            ({**RELU, "seed": [1, 1]}, r"seed: a value is given twice"),
            ({**RELU, "lr": {"log10": [0, 1], "m": 2}}, r"lr\.m: unknown setting"),
            ({**RELU, "lr": {"log10": [0, 1]}}, r"lr: a range is"),
            ({**RELU, "lr": {"log10": [0, "b"], "n": 2}}, r"lr\.log10: must be two numbers"),
            ({**RELU, "lr": {"log10": [0, 1], "n": 1}}, r"lr\.n: must be"),
            ({**RELU, "lr": {"log10": [1, 1], "n": 2}}, r"lr\.log10: the exponents must differ"),
            ({**RELU, "architecture": "relu"}, r"architecture: 'relu' is not one of"),
            ({**RELU, "architecture": [["a"]]}, r"architecture: .* is not one of"),
            ({"hook_name": "a"}, r"architecture: missing"),
            ({**RELU, "alpha": 1, "relative_to": FRAME}, r"alpha and l1_coefficient say the same"),
            ({**RELU, "size_ratio": 1}, r"size_ratio and d_sae say the same"),
            ({"architecture": "topk", "hook_name": "a", "k": 2, "size_ratio": 1}, r"relative to what"),
            ({**RELU, "relative_to": {"features": 3}}, r"relative_to\.d_in: missing"),
            ({**RELU, "lr": [0.12345, 0.123451]}, r"'standard-lr0.1235' comes up twice"),
            ({**RELU, "name": "no good"}, r"name: .*pattern"),
            ({**RELU, "name": ["a", "b"]}, r"name: must be text"),
            (3, r"grid\[0\]: must be a mapping"),
        ],
        ids=repr,
    )
    def test_it_is_refused_in_one_line(self, entry: object, said: str) -> None:
        with pytest.raises(ConfigError, match=said) as caught:
            run(entry)
        assert "\n" not in str(caught.value)

    def test_too_many(self) -> None:
        half = {**RELU, "seed": list(range(MAX_SAES // 2 + 1))}
        with pytest.raises(ConfigError, match=rf"grid\[1\]: makes {MAX_SAES + 2} SAEs; at most {MAX_SAES}"):
            run(half, {**half, "name": "other"})

    def test_the_same_name_in_two_entries(self) -> None:
        with pytest.raises(ConfigError, match=re.escape("grid[1]: the name 'standard' comes up twice")):
            run(RELU, RELU)

    def test_a_grid_that_is_no_list(self) -> None:
        with pytest.raises(ConfigError, match="grid: must be a list"):
            parse(RunSettings, {"name": "a", "grid": {"architecture": "topk"}}, "c.yaml")


def test_alpha_is_the_penalty_of_the_report() -> None:
    """Gradients of its loss, on rows as they are, and of ours, on scaled rows, are equal up to one factor."""
    d_in, d_sae, alpha = 12, 20, 0.3
    torch.manual_seed(0)
    x = torch.randn(64, d_in, dtype=torch.float64) * 0.4
    frame = GridFrame(features=10, d_in=d_in, mean_square=float(x.square().sum(dim=1).mean()))
    scale = math.sqrt(d_in / frame.mean_square)
    settings = StandardSettings(
        architecture="standard",
        name="a",
        hook_name="h",
        d_sae=d_sae,
        l1_coefficient=frame.l1_coefficient(alpha, d_sae),
        l1_warmup_steps=0,
    )
    sae = build(d_in, settings).double()
    sae.initialise(0, None)
    W_enc = sae.W_enc.detach().clone().requires_grad_()
    W_dec = sae.W_dec.detach().clone().requires_grad_()

    acts = torch.relu(x @ W_enc)
    reconstruction = acts @ (W_dec / W_dec.norm(dim=1, keepdim=True))
    (((x - reconstruction) ** 2).mean() + alpha * acts.sum(dim=1).mean() / d_sae).backward()
    sae.training_pass(x * scale, x * scale, Schedule(0, 1), None).loss.backward()  # type: ignore[no-untyped-call]

    factor = d_in * scale**2
    for ours, theirs in ((sae.W_enc, W_enc), (sae.W_dec, W_dec)):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, factor * theirs.grad)
