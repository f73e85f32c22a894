"""Say in which dtype this machine is fast, where that is not the one that a run computes in.

A processor without bfloat16 arithmetic emulates it: on AVX2 alone, matrix products take about
eight times as long as in float32. Many checkpoints are bfloat16, so dtype=auto meets this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from zinfer.config import RunConfig
from zinfer.plan.planned import Planned, plan_run
from zinfer.units import format_times

NOTICED_GAIN = 1.25
"""A phase that another dtype would make so many times as fast is worth a sentence."""


def with_dtype(config: RunConfig, dtype: Any) -> RunConfig:
    """Return the same run with its weights stored and computed in this float type."""
    return replace(config, dtype=replace(config.dtype, weights=dtype, compute=dtype))


def faster_dtypes(run: Planned) -> list[str]:
    """Return other float types worth trying: the machine computes in them, and the run fits."""
    if run.config.dtype.bits is not None or not run.hardware.device_is_host:
        return []
    others = (kind for kind in run.hardware.device_dtypes if kind != run.spec.dtype)
    return [kind for kind in others if kind not in run.hardware.emulated_dtypes]


def dtype_warnings(run: Planned) -> Iterator[str]:
    """Name the faster dtype, with its gain in prefill and decode where that was calibrated."""
    others = [_planned_in(run, kind) for kind in faster_dtypes(run)]
    fitting = [other for other in others if other.fits]
    measured = [said for other in fitting if (said := _measured_gain(run, other))]
    if measured:
        yield max(measured)[1]
    elif run.spec.dtype in run.hardware.emulated_dtypes and fitting:
        if any(other.prediction.decode_step_s is not None for other in fitting):
            return  # measured, and not faster for this run
        names = " or ".join(f"dtype={other.spec.dtype}" for other in fitting)
        yield (
            f"{run.hardware.device_name} has no {run.spec.dtype} arithmetic and emulates it. "
            f"Try {names}, likely several times as fast; zinfer task=calibrate measures by how much"
        )


def _planned_in(run: Planned, dtype: str) -> Planned:
    """Return the same run, computed in another type."""
    changed = with_dtype(run.config, dtype)
    return plan_run(changed, run.hardware, replace(run.spec, dtype=dtype))


def _measured_gain(run: Planned, other: Planned) -> tuple[float, str] | None:
    """Return (gain in tokens/s, sentence) from the calibration. None: unknown, or no gain."""
    mine, faster = run.prediction, other.prediction
    if not (mine.prefill_s and mine.decode_step_s and faster.prefill_s and faster.decode_step_s):
        return None
    prefill, decode = mine.prefill_s / faster.prefill_s, mine.decode_step_s / faster.decode_step_s
    rate = (faster.generated_tokens_per_s or 0.0) / (mine.generated_tokens_per_s or 1.0)
    if rate < 1.0 or max(prefill, decode) < NOTICED_GAIN:
        return None
    emulated = run.spec.dtype in run.hardware.emulated_dtypes
    because = f"has no {run.spec.dtype} arithmetic" if emulated else f"is slow in {run.spec.dtype}"
    return rate, (
        f"{run.hardware.device_name} {because}. Set dtype={other.spec.dtype}: as calibrated, "
        f"prefill {format_times(prefill)} as fast, decode {format_times(decode)} as fast"
    )
