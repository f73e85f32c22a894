"""One run, planned: the values that advice, page, worker and sweep hand on together."""

from __future__ import annotations

from dataclasses import dataclass

from zinfer.config import RunConfig
from zinfer.job.outcome import Json
from zinfer.machine.hardware import Hardware
from zinfer.model.spec import ModelSpec
from zinfer.plan.deepspeed_json import derive
from zinfer.plan.kv_placement import kv_bytes
from zinfer.plan.memory import memory_plan
from zinfer.plan.prediction import Prediction, predict
from zinfer.plan.tiers import MemoryPlan


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run before it starts: its inputs, its memory and its speed."""

    spec: ModelSpec
    config: RunConfig
    hardware: Hardware
    plan: MemoryPlan
    """Bytes per tier."""
    prediction: Prediction
    """Seconds, and the ceiling that the hardware sets."""

    @property
    def fits(self) -> bool:
        """True when the run fits this hardware, as far as its sizes are known."""
        return self.plan.fits

    @property
    def kv_host_bytes(self) -> int | None:
        """KV cache of this host's ranks in host memory. None: this model's cache is not known."""
        rows = self.config.batch.batch_size // self.config.launcher.ranks
        on_gpu = not self.hardware.device_is_host
        kv = kv_bytes(self.spec, self.config, rows, on_gpu=on_gpu)
        return None if kv is None else kv.host_bytes * self.config.launcher.ranks

    def deepspeed_json(self) -> Json:
        """Return the DeepSpeed configuration of this run."""
        return derive(self.config, self.spec, self.hardware)

    def document(self) -> Json:
        """Return the plan with its prediction, as JSON-able values."""
        return {**self.plan.document(), "prediction": self.prediction.document(self.plan)}


def plan_run(config: RunConfig, hardware: Hardware, spec: ModelSpec) -> Planned:
    """Plan one run of this model on this hardware. A pure function: nothing is allocated."""
    return Planned(
        spec=spec,
        config=config,
        hardware=hardware,
        plan=memory_plan(spec, config, hardware),
        prediction=predict(spec, config, hardware),
    )
