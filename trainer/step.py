"""One SAE in training: module, optimizer, counters, and the figures of the current window.

Nothing here waits for the device: figures are summed on it and read once per window.
"""

from typing import Any

import torch
from torch import Tensor

from penstock.common.permutation import derive_key
from penstock.trainer.kinds import SAESettings
from penstock.trainer.kinds.base import Schedule, StepResult
from penstock.trainer.sae import SAE, build
from penstock.trainer.start import geometric_median, mean_and_scale

Figures = dict[str, float]

RESAMPLED_FROM = 8192
"""Rows of a window that new directions for dead features are drawn from."""


class SAETraining:
    """An SAE, its optimizer and everything needed to carry on from a checkpoint.

    Args:
        d_in: width of its hook point.
        settings: of the SAE.
        device: where it trains.
        d_out: width of its target's hook point, if that is another one.
    """

    def __init__(
        self, d_in: int, settings: SAESettings, device: torch.device, d_out: int | None = None
    ) -> None:
        self.settings = settings
        self.device = device
        self.sae = build(d_in, settings, d_out).to(device)
        self.scale = self.scale_out = 1.0
        self.rows_since_active = torch.zeros(settings.d_sae, dtype=torch.int64, device=device)
        self._parameters = dict(self.sae.named_parameters())
        if settings.decoder_bias == "none":
            self.sae.b_dec.requires_grad_(False)
        trained = [p for p in self._parameters.values() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=settings.lr, fused=True)
        self._dead: Tensor | None = None
        self._resampled = 0
        self._first_bad = torch.tensor(-1, device=device)
        self._reset_window()

    def initialise(self, rows: Tensor, start: SAE | None = None, targets: Tensor | None = None) -> None:
        """Data-dependent start from the first window.

        Args:
            rows: [R, D] bfloat16 rows of the first window, on the CPU.
            start: what to start from, instead of random weights: takes raw rows; rows of its W_dec have
                unit norm.
            targets: [R, D_out] rows of the target, if that is another hook point.
        """
        mean, self.scale = mean_and_scale(rows)
        self.sae.note_mean((mean * self.scale).float())
        self.scale_out = self.scale
        if targets is not None:
            mean, self.scale_out = mean_and_scale(targets)
        if start is not None:
            self.sae.start_from(start, self.scale, self.scale_out)
            return
        bias = None
        if self.settings.decoder_bias == "mean":
            bias = (mean * self.scale_out).float()
        elif self.settings.decoder_bias == "geometric-median":
            bias = geometric_median(rows if targets is None else targets) * self.scale_out
        samples = rows.float() * self.scale if self.settings.initialisation == "data" else None
        self.sae.initialise(derive_key(self.settings.seed, "weights") >> 1, bias, samples)

    def begin_window(self, rows: Tensor, before: int, targets: Tensor | None = None) -> None:
        """Decide which features are dead for the whole window: one look at the device.

        Args:
            rows, targets: rows of the window, as for `initialise`.
            before: rows trained on so far.
        """
        dead = self.rows_since_active >= self.settings.dead_after_rows
        self._dead = dead if bool(dead.any()) else None
        every = self.settings.resample_every_rows
        # once per `every` rows: at the first window that begins in another span of them
        due = every is not None and before // every > self._resampled // every
        if due and self._dead is not None and len(rows):
            self._resample(rows, targets, dead.nonzero().flatten(), before)
            self._dead = None
        if due:
            self._resampled = before
        self._reset_window()

    def step(self, rows: Tensor, schedule: Schedule, targets: Tensor | None = None) -> None:
        """One optimizer step.

        Args:
            rows: [B, D] bfloat16 on the device.
            targets: [B, D_out] bfloat16 on the device, if that is another hook point.
        """
        x = rows.float() * self.scale
        target = x if targets is None else targets.float() * self.scale_out
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            result = self.sae.training_pass(x, target, schedule, self._dead)
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(schedule)
        self.optimizer.step()
        self.sae.after_step()
        with torch.no_grad():
            self._note(target, result)
            self._first_bad = torch.where(
                (self._first_bad < 0) & ~result.loss.isfinite(), schedule.step, self._first_bad
            )

    def learning_rate(self, schedule: Schedule) -> float:
        """Linear warm-up, constant, linear decay to zero over the last part."""
        settings = self.settings
        decay_steps = settings.lr_decay_fraction * schedule.total_steps
        left = schedule.total_steps - schedule.step
        return (
            settings.lr * schedule.warm_up(settings.lr_warmup_steps) * min(1.0, left / max(1.0, decay_steps))
        )

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
        """What inference needs, on the CPU: parameters, buffers, and the scale as a float64 scalar."""
        state = {name: t.detach().cpu().contiguous() for name, t in self.sae.state_dict().items()}
        state["scale"] = torch.tensor(self.scale, dtype=torch.float64)
        if len(self.settings.hooks) > 1:
            state["scale_out"] = torch.tensor(self.scale_out, dtype=torch.float64)
        return state

    def optimizer_state(self) -> dict[str, Tensor]:
        """What carrying on needs besides the weights, on the CPU."""
        state: dict[str, Tensor] = {"rows_since_active": self.rows_since_active.cpu()}
        if self.settings.resample_every_rows is not None:
            state["resampled"] = torch.tensor(self._resampled)
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = value.detach().cpu().contiguous()
        return state

    def restore(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Carry on from `weights` and `optimizer_state`."""
        self.sae.load_state_dict({k: v for k, v in weights.items() if k not in ("scale", "scale_out")})
        self.scale = float(weights["scale"])
        self.scale_out = float(weights.get("scale_out", weights["scale"]))
        self._resampled = int(optimizer.get("resampled", torch.tensor(0)))
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
        self._sum_x = torch.zeros(self.sae.d_out, device=self.device)
        self._first_bad = torch.tensor(-1, device=self.device)

    @torch.no_grad()
    def _resample(self, rows: Tensor, targets: Tensor | None, dead: Tensor, before: int) -> None:
        """New directions for dead features: rows drawn in proportion to their squared loss."""
        generator = torch.Generator().manual_seed(derive_key(self.settings.seed, "resample", before) >> 1)
        chosen = torch.randperm(len(rows), generator=generator)[:RESAMPLED_FROM]
        x = rows[chosen].to(self.device).float() * self.scale
        target = x if targets is None else targets[chosen].to(self.device).float() * self.scale_out
        loss = (self.sae(x) - target).square().sum(dim=1).cpu().double()
        n = min(len(dead), int((loss > 0).sum()))
        if n == 0:
            return
        drawn = torch.multinomial(loss.square(), n, generator=generator).to(self.device)
        features = dead[:n]
        self.sae.reset_features(features, x[drawn], target[drawn])
        for name, axis in self.sae.feature_axes.items():
            parameter = self._parameters.get(name)
            state = {} if parameter is None else self.optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key].index_fill_(axis, features, 0.0)
        self.rows_since_active[features] = 0

    def _note(self, target: Tensor, result: StepResult) -> None:
        n = len(target)
        self._rows += n
        self._sum_x += target.sum(dim=0)
        self._add("loss", result.loss * n)
        self._add("active", result.active.sum())
        self._add("squares", target.square().sum())
        self._add("residual", (target - result.reconstruction).float().square().sum())
        for name, value in result.components.items():
            self._add(f"component.{name}", value * n)
        self.rows_since_active += n
        self.rows_since_active.masked_fill_(result.active > 0, 0)

    def _add(self, name: str, value: Tensor) -> None:
        exact = value.detach().double()
        self._sums[name] = self._sums[name] + exact if name in self._sums else exact
