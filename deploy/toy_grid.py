"""What `size_ratio` and `alpha` of a grid are relative to where the dataset is toy data."""

from typing import Any

import numpy as np
from pydantic import ValidationError

from penstock.producer.toy import Toy, ToySettings


def with_frames(data: dict[str, Any]) -> dict[str, Any]:
    """A config's mapping whose runs' grids say what they are relative to.

    What is not a config, a run or an entry stays as it is: reading it says what is wrong with it.
    """
    runs = data.get("runs")
    if not isinstance(data.get("toy"), dict) or not isinstance(runs, list):
        return data
    wanted = [run for run in runs if isinstance(run, dict) and isinstance(run.get("grid"), list)]
    if not any(_needs_frame(entry) for run in wanted for entry in run["grid"]):
        return data
    try:
        frame = frame_of(Toy(ToySettings.model_validate(data["toy"])))
    except ValidationError:
        return data

    def told(run: Any) -> Any:
        if not any(run is other for other in wanted):
            return run
        return run | {"grid": [e | {"relative_to": frame} if _needs_frame(e) else e for e in run["grid"]]}

    return data | {"runs": [told(run) for run in runs]}


def frame_of(toy: Toy) -> dict[str, Any]:
    """Fields of a `GridFrame`. The mean ‖x‖² follows from the ground truth:

    Σ_i p_i s_i² / 3 − Σ_i (p_i s_i / 2)² + ‖Σ_i p_i s_i / 2 · feature_i‖², and the input noise's D σ².
    """
    truth, settings = toy.truth, toy.settings
    strength = truth.probabilities * truth.scales
    mean = (strength[:, None] / 2 * truth.features).sum(axis=0)
    square = float((strength * truth.scales).sum() / 3 - (strength**2).sum() / 4 + np.square(mean).sum())
    square += settings.d_in * settings.input_noise**2
    return {
        "features": settings.total_features,
        "d_in": settings.d_in,
        "mean_square": float(f"{square:.6g}"),
    }


def _needs_frame(entry: Any) -> bool:
    asks = isinstance(entry, dict) and "relative_to" not in entry
    return asks and ("alpha" in entry or "size_ratio" in entry)
