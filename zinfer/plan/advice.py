"""Suggest overrides that make a run fit, or make it faster. Each is found by planning it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from zinfer.config import RunConfig
from zinfer.config.engines import engine_of
from zinfer.job.outcome import Json
from zinfer.model.spec import ModelSpec
from zinfer.plan.deepspeed_json import min_buffer_count
from zinfer.plan.dtype_advice import faster_dtypes, fewer_bits, quantised_configs, with_dtype
from zinfer.plan.fit import can_quantise, largest_fitting_batch, other_kv_placements
from zinfer.plan.kv_advice import kv_document
from zinfer.plan.planned import Planned, plan_run
from zinfer.plan.prediction import Prediction
from zinfer.plan.process_memory import mode_of
from zinfer.plan.zero_layout import zero_layout

WORTHWHILE = 1.05
"""A gain in tokens/s below this is not worth a sentence."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """One override that would help, with what it would bring."""

    override: str
    gain: float | None
    """Ratio of tokens/s to the plan at hand; of ceilings where nothing is calibrated.

    None: unknown, but the override makes the run fit.
    """
    fits: bool
    saved_bytes: int
    """Bytes less on the tier that is fullest now; negative when it needs more."""


def advice_document(run: Planned) -> Json:
    """Work out what only task=plan shows: the largest batch, and the overrides that help."""
    largest = largest_fitting_batch(run) if run.plan.is_checked else None
    return {
        "largest_batch_size": largest,
        "suggestions": [
            {"override": entry.override, "gain": entry.gain, "saved_bytes": entry.saved_bytes}
            for entry in suggestions(run, largest)
        ],
        "fewer_bits": [asdict(entry) for entry in fewer_bits(run)],
        "kv_cache": kv_document(run),
        "rates_source": run.hardware.rates_source,
        "calibrated": run.hardware.profile is not None,
    }


def suggestions(run: Planned, largest_batch: int | None) -> list[Suggestion]:
    """List overrides that make the run fit or make it faster, the fastest first.

    One that neither helps nor fits is left out.
    """
    found = []
    tier = max(
        run.plan.tiers,
        key=lambda tier: tier.needed_bytes / tier.available_bytes if tier.available_bytes else 0.0,
    )
    for override, changed in candidates(run, largest_batch):
        dtype = changed.dtype.compute if changed.dtype.compute != "auto" else run.spec.dtype
        other = plan_run(changed, run.hardware, replace(run.spec, dtype=dtype))
        if not _runs(other) or not other.fits:
            continue
        gain = gain_of(other.prediction, run.prediction)
        saved = tier.needed_bytes - other.plan.tier(tier.name).needed_bytes
        if not run.fits or (gain is not None and gain > WORTHWHILE):
            found.append(Suggestion(override=override, gain=gain, fits=True, saved_bytes=saved))
    return sorted(found, key=lambda entry: -(entry.gain or 0.0))


def gain_of(better: Prediction, than: Prediction) -> float | None:
    """Return the ratio of tokens/s: predicted, or of ceilings where neither is predicted.

    None: only one of the two is predicted, or nothing is known.
    """
    mine, other = better.generated_tokens_per_s, than.generated_tokens_per_s
    if mine is None and other is None:
        mine, other = better.ceiling.generated_tokens_per_s, than.ceiling.generated_tokens_per_s
    return mine / other if mine and other else None


def _runs(run: Planned) -> bool:
    """Tell if the device computes in the type and DeepSpeed's buffers are enough."""
    if run.spec.dtype not in run.hardware.device_dtypes:
        return False
    if run.config.offload.device != "nvme":
        return True
    layout = zero_layout(run.config, run.spec)
    buffers = run.deepspeed_json()["zero_optimization"]["offload_param"]
    large_enough = buffers["buffer_size"] >= layout.largest_swapped_numel
    return bool(large_enough) and mode_of(run.config) == "nvme"


# ---- the overrides that are tried ----


def with_offload(config: RunConfig, device: Any) -> RunConfig:
    """Return the same run with its weights elsewhere."""
    offload = replace(
        config.offload,
        device=device,
        nvme_path=config.offload.nvme_path or "/local_nvme",
        use_gds=False,
        pin_memory=False,
        buffer_numel=None,
        buffer_count=None,
    )
    return replace(config, offload=offload)


def candidates(run: Planned, largest_batch: int | None) -> Iterator[tuple[str, RunConfig]]:
    """Try one setting at a time: (override, the configuration that it makes)."""
    spec, config = run.spec, run.config
    if largest_batch and largest_batch != config.batch.batch_size:
        yield f"batch.batch_size={largest_batch}", config.with_batch(largest_batch)
    yield from _other_offloads(config)
    if config.zero.derivation == "paper":
        yield "zero=tuned", replace(config, zero=replace(config.zero, derivation="tuned"))
    if run.hardware.host_memory_bytes_per_s or run.hardware.device_is_host or not run.fits:
        yield from other_kv_placements(run)  # else what attention on the host takes is unknown
    for dtype in faster_dtypes(run) if spec.dtype in run.hardware.emulated_dtypes else ():
        yield f"dtype={dtype}", with_dtype(config, dtype)
    yield from _other_dtypes(spec, config)
    if (
        config.offload.device == "nvme"
        and config.zero.derivation == "tuned"
        and config.offload.buffer_count is None
    ):
        least = min_buffer_count(zero_layout(config, spec), spec, leaf=False)
        fewer = replace(config.offload, buffer_count=least)
        yield f"offload.buffer_count={least}", replace(config, offload=fewer)


def _other_offloads(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Return the weights on another tier, or page-locked."""
    if engine_of(config).offloads_to:
        for device in engine_of(config).places:
            if device != config.offload.device:
                yield f"offload={device}", with_offload(config, device)
        if config.offload.device == "none":
            yield "engine=resident", replace(config, engine=replace(config.engine, name="resident"))
    if config.offload.device == "cpu" and not config.offload.pin_memory:
        pinned = replace(config.offload, pin_memory=True)
        yield "offload.pin_memory=true", replace(config, offload=pinned)


def _other_dtypes(spec: ModelSpec, config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Return the weights in fewer bits."""
    if config.dtype.bits is None and spec.dtype == "float32":
        half = replace(config.dtype, weights="bfloat16", compute="bfloat16")
        yield "dtype=bfloat16", replace(config, dtype=half)
    if can_quantise(config, spec):
        for name, changed in quantised_configs(spec, config):
            yield f"dtype={name}", changed
