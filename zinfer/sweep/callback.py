"""Where Hydra starts a sweep of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

if TYPE_CHECKING:
    from omegaconf import DictConfig


class SweepCallback(Callback):
    """Hydra calls this before the first job. What follows the last one is in zinfer.sweep_end: Hydra does not call back after a failure."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Plan the sweep; a preview, and a sweep of which everything is there already, end here."""
        from zinfer.sweep.start import start_sweep

        start_sweep(config)
