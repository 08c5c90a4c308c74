"""Rows that dictionaries are trained on and judged by: of one hook point, or of a pair for transcoders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor


class Rows:
    """Training rows in order, and held-out ones: [R, D] as they are stored.

    The targets are the inputs themselves where the file has none. A scale gives a mean squared norm of D.
    """

    def __init__(self, file: Path) -> None:
        there = safetensors.torch.load_file(file)
        self.train, self.held_out = there["train"], there["held_out"]
        self.scale = float(there["scale"])
        self.pairs = "train_targets" in there
        self.train_targets = there.get("train_targets", self.train)
        self.held_out_targets = there.get("held_out_targets", self.held_out)
        self.target_scale = float(there.get("target_scale", there["scale"]))
        self.d_in = self.train.shape[1]

    def batches(self, job: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Scaled inputs and targets of each step."""
        size = job["batch_rows"]
        for begin in range(0, job["steps"] * size, size):
            rows = self.train[begin : begin + size].float() * self.scale
            targets = self.train_targets[begin : begin + size].float() * self.target_scale
            yield rows, targets if self.pairs else rows
