"""Figures of rows alone."""

import torch

from penstock.trainer.row_figures import density


def test_density_counts_features_by_how_often_they_fire() -> None:
    fired = torch.tensor([0, 0, 1, 10, 10, 100, 1000, 1000, 1000])
    found = density(fired, 1000)
    edges = found["log10_edges"]
    assert found["never_active"] == 2
    at = {round(edges[i], 3): count for i, count in enumerate(found["counts"]) if count}
    assert at == {-3.0: 1, -2.0: 2, -1.0: 1, -0.1: 3}
    rarest = density(torch.tensor([1]), 10**9)
    assert (rarest["counts"][0], sum(rarest["counts"])) == (1, 1)
