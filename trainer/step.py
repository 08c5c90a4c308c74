"""One SAE in training: module, optimizer, counters, and the figures of the current window.

Nothing here waits for the device: figures are summed on it and read once per window.
"""

import math
from typing import Any

import torch
from torch import Tensor

from penstock.common.permutation import derive_key
from penstock.trainer.kinds import SAESettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.sae import SAE, build

Figures = dict[str, float]


class SAETraining:
    """An SAE, its optimizer and everything needed to carry on from a checkpoint.

    Args:
        d_in: width of its hook point.
        settings: of the SAE.
        device: where it trains.
    """

    def __init__(self, d_in: int, settings: SAESettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.sae = build(d_in, settings).to(device)
        self.scale = 1.0
        self.rows_since_active = torch.zeros(settings.d_sae, dtype=torch.int64, device=device)
        self._parameters = dict(self.sae.named_parameters())
        if settings.decoder_bias == "none":
            self.sae.b_dec.requires_grad_(False)
        trained = [p for p in self._parameters.values() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=settings.lr, fused=True)
        self._dead: Tensor | None = None
        self._first_bad = torch.tensor(-1, device=device)
        self._reset_window()

    def initialise(self, rows: Tensor, start: SAE | None = None) -> None:
        """Data-dependent start from the first window.

        Args:
            rows: [R, D] bfloat16 rows of the first window, on the CPU.
            start: what to start from, instead of random weights: takes raw rows; rows of its W_dec have
                unit norm.
        """
        d_in = rows.shape[1]
        total = torch.zeros(d_in, dtype=torch.float64)
        squared = torch.zeros(d_in, dtype=torch.float64)
        for block in torch.split(rows, 8192):
            exact = block.double()
            total += exact.sum(dim=0)
            # by column first: the bits of one full sum depend on the number of threads
            squared += exact.square().sum(dim=0)
        mean_square = float(squared.sum()) / max(1, len(rows))
        self.scale = math.sqrt(d_in / mean_square) if mean_square > 0 else 1.0
        if start is not None:
            self.sae.start_from(start, self.scale)
            return
        use_mean = self.settings.decoder_bias == "mean"
        mean = (total / max(1, len(rows)) * self.scale).float() if use_mean else None
        self.sae.initialise(derive_key(self.settings.seed, "weights") >> 1, mean)

    def begin_window(self) -> None:
        """Decide which features are dead for the whole window: one look at the device."""
        dead = self.rows_since_active >= self.settings.dead_after_rows
        self._dead = dead if bool(dead.any()) else None
        self._reset_window()

    def step(self, rows: Tensor, schedule: Schedule) -> None:
        """One optimizer step.

        Args:
            rows: [B, D] bfloat16 on the device.
        """
        x = rows.float() * self.scale
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            result = self.sae.training_pass(x, schedule, self._dead)
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(schedule)
        self.optimizer.step()
        with torch.no_grad():
            self._note(x, result.loss, result.components, result.reconstruction, result.active)
            self._first_bad = torch.where(
                (self._first_bad < 0) & ~result.loss.isfinite(), schedule.step, self._first_bad
            )

    def learning_rate(self, schedule: Schedule) -> float:
        """Linear warm-up, constant, linear decay to zero over the last part."""
        settings = self.settings
        warmup = min(1.0, (schedule.step + 1) / max(1, settings.lr_warmup_steps))
        decay_steps = settings.lr_decay_fraction * schedule.total_steps
        left = schedule.total_steps - schedule.step
        return settings.lr * warmup * min(1.0, left / max(1.0, decay_steps))

    def end_window(self) -> tuple[Figures, int | None]:
        """Means over the window, and the first step whose loss was not finite (or None)."""
        rows = max(1, self._rows)
        names = list(self._sums)
        host = torch.stack([self._sums[name].double() for name in names]).cpu().tolist()
        sums = dict(zip(names, host, strict=True))
        mean = (self._sum_x / rows).square().sum().double()
        total_variance = sums["squares"] / rows - float(mean)
        residual = sums["residual"] / rows
        figures = {
            name.removeprefix("component."): sums[name] / rows
            for name in names
            if name.startswith("component.")
        }
        figures |= {
            "loss": sums["loss"] / rows,
            "l0": sums["active"] / rows,
            "explained_variance": 1 - residual / total_variance if total_variance > 0 else 0.0,
            "dead_features": float((self.rows_since_active >= self.settings.dead_after_rows).sum()),
        }
        first_bad = int(self._first_bad)
        return figures, None if first_bad < 0 else first_bad

    def weights_are_finite(self) -> bool:
        """Whether every weight is: a finite loss can still have had gradients that overflow."""
        return all(bool(parameter.isfinite().all()) for parameter in self._parameters.values())

    def weights(self) -> dict[str, Tensor]:
        """What inference needs, on the CPU: parameters, and the scale as a float64 scalar."""
        state = {name: p.detach().cpu().contiguous() for name, p in self._parameters.items()}
        return state | {"scale": torch.tensor(self.scale, dtype=torch.float64)}

    def optimizer_state(self) -> dict[str, Tensor]:
        """What carrying on needs besides the weights, on the CPU."""
        state: dict[str, Tensor] = {"rows_since_active": self.rows_since_active.cpu()}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = value.detach().cpu().contiguous()
        return state

    def restore(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Carry on from `weights` and `optimizer_state`."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])
        self.scale = float(weights["scale"])
        self.rows_since_active.copy_(optimizer["rows_since_active"])
        for name, parameter in self._parameters.items():
            state: dict[str, Any] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}/{name}" in optimizer:
                    state[key] = optimizer[f"{key}/{name}"].to(self.device, copy=True)
            if state:
                self.optimizer.state[parameter] = state

    def _reset_window(self) -> None:
        self._rows = 0
        self._sums: dict[str, Tensor] = {}
        self._sum_x = torch.zeros(self.sae.d_in, device=self.device)
        self._first_bad = torch.tensor(-1, device=self.device)

    def _note(
        self,
        x: Tensor,
        loss: Tensor,
        components: dict[str, Tensor],
        reconstruction: Tensor,
        active: Tensor,
    ) -> None:
        n = len(x)
        self._rows += n
        self._sum_x += x.sum(dim=0)
        self._add("loss", loss * n)
        self._add("active", active.sum())
        self._add("squares", x.square().sum())
        self._add("residual", (x - reconstruction).float().square().sum())
        for name, value in components.items():
            self._add(f"component.{name}", value * n)
        self.rows_since_active += n
        self.rows_since_active.masked_fill_(active > 0, 0)

    def _add(self, name: str, value: Tensor) -> None:
        exact = value.detach().double()
        self._sums[name] = self._sums[name] + exact if name in self._sums else exact
