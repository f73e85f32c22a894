"""Profile one decode step after the timing, so that no timed generation pays for it.

The trace is Chrome's JSON, compressed: https://ui.perfetto.dev opens it as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import StoppingCriteria, StoppingCriteriaList

from zinfer.config import BatchConfig
from zinfer.job.events import EventLog
from zinfer.job.files import TRACE_FILE
from zinfer.worker.engines import Engine
from zinfer.worker.generate import now_s
from zinfer.worker.kv_cache.session import KvSession

MOST_EXPENSIVE = 5
"""Operations named in the result."""


class OneStep(StoppingCriteria):
    """Record from the first new token to the second: that is one decode step.

    Only rank 0 records; the others take the step with it, for its weights are gathered from all.
    """

    def __init__(self, device: torch.device, recorder: profile | None) -> None:
        self._device, self._recorder, self._tokens = device, recorder, 0

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        now_s(self._device)  # the device has finished what belongs to the step before
        self._tokens += 1
        if self._recorder is not None:
            if self._tokens == 1:
                self._recorder.start()
            else:
                self._recorder.stop()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def profile_step(
    engine: Engine,
    prompts: torch.Tensor,
    batch: BatchConfig,
    kv: KvSession,
    job_dir: Path,
    events: EventLog,
) -> list[dict[str, Any]]:
    """Write JOB_DIR's trace of one decode step. Return its most expensive operations, rank 0's.

    Args:
        prompts: token ids [batch_size, prompt_tokens] of all ranks' rows.
    """
    events.phase("profile")
    rows = batch.batch_size // engine.ranks
    ids = prompts[engine.rank * rows : (engine.rank + 1) * rows].to(engine.device)
    on_gpu = engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    recorder = profile(activities=activities) if engine.rank == 0 else None
    cache = kv.arguments()
    with torch.no_grad():
        engine.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2,
            stopping_criteria=StoppingCriteriaList([OneStep(engine.device, recorder)]),
            **cache,
        )
    if recorder is None:
        return []
    recorder.export_chrome_trace(str(job_dir / TRACE_FILE))
    return most_expensive(recorder.key_averages(), on_gpu=on_gpu)


def most_expensive(averages: Any, *, on_gpu: bool) -> list[dict[str, Any]]:
    """Name the operations with most time of their own: on the GPU where there is one.

    Shares are of the time of all operations. What the host waits for is in none of them.
    """
    times = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in averages
    ]
    whole = sum(time_us for time_us, _ in times) or 1.0
    ranked = sorted(times, key=lambda pair: pair[0], reverse=True)[:MOST_EXPENSIVE]
    return [
        {
            "operation": event.key,
            "calls": event.count,
            "seconds": time_us / 1e6,
            "share": time_us / whole,
        }
        for time_us, event in ranked
    ]
