"""Bound the speed of a run from above: the time that each resource needs for what it must move.

The ceiling of a phase is the largest of these times, as if all of them overlapped perfectly (a
roofline; Williams et al. 2009, doi:10.1145/1498765.1498785). Nothing here is calibrated: bytes and
operations are counted from the model's architecture and the ZeRO layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zinfer.config import RunConfig
from zinfer.config.engines import engine_of
from zinfer.machine.hardware import Hardware
from zinfer.model.spec import ModelSpec
from zinfer.plan.binding import RESOURCES, Resource
from zinfer.plan.kv_placement import moved_layers
from zinfer.plan.kv_traffic import kv_traffic
from zinfer.plan.products import pass_flops, touched_weight_bytes, unpacked_weight_bytes
from zinfer.plan.zero_layout import ZeroLayout, zero_layout


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Operations and bytes that one phase asks of one device and its host, for one rank."""

    device_flops: float
    device_memory_bytes: float
    host_device_link_bytes: float
    """One way: the way that carries more. Both work at once."""
    nvme_bytes: float
    host_memory_bytes: float


@dataclass(frozen=True, kw_only=True)
class PhaseCeiling:
    """Lower bounds of one phase's time."""

    demand: Demand
    seconds: Mapping[Resource, float]
    """Time of each resource that the phase uses and whose rate is known."""

    @property
    def ceiling_s(self) -> float | None:
        """Return the largest of them; None where no rate is known."""
        return max(self.seconds.values(), default=None)

    @property
    def binding(self) -> Resource | None:
        """Return the resource that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name], default=None)

    def document(self) -> dict[str, Any]:
        """Return the bounds as JSON values."""
        return {
            "ceiling_s": self.ceiling_s,
            "binding": self.binding,
            "seconds": dict(self.seconds),
            "demand": asdict(self.demand),
        }


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Bounds of a whole generation: one prefill and new_tokens - 1 decode steps."""

    load: PhaseCeiling
    prefill: PhaseCeiling
    decode_step: PhaseCeiling
    """With the cache as long as it is on average."""
    generated_tokens_per_s: float | None
    decode_bytes_per_token: Mapping[Resource, float]
    """Bytes that one new token of one row moves over each resource that a decode step uses.

    A pass serves all rows, so this falls as the batch grows.
    """
    streamed_bytes: int
    """Weights that one forward pass fetches from host memory or NVMe, all ranks.

    0 when they stay on the device.
    """


def _pass_demand(
    spec: ModelSpec,
    config: RunConfig,
    hardware: Hardware,
    layout: ZeroLayout,
    *,
    new: int,
    context: float,
) -> Demand:
    """Count one forward pass on one rank."""
    rows, size = config.batch.batch_size // config.launcher.ranks, layout.itemsize_bytes
    resident = not engine_of(config).zero3 or config.offload.device == "none"
    stored = layout.stored_numel * size
    on_host = stored - layout.small_numel * size
    nvme = layout.swapped_numel * size if config.offload.device == "nvme" else 0
    aliased = hardware.device_is_host
    link = 0 if resident or aliased else on_host / config.launcher.ranks
    weights = touched_weight_bytes(spec, config, rows * new)
    if not aliased:
        weights += unpacked_weight_bytes(spec, config, rows, new)
    kv = kv_traffic(spec, config, rows, new=new, context=context, aliased=aliased)
    on_host = 0
    if config.kv_cache.placement == "host_attention" and new == 1 and not aliased:
        on_host = sum(1 for _ in moved_layers(spec, config))
    device = weights + kv.device_bytes + rows * new * spec.hidden_size * size * 2 * spec.num_layers
    attended = context if new == 1 else context / 2
    return Demand(
        device_flops=pass_flops(spec, rows, new, attended, on_host=on_host),
        device_memory_bytes=device,
        host_device_link_bytes=max(link + kv.to_device_bytes, kv.to_host_bytes),
        nvme_bytes=nvme,
        host_memory_bytes=link + nvme + kv.host_bytes,
    )


def _bounded(demand: Demand, rates: Mapping[Resource, float | None]) -> PhaseCeiling:
    amounts: dict[Resource, float] = {
        "device_compute": demand.device_flops,
        "device_memory": demand.device_memory_bytes,
        "host_device_link": demand.host_device_link_bytes,
        "nvme": demand.nvme_bytes,
        "host_memory": demand.host_memory_bytes,
    }
    seconds = {
        name: amounts[name] / rate for name in RESOURCES if (rate := rates[name]) and amounts[name]
    }
    return PhaseCeiling(demand=demand, seconds=seconds)


def resource_rates(spec: ModelSpec, hardware: Hardware) -> dict[Resource, float | None]:
    """Return the operations or bytes per second of each resource. None: unknown.

    On a machine without an accelerator device memory is host memory.
    """
    on_cpu = hardware.device_is_host
    return {
        "device_compute": hardware.device_flops_per_s.get(spec.dtype),
        "device_memory": (hardware.device_memory_bytes_per_s or hardware.host_memory_bytes_per_s)
        if on_cpu
        else hardware.device_memory_bytes_per_s,
        "host_device_link": hardware.host_to_device_bytes_per_s,
        "nvme": hardware.nvme_read_bytes_per_s,
        "host_memory": hardware.host_memory_bytes_per_s,
    }


def ceiling(spec: ModelSpec, config: RunConfig, hardware: Hardware) -> Ceiling:
    """Find the fastest that this run can be on this hardware.

    Ranks share NVMe and host memory; each has a device and a link of its own.
    """
    layout, ranks, batch = zero_layout(config, spec), config.launcher.ranks, config.batch
    rates = resource_rates(spec, hardware)
    shared: set[Resource] = {"nvme", "host_memory"}
    if hardware.device_is_host:
        shared |= {"device_memory", "device_compute"}
    rates = {
        name: rate / ranks if rate and name in shared else rate for name, rate in rates.items()
    }
    prefill = _bounded(
        _pass_demand(
            spec, config, hardware, layout, new=batch.prompt_tokens, context=batch.prompt_tokens
        ),
        rates,
    )
    context = batch.prompt_tokens + batch.new_tokens / 2
    step = _bounded(_pass_demand(spec, config, hardware, layout, new=1, context=context), rates)
    load_bytes = layout.stored_numel * layout.itemsize_bytes / ranks
    load = _bounded(
        Demand(
            device_flops=0,
            device_memory_bytes=load_bytes,
            host_device_link_bytes=0,
            nvme_bytes=0,
            host_memory_bytes=load_bytes,
        ),
        rates,
    )
    tokens_per_s = None
    if prefill.ceiling_s is not None and step.ceiling_s is not None:
        tokens_per_s = (
            batch.batch_size
            * batch.new_tokens
            / (prefill.ceiling_s + (batch.new_tokens - 1) * step.ceiling_s)
        )
    return Ceiling(
        load=load,
        prefill=prefill,
        decode_step=step,
        generated_tokens_per_s=tokens_per_s,
        decode_bytes_per_token=_bytes_per_token(step.demand, batch.batch_size // ranks),
        streamed_bytes=streamed_bytes(config, layout, device_is_host=hardware.device_is_host),
    )


def _bytes_per_token(demand: Demand, rows: int) -> dict[Resource, float]:
    """Return one rank's bytes of a decode step, shared among the rows that it serves."""
    moved: dict[Resource, float] = {
        "device_memory": demand.device_memory_bytes,
        "host_device_link": demand.host_device_link_bytes,
        "nvme": demand.nvme_bytes,
        "host_memory": demand.host_memory_bytes,
    }
    return {name: count / rows for name, count in moved.items() if count}


def streamed_bytes(config: RunConfig, layout: ZeroLayout, *, device_is_host: bool) -> int:
    """Return the bytes of weights that one forward pass fetches from below the device, all ranks.

    Experts are fetched whole, used or not: a layer's experts are one parameter.
    """
    if (
        not engine_of(config).zero3
        or config.offload.device == "none"
        or (config.offload.device == "cpu" and device_is_host)
    ):
        return 0
    if config.offload.device == "nvme":
        return layout.swapped_numel * layout.itemsize_bytes * config.launcher.ranks
    return (layout.stored_numel - layout.small_numel) * layout.itemsize_bytes


def implied_bandwidth_bytes_per_s(
    weight_bytes: float, tokens_per_s: float, batch_size: int
) -> float:
    """Return the bandwidth at which weights must have been streamed for this throughput.

    Every pass of the batch reads them once and adds a token to each row.
    """
    return weight_bytes * tokens_per_s / batch_size
