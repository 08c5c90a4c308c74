"""What /metrics says of the run that a worker holds, or held last."""

from collections.abc import Mapping

from prometheus_client import Gauge

from penstock.common import metrics
from penstock.trainer.config import RunConfig


class RunGauges:
    """The gauges of one run at a time.

    A run that ended keeps them until the worker takes another one, so that its last figures are seen. A run
    that was given up loses them at once: whoever has it now tells how it stands.
    """

    def __init__(self) -> None:
        self._shown: set[tuple[Gauge, tuple[str, ...]]] = set()

    def begin(self, config: RunConfig) -> None:
        """Show what is settled of a run, in place of the one before."""
        self.forget()
        run = config.run_id
        for sae in config.settings.saes:
            self._show(metrics.sae_features, sae.d_sae, run, sae.name)
            self._show(metrics.sae_dead_window_rows, sae.dead_after_rows, run, sae.name)
            if sae.held_l0 is not None:
                self._show(metrics.sae_l0_target, sae.held_l0, run, sae.name)
        # rates of the first minutes want a beginning
        for counter in (metrics.sae_train_rows, metrics.sae_steps, metrics.sae_data_wait_seconds):
            counter.labels(run)

    def taken_over(self, run: str, time: float) -> None:
        """`time`: of the takeover head, in Unix seconds."""
        self._show(metrics.sae_takeover_timestamp_seconds, time, run)

    def figures(self, run: str, figures: dict[str, dict[str, float]]) -> None:
        """The figures of a run's last window, by SAE: the same that its head records."""
        for sae, values in figures.items():
            for name, value in values.items():
                if name == "l0":
                    self._show(metrics.sae_l0, value, run, sae)
                elif name == "dead_features":
                    self._show(metrics.sae_dead_features, value, run, sae)
                elif name == "explained_variance":
                    self._show(metrics.sae_explained_variance, value, run, sae)
                else:
                    component = "total" if name == "loss" else name
                    self._show(metrics.sae_loss, value, run, sae, component)

    def inside_model(self, run: str, figures: Mapping[str, Mapping[str, float | None]]) -> None:
        """What SAEs are worth inside the language model, as `judging.live` measures it."""
        for sae, values in figures.items():
            for gauge, name in ((metrics.sae_ce_recovered, "ce_recovered"), (metrics.sae_kl, "kl")):
                value = values[name]
                if value is not None:
                    self._show(gauge, value, run, sae)

    def forget(self) -> None:
        """The run is somebody else's now."""
        for gauge, labels in self._shown:
            gauge.remove(*labels)
        self._shown.clear()

    def _show(self, gauge: Gauge, value: float, *labels: str) -> None:
        gauge.labels(*labels).set(value)
        self._shown.add((gauge, labels))
