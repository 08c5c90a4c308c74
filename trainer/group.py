"""All SAEs of a run, stepping together on the same windows."""

from typing import Any

import safetensors.torch
import torch

from penstock.store.heads import Head
from penstock.store.loader import LoadedWindow
from penstock.trainer.config import RunConfig
from penstock.trainer.initial import starting_points
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.sae import SAE
from penstock.trainer.step import Figures, SAETraining


class Group:
    """The training state of a run between two heads.

    Attributes:
        position: chunks trained on, over all epochs.
        step, rows: optimizer steps and rows trained on.
        figures: per SAE, what the last finished window gave.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.position = config.start
        self.step = self.rows = 0
        self.total_steps = config.total_steps()
        self.figures: dict[str, Figures] = {}
        self._starts: dict[str, SAE] = {}
        self.members = {
            sae.name: SAETraining(config.widths[sae.hook_name], sae, device, config.widths[sae.hooks[-1]])
            for sae in config.settings.saes
        }

    def restore(self, head: Head, files: dict[str, bytes]) -> None:
        """Carry on from a head; without a checkpoint, from the very start.

        Args:
            files: of the head's checkpoint or, without one, what the run starts from (`load_initial`).
        """
        if not head.checkpoint:
            saes, config = self.config.settings.saes, self.config
            self._starts = starting_points(saes, config.widths, config.initial, files)
            return
        self.position, self.step, self.rows = head.position, head.step, head.rows
        self.figures = {name: dict(figures) for name, figures in head.metrics.items()}
        for name, member in self.members.items():
            weights = safetensors.torch.load(files[f"sae/{name}"])
            member.restore(weights, safetensors.torch.load(files[f"optimizer/{name}"]))

    def checkpoint(self) -> dict[str, bytes]:
        """Files of a checkpoint by name: `sae/<name>` and `optimizer/<name>`, safetensors."""
        files = {}
        for name, member in self.members.items():
            files[f"sae/{name}"] = safetensors.torch.save(member.weights())
            files[f"optimizer/{name}"] = safetensors.torch.save(member.optimizer_state())
        return files

    def begin_window(self, loaded: LoadedWindow) -> None:
        for member in self.members.values():
            rows, targets = _of(member, loaded.acts)
            if self.step == 0 and loaded.n_rows:
                member.initialise(rows, self._starts.get(member.settings.name), targets)
            member.begin_window(rows, self.rows, targets)

    def train_step(self, batch: dict[str, torch.Tensor]) -> None:
        """Every SAE takes one step on its hooks' rows."""
        schedule = Schedule(self.step, self.total_steps)
        there = {hook: rows.to(self.device) for hook, rows in batch.items()}
        for member in self.members.values():
            rows, targets = _of(member, there)
            member.step(rows, schedule, targets)
        self.step += 1
        self.rows += len(next(iter(batch.values())))

    def end_window(self, loaded: LoadedWindow) -> tuple[str, int] | None:
        """Close the window's figures.

        Returns:
            The SAE and step whose loss or weights were not finite, or None if all is well.
        """
        self.position = loaded.window.stop
        if not loaded.n_rows:
            return None  # all of its chunks are quarantined
        for name, member in self.members.items():
            figures, first_bad = member.end_window()
            if first_bad is None and not member.weights_are_finite():
                first_bad = self.step - 1
            if first_bad is not None:
                return name, first_bad
            self.figures[name] = figures
        return None

    def history_point(self, seconds: float, waited: float, now: float) -> dict[str, Any]:
        """One point of the metric history."""
        return {
            "started": now - seconds,
            "time": now,
            "step": self.step,
            "rows": self.rows,
            "position": self.position,
            "seconds": seconds,
            "waited_seconds": waited,
            "saes": {name: dict(figures) for name, figures in self.figures.items()},
        }


def _of(member: SAETraining, acts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An SAE's rows, and its targets if they are others."""
    hooks = member.settings.hooks
    return acts[hooks[0]], acts[hooks[1]] if len(hooks) > 1 else None
