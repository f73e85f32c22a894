"""Hydra's door to the head of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from zinfer.sweep.decision import DECIDED, LeaveHydra, Started

if TYPE_CHECKING:
    from omegaconf import DictConfig


class SweepCallback(Callback):
    """Start the sweep before Hydra runs its first job.

    zinfer.sweep.end does what follows the last job: Hydra does not call back after a failure.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Let the head decide.

        Raises:
            LeaveHydra: no job is left to run.
        """
        from zinfer.sweep.head import decide

        decision = decide(config)
        DECIDED.set(decision)
        if not isinstance(decision, Started) or decision.left == 0:
            raise LeaveHydra
