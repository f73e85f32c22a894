"""Predict how long a run takes, from what task=calibrate measured on this machine.

A pass is the sum of its kernels, the loop around them, and the streaming of weights. Without a
calibration profile, and for several ranks, the predictions are None: nobody measured them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zinfer.config import ITEMSIZE_BYTES, RunConfig
from zinfer.config.engines import engine_of
from zinfer.machine.hardware import Hardware
from zinfer.machine.measured import FamilyCost, Mode, ModeCost
from zinfer.machine.profile import CalibrationProfile
from zinfer.model.spec import ModelSpec
from zinfer.plan.binding import Binding, Resource
from zinfer.plan.ceiling import Ceiling, ceiling
from zinfer.plan.deepspeed_json import leaf_layers, model_is_leaf, staging_limit_bytes
from zinfer.plan.kv_seconds import (
    HOST_ATTENTION,
    KV_TO_DEVICE,
    KV_TO_HOST,
    attention_seconds,
    kv_copy_seconds,
)
from zinfer.plan.process_memory import mode_of
from zinfer.plan.product_seconds import dequantise_seconds, products_seconds
from zinfer.plan.tiers import MemoryPlan
from zinfer.plan.zero_layout import ZeroLayout, zero_layout
from zinfer.units import MIB

CACHES_BYTES = 32 * MIB
"""Models with more bytes of weights find each layer cold: no processor cache holds them."""
THIN_ROWS = 64
"""A product with more rows than this spends its time on arithmetic, not on waiting for weights."""


MOVED_OVER: Mapping[Resource, str] = {
    "nvme": "nvme",
    "host_device_link": "link",
    "host_memory": "host_memory",
    "device_memory": "device_memory",
}
"""Resource that bytes move over -> its name in metrics."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds and tokens per second before the run; None: unknown."""

    ceiling: Ceiling
    load_s: float | None
    prefill_s: float | None
    decode_step_s: float | None
    generated_tokens_per_s: float | None
    yardstick_s: float | None = None
    """Time of the yardstick at calibration: the machine's speed for which these times hold."""
    parts: Mapping[str, float]
    """Seconds of a decode step by cause."""

    @property
    def binding_resource(self) -> Binding | None:
        """Resource that a decode step waits for.

        Fixed cost (Python, launches) where it is predicted to take more than half of the step,
        else the resource that sets the ceiling. None: no rate of this hardware is known.
        """
        fixed = self.parts.get("loop", 0.0) + self.parts.get("layers", 0.0)
        if self.decode_step_s and fixed > self.decode_step_s / 2:
            return "fixed_cost"
        return self.ceiling.decode_step.binding

    def metrics(self, plan: MemoryPlan) -> dict[str, float]:
        """Map names to values of what is known."""
        values = {
            "predicted_load_s": self.load_s,
            "predicted_prefill_s": self.prefill_s,
            "predicted_decode_step_s": self.decode_step_s,
            "predicted_generated_tokens_per_s": self.generated_tokens_per_s,
            "ceiling_prefill_s": self.ceiling.prefill.ceiling_s,
            "ceiling_decode_step_s": self.ceiling.decode_step.ceiling_s,
            "ceiling_generated_tokens_per_s": self.ceiling.generated_tokens_per_s,
            "predicted_peak_host_rss_bytes": plan.peak_host_rss_bytes,
            "predicted_peak_device_bytes": plan.peak_device_bytes,
            "predicted_kv_cache_bytes": plan.kv_cache_bytes,
        }
        moved = {
            f"predicted_{MOVED_OVER[resource]}_bytes_per_token": count
            for resource, count in self.ceiling.decode_bytes_per_token.items()
        }
        return {name: value for name, value in (values | moved).items() if value is not None}

    def document(self, plan: MemoryPlan) -> dict[str, Any]:
        """Return as JSON values the metrics, what binds, and how the ceiling came about."""
        return {
            **self.metrics(plan),
            "binding_resource": self.binding_resource,
            "parts_of_decode_step": dict(self.parts),
            "ceilings": {
                "load": self.ceiling.load.document(),
                "prefill": self.ceiling.prefill.document(),
                "decode_step": self.ceiling.decode_step.document(),
            },
            "decode_bytes_per_token": dict(self.ceiling.decode_bytes_per_token),
            "streamed_bytes": self.ceiling.streamed_bytes,
        }


def predict(spec: ModelSpec, config: RunConfig, hardware: Hardware) -> Prediction:
    """Predict the times of this run on this hardware."""
    bound = ceiling(spec, config, hardware)
    profile = hardware.profile
    batch = config.batch
    if profile is None or config.launcher.ranks > 1:
        return Prediction(
            ceiling=bound,
            load_s=None,
            prefill_s=None,
            decode_step_s=None,
            generated_tokens_per_s=None,
            parts={},
        )
    layout = zero_layout(config, spec)
    leaf = leaf_layers(config, spec, staging_limit_bytes(config, hardware))
    context = batch.prompt_tokens + batch.new_tokens / 2
    prefill = pass_parts(
        spec,
        config,
        profile,
        layout,
        leaf=leaf,
        new=batch.prompt_tokens,
        context=batch.prompt_tokens,
    )
    step = pass_parts(spec, config, profile, layout, leaf=leaf, new=1, context=context)
    on_cpu = hardware.device_is_host
    prefill_s = _together(prefill, bound.prefill.ceiling_s, on_cpu=on_cpu)
    step_s = _together(step, bound.decode_step.ceiling_s, on_cpu=on_cpu)
    tokens_per_s = None
    if prefill_s is not None and step_s is not None:
        tokens_per_s = (
            batch.batch_size * batch.new_tokens / (prefill_s + (batch.new_tokens - 1) * step_s)
        )
    return Prediction(
        ceiling=bound,
        load_s=_load_s(spec, config, profile, layout),
        prefill_s=prefill_s,
        decode_step_s=step_s,
        generated_tokens_per_s=tokens_per_s,
        yardstick_s=profile.yardstick_s,
        parts=step or {},
    )


def _together(
    parts: Mapping[str, float] | None, ceiling_s: float | None, *, on_cpu: bool
) -> float | None:
    """Add up the parts of a pass, never below its ceiling.

    A processor does one thing after the other. A GPU works while the host launches kernels and the
    link copies each way: the longest of these counts. The device waits for attention on the host.
    """
    if parts is None:
        return None
    if on_cpu:
        return max(sum(parts.values()), ceiling_s or 0.0)
    host = parts["loop"] + parts["layers"]
    device = sum(
        parts.get(name, 0.0)
        for name in (
            "matrix products", "dequantisation", "attention", "elementwise", HOST_ATTENTION,
        )
    )  # fmt: skip
    to_device = parts["streaming"] + parts.get(KV_TO_DEVICE, 0.0)
    return max(host, device, to_device, parts.get(KV_TO_HOST, 0.0), ceiling_s or 0.0)


def pass_parts(
    spec: ModelSpec,
    config: RunConfig,
    profile: CalibrationProfile,
    layout: ZeroLayout,
    *,
    leaf: bool,
    new: int,
    context: float,
) -> dict[str, float] | None:
    """Return the seconds of one forward pass by cause.

    None where this dtype or mode was not calibrated, or the layers were not seen running.

    Args:
        leaf: decoder layers are leaves of ZeRO-3.
    """
    rows = config.batch.batch_size
    family, mode = (
        profile.family_cost(spec.model_type, spec.dtype),
        profile.mode_cost(fixed_mode(config, leaf=leaf), spec.dtype),
    )
    products_s = products_seconds(spec, config, profile, rows, new)
    unpacking_s = dequantise_seconds(spec, config, profile, rows * new)
    streaming_s = streaming_seconds(config, profile, layout)
    copies_s = kv_copy_seconds(spec, config, profile, new, context)
    if (
        family is None
        or mode is None
        or spec.layer_ops is None
        or products_s is None
        or unpacking_s is None
        or streaming_s is None
        or copies_s is None
    ):
        return None
    factor = (
        profile.cold_factor if layout.stored_numel * layout.itemsize_bytes > CACHES_BYTES else 1.0
    )
    parts = {
        "loop": factor * mode.step_s,
        "layers": factor * layers_seconds(spec, layout, family, mode),
        "matrix products": (factor if rows * new <= THIN_ROWS else 1.0) * products_s,
        "dequantisation": unpacking_s,
        "attention": attention_seconds(spec, profile, rows, new, context, config=config),
        "elementwise": elementwise_seconds(spec, family.value_s, profile, rows, new),
        "streaming": streaming_s,
        **copies_s,
    }
    return {name: profile.disturbance * seconds for name, seconds in parts.items()}


def layers_seconds(
    spec: ModelSpec, layout: ZeroLayout, family: FamilyCost, mode: ModeCost
) -> float:
    """Return the fixed cost of all layers in a pass, whatever its tokens, with warm caches."""
    return spec.num_layers * (
        (spec.layer_ops or 0.0) * family.op_s
        + mode.layer_s
        + layer_parts(spec, layout, mode.mode) * mode.part_s
    )


def fixed_mode(config: RunConfig, *, leaf: bool) -> Mode:
    """Return the name of the run's ModeCost.

    ZeRO-3 that never fetches a weight costs what plain transformers costs.
    """
    if not engine_of(config).zero3 or model_is_leaf(config):
        return Mode("resident")
    return Mode(mode_of(config), by_module=not leaf)


def layer_parts(spec: ModelSpec, layout: ZeroLayout, mode: Mode) -> float:
    """Return the fetches per layer: its modules, or its parameters if the layer is a leaf."""
    if mode.by_module:
        return spec.layer_modules or 0.0
    return layout.parameters_per_layer


def elementwise_seconds(
    spec: ModelSpec, value_s: float, profile: CalibrationProfile, rows: int, new: int
) -> float:
    """Return the seconds of norms, activations, residuals, and logits that are searched."""
    logits = rows * spec.vocab_size * (ITEMSIZE_BYTES[spec.dtype] + 2 * 4)
    return (
        value_s * rows * new * (spec.layer_values or 0.0) * spec.num_layers
        + logits / profile.host_copy.median
    )


def streaming_seconds(
    config: RunConfig, profile: CalibrationProfile, layout: ZeroLayout
) -> float | None:
    """Return the seconds that fetching weights adds to a pass. None: it was not calibrated."""
    if not engine_of(config).zero3 or config.offload.device == "none":
        return 0.0
    if config.offload.device == "cpu":
        link = (
            profile.host_to_device_pinned
            if config.offload.pin_memory
            else profile.host_to_device_pageable
        )
        if profile.device_kind == "cpu":
            return 0.0  # the partition itself is used
        return layout.stored_numel * layout.itemsize_bytes / link.median if link else None
    if layout.swapped_numel == 0:
        return 0.0
    if profile.stream is None:
        return None
    return (
        layout.swapped_count * profile.stream.parameter_s
        + layout.swapped_numel * layout.itemsize_bytes / profile.stream.bytes_per_s
    )


def _load_s(
    spec: ModelSpec, config: RunConfig, profile: CalibrationProfile, layout: ZeroLayout
) -> float | None:
    """Return the seconds to build random weights in the compute dtype.

    None for checkpoints, whose speed depends on where they lie, and for quantising: not timed.
    """
    cost = profile.load.get(mode_of(config))
    if cost is None or config.weights != "dummy" or config.dtype.bits is not None:
        return None
    return (
        cost.fixed_s
        + len(spec.parameters) * cost.parameter_s
        + layout.stored_numel * layout.itemsize_bytes / cost.bytes_per_s
    )
