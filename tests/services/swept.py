"""Records of a sweep as its measuring gives them, made up."""

import math
from typing import Any

ABOUT = {
    "title": "toy <b>",
    "runs": ["toy-1a2b3c4d"],
    "rows": 1_024_000,
    "steps": 4000,
    "batch_rows": 256,
    "dataset": "toy data",
    "true_features": 512,
}


def record(alpha: float, ratio: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    d_sae = round(512 * ratio)
    found: dict[str, Any] = {
        "name": f"relu-a{alpha:g}-r{ratio:g}-s{seed}",
        "run": "toy-1a2b3c4d",
        "hook_name": "toy",
        "architecture": "standard",
        "d_in": 256,
        "d_sae": d_sae,
        "size_ratio": ratio,
        "seed": seed,
        "penalty": "alpha",
        "l1_coefficient": 12.4 * alpha * 256 / d_sae,
        "alpha": alpha * 1.0001,
        "loss": 30.0,
        "reconstruction_loss": 4 + 40 * alpha,
        "l1": 20 / (1 + alpha),
        "l0": 5 / alpha,
        "train_explained_variance": 0.9,
        "held_out_loss": 5.0,
        "held_out_l0": 4.8 / alpha,
        "held_out_dead_features": 3,
        "explained_variance": 0.95 - 0.1 * alpha,
        "ce_recovered": None,
        "dead_features": 0,
        "dead_minibatches": 1,
        "mmcs": 0.9 - abs(math.log10(alpha) + 1) / 4 + 0.02 * seed,
        "matched_cosine": 0.8,
        "duplicates": 0,
        "mmcs_with_larger": None if ratio == 2 else 0.7,
        "seed_agreement": None,
        "convergence": 0.99,
        "ssll": -0.5,
        "ssll_weighted": 0.5,
    }
    return found | changes
