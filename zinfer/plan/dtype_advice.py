"""Say in which dtype this machine is fast, and what fewer bits would gain and cost.

A processor without bfloat16 arithmetic emulates it: on AVX2 alone, matrix products take about
eight times as long as in float32. Many checkpoints are bfloat16, so dtype=auto meets this.
Fewer bits of a weight are fewer bytes to read and to stream. What they cost in quality is known
where it was measured; it differs from model to model, and small ones lose most.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from zinfer.config import RunConfig
from zinfer.job.outcome import Json
from zinfer.model.spec import ModelSpec
from zinfer.paths import PACKAGE
from zinfer.plan.fit import can_quantise
from zinfer.plan.planned import Planned, plan_run
from zinfer.units import format_times

NOTICED_GAIN = 1.25
"""A phase that another dtype would make so many times as fast is worth a sentence."""
NOTICED_KERNEL = 1.01
"""A kernel that makes less of a difference to a run need not be named."""

QUALITY_FILE = PACKAGE / "data" / "quantised_quality.json"


@dataclass(frozen=True, kw_only=True)
class FewerBits:
    """Weights of 8 or 4 bits, with what they would bring here and what they cost elsewhere."""

    override: str
    over: str
    """The unquantised dtype that it is compared with."""
    is_this_run: bool
    """The plan at hand has these weights already."""
    gain: float | None
    """Ratio of tokens/s to the same run unquantised; of ceilings where nothing is calibrated."""
    is_predicted: bool
    """The gain comes from calibrated kernels, not from the ceilings alone."""
    gain_unpacked: float | None
    """The same at best, where a GPU refuses our kernel and unpacks. None: no kernel is counted."""
    stored_bytes: int
    stored_share: float
    """Bytes of the stored weights over those unquantised."""
    fits: bool
    quality: tuple[Json, ...]
    """Rows of QUALITY_FILE of this model, else of the models that were measured."""
    is_own_quality: bool
    """The rows are of this very model."""


def measured_quality(model: str, weights: str) -> tuple[Json, ...]:
    """Return what these weights cost a model, with its source; else what they cost other models."""
    rows: list[Json] = json.loads(QUALITY_FILE.read_text())["measured"]
    found = [row for row in rows if row["weights"] == weights]
    own = [row for row in found if row["model"] == model]
    return tuple(own or found)


def fewer_bits(run: Planned) -> Iterator[FewerBits]:
    """Plan the same run unquantised, and with weights of 8 and of 4 bits.

    Nothing is yielded where it cannot have them.
    """
    plain = _unquantised(run)
    if not can_quantise(plain.config, plain.spec):
        return
    for weights, config in quantised_configs(plain.spec, plain.config):
        other = plan_run(config, plain.hardware, plain.spec)
        mine, theirs = plain.prediction, other.prediction
        predicted = ratio(theirs.generated_tokens_per_s, mine.generated_tokens_per_s)
        at_best = ratio(theirs.ceiling.generated_tokens_per_s, mine.ceiling.generated_tokens_per_s)
        quality = measured_quality(run.config.model.name, weights)
        yield FewerBits(
            override=f"dtype={weights}",
            over=f"dtype={plain.spec.dtype}",
            is_this_run=run.config.dtype.weights == weights,
            gain=at_best if predicted is None else predicted,
            is_predicted=predicted is not None,
            gain_unpacked=None if predicted else _gain_unpacked(config, plain),
            stored_bytes=other.plan.weight_stored_bytes,
            stored_share=other.plan.weight_stored_bytes / plain.plan.weight_stored_bytes,
            fits=other.fits,
            quality=quality,
            is_own_quality=any(row["model"] == run.config.model.name for row in quality),
        )


def _gain_unpacked(config: RunConfig, plain: Planned) -> float | None:
    """Return the gain of packed weights that a GPU unpacks at each use. None: no other than ours.

    Args:
        plain: the same run unquantised.
    """
    if plain.hardware.device_is_host or config.dtype.kernel not in ("auto", "compiled"):
        return None
    unpacking = config.changed(dtype={"kernel": "torch"})
    ours, theirs = (
        plan_run(each, plain.hardware, plain.spec).prediction.ceiling.generated_tokens_per_s
        for each in (config, unpacking)
    )
    if ours is None or theirs is None or ours < NOTICED_KERNEL * theirs:
        return None
    return ratio(theirs, plain.prediction.ceiling.generated_tokens_per_s)


def _unquantised(run: Planned) -> Planned:
    """Return the same run with its weights in the type that it computes in."""
    return run if run.config.dtype.bits is None else _planned_in(run, run.spec.dtype)


def quantised_configs(spec: ModelSpec, config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield (dtype, the same run with it). DeepSpeed's way, of zero=paper, computes in bfloat16."""
    compute: Any = "bfloat16" if config.zero.derivation == "paper" else config.dtype.compute
    for weights in ("int8", "int4"):
        kind: Any = weights
        yield weights, replace(config, dtype=replace(config.dtype, weights=kind, compute=compute))


def ratio(better: float | None, than: float | None) -> float | None:
    """Return better over than; None where either is unknown."""
    return better / than if better and than else None


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
