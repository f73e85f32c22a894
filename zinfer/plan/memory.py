"""Bytes of a run per memory tier, before anything is allocated; whether they fit; and what to type when they do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from zinfer.config import RunConfig
from zinfer.config.engines import engine_of
from zinfer.machine.hardware import Hardware
from zinfer.model.spec import ModelSpec, kv_cache_bytes
from zinfer.plan.deepspeed_json import deepspeed_json, min_buffer_count
from zinfer.plan.host_process import (
    host_process,
    kept_after_loading,
    kept_free_factor,
    loading_bytes,
    mapped_bytes,
)
from zinfer.plan.working_memory import CUDA_CONTEXT_BYTES, prefill_bytes
from zinfer.plan.zero_layout import ZeroLayout, zero_layout
from zinfer.units import format_bytes

TierName = Literal["device", "host", "pinned", "disk"]
TIERS: tuple[TierName, ...] = ("device", "host", "pinned", "disk")

LOADED = ("weights", "persistent weights")
"""Device items that are there before the loader's worst moment."""
STAGING_SHARE = 0.25
"""Tuned NVMe buffers take at most this share of the host memory that is available."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One reason why a tier is needed."""

    name: str
    bytes: int
    """Of one rank."""


@dataclass(frozen=True, kw_only=True)
class Tier:
    """What one rank needs of one memory, and what there is for all ranks of this host."""

    name: TierName
    items: tuple[Item, ...]
    per_rank_bytes: int
    needed_bytes: int
    """Compared with available_bytes: of all ranks for host, pinned and disk; of one rank for a GPU, which is its own.

    On a machine without an accelerator the device is host memory: the host tier's need then includes it. Page-locked memory is host
    memory too, and is counted there as well.
    """
    available_bytes: int | None
    """Free now, less the headroom. None: unknown, never a reason to refuse."""

    @property
    def fits(self) -> bool:
        return self.available_bytes is None or self.needed_bytes <= self.available_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes per tier and rank."""

    ranks: int
    tiers: tuple[Tier, ...]
    kv_cache_bytes: int | None
    weight_bytes: int
    device_is_host: bool
    mapped_checkpoint_bytes: int = 0
    """By how much pages of the checkpoint's files raise the peak while it is loaded. The system drops them when memory runs short: they are
    no reason to refuse."""
    problems: tuple[str, ...] = ()
    """Why this cannot run although the bytes may fit."""

    @property
    def fits(self) -> bool:
        return not self.problems and all(tier.fits for tier in self.tiers)

    @property
    def peak_host_rss_bytes(self) -> int:
        """Resident memory of all ranks' processes at their highest; on a machine without an accelerator the device's share is in it."""
        return self.tier("host").needed_bytes + self.mapped_checkpoint_bytes

    @property
    def peak_device_bytes(self) -> int | None:
        """What torch's allocator hands out at most, all ranks; None where the device is host memory."""
        if self.device_is_host:
            return None
        outside = sum(
            item.bytes for item in self.tier("device").items if item.name == "CUDA context"
        )
        return self.ranks * (self.tier("device").per_rank_bytes - outside)

    def tier(self, name: TierName) -> Tier:
        """The tier of that name."""
        return next(tier for tier in self.tiers if tier.name == name)

    def document(self) -> dict[str, Any]:
        """JSON-able."""
        tiers = {tier.name: {**asdict(tier), "fits": tier.fits} for tier in self.tiers}
        return {
            "fits": self.fits,
            "ranks": self.ranks,
            "problems": list(self.problems),
            "tiers": tiers,
        }


class DoesNotFit(ValueError):
    """The plan says that this run would run out of memory. The message has the numbers and what to type."""


def memory_plan(spec: ModelSpec, config: RunConfig, hardware: Hardware) -> MemoryPlan:
    """Bytes of one run, per rank and tier."""
    layout = zero_layout(config, spec)
    ranks = config.launcher.ranks
    items: dict[TierName, list[Item]] = {
        "device": _device_items(spec, config, hardware, layout),
        "host": _host_items(spec, config, hardware, layout),
        "pinned": _pinned_items(spec, config, hardware, layout),
        "disk": [Item(name="swapped weights", bytes=layout.swapped_numel * layout.itemsize_bytes)]
        if config.offload.device == "nvme"
        else [],
    }
    later = (
        sum(item.bytes for item in items["device"] if item.name not in LOADED)
        if hardware.device_kind == "cpu"
        else 0
    )
    loading = loading_bytes(config, spec, layout)
    more = max(0, loading - later)  # what generating takes later covers the rest
    items["host"].append(Item(name="more while loading", bytes=more))
    per_rank = {name: sum(item.bytes for item in items[name]) for name in TIERS}
    needed: dict[TierName, int] = {
        "device": per_rank["device"],
        "host": ranks
        * (
            per_rank["host"]
            + per_rank["pinned"]
            + (per_rank["device"] if hardware.device_kind == "cpu" else 0)
        ),
        "pinned": ranks * per_rank["pinned"],
        "disk": ranks * per_rank["disk"],
    }
    available: dict[TierName, int | None] = {
        "device": None if hardware.device_kind == "cpu" else hardware.device_free_bytes,
        "host": hardware.host_available_bytes,
        "pinned": hardware.memlock_limit_bytes,
        "disk": hardware.disk_free_bytes if config.offload.device == "nvme" else None,
    }
    keep = 1 - config.plan.headroom
    tiers = tuple(
        Tier(
            name=name,
            items=tuple(item for item in items[name] if item.bytes),
            per_rank_bytes=per_rank[name],
            needed_bytes=needed[name],
            available_bytes=_scaled(available[name], keep if name != "pinned" else 1.0),
        )
        for name in TIERS
    )
    return MemoryPlan(
        ranks=ranks,
        tiers=tiers,
        kv_cache_bytes=_kv_bytes(spec, config, config.batch.batch_size),
        weight_bytes=layout.stored_numel * layout.itemsize_bytes,
        device_is_host=hardware.device_kind == "cpu",
        mapped_checkpoint_bytes=max(0, loading + mapped_bytes(config, spec) - later) - more,
        problems=tuple(_layout_problems(spec, config, hardware, layout)),
    )


def _scaled(count: int | None, share: float) -> int | None:
    return None if count is None else int(count * share)


def staging_limit_bytes(config: RunConfig, hardware: Hardware) -> int | None:
    """What one rank's tuned NVMe buffers may page-lock, or None where host memory is unknown."""
    limits = [
        limit
        for limit in (
            _scaled(hardware.host_available_bytes, STAGING_SHARE),
            hardware.memlock_limit_bytes,
        )
        if limit is not None
    ]
    return min(limits) // config.launcher.ranks if limits else None


def derive(config: RunConfig, spec: ModelSpec, hardware: Hardware) -> dict[str, Any]:
    """The DeepSpeed JSON of this run on this hardware."""
    return deepspeed_json(config, spec, staging_limit_bytes=staging_limit_bytes(config, hardware))


def _kv_bytes(spec: ModelSpec, config: RunConfig, rows: int) -> int | None:
    """Of the caches at the end of a generation: the last new token is chosen and never cached."""
    return kv_cache_bytes(spec, rows, config.batch.prompt_tokens + config.batch.new_tokens - 1)


def _rows(config: RunConfig) -> int:
    return config.batch.batch_size // config.launcher.ranks


def _device_items(
    spec: ModelSpec, config: RunConfig, hardware: Hardware, layout: ZeroLayout
) -> list[Item]:
    """Device memory of one rank at its highest: the cache is full while the last prefill's states are not yet returned by the allocator."""
    size, rows = layout.itemsize_bytes, _rows(config)
    on_cpu = hardware.device_kind == "cpu"
    work_factor, kv_factor = kept_free_factor(config, spec) if on_cpu else (1.0, 1.0)
    working = prefill_bytes(spec, rows, config.batch.prompt_tokens)
    kv = _kv_bytes(spec, config, rows) or 0
    items = [
        Item(name="kv cache", bytes=kv),
        *(Item(name=name, bytes=count) for name, count in working.items()),
    ]
    if on_cpu:
        kept = (
            (work_factor - 1) * sum(working.values())
            + (kv_factor - 1) * kv
            + kept_after_loading(config, layout)
        )
        items.append(Item(name="freed memory that the allocator keeps", bytes=int(kept)))
    else:
        # torch.cat writes one layer's new cache beside the old one
        items.append(
            Item(name="kv cache of one layer, copied", bytes=kv // max(1, spec.num_layers))
        )
        items.append(Item(name="CUDA context", bytes=CUDA_CONTEXT_BYTES))
    if not engine_of(config).zero3:
        return [Item(name="weights", bytes=spec.num_parameters * size), *items]
    zero = derive(config, spec, hardware)["zero_optimization"]
    if config.offload.device == "none":
        items.insert(
            0, Item(name="weights", bytes=-(-layout.stored_numel // config.launcher.ranks) * size)
        )
    elif not _aliases_partition(config, hardware):
        items.insert(0, Item(name="persistent weights", bytes=layout.small_numel * size))
    if not _aliases_partition(config, hardware):
        live = max(zero["stage3_max_live_parameters"], layout.layer_numel, layout.largest_numel)
        items.append(Item(name="gathered layers", bytes=min(live, layout.stored_numel) * size))
        items.append(
            Item(
                name="prefetched parameters",
                bytes=min(zero["stage3_prefetch_bucket_size"], layout.stored_numel) * size,
            )
        )
    if config.dtype.bits is not None:
        has_kernel = (
            hardware.device_kind != "cpu" and spec.dtype == "float16"
        )  # else 4 bits become bytes before they become numbers
        unpacked = 1 if config.dtype.bits == 4 and not has_kernel else 0
        items.append(
            Item(name="dequantised weights", bytes=(2 * size + unpacked) * layout.largest_numel)
        )
    return items


def _aliases_partition(config: RunConfig, hardware: Hardware) -> bool:
    """On one CPU rank a gathered parameter is its partition, or the staging buffer that it was read into: nothing is copied."""
    return hardware.device_kind == "cpu" and config.launcher.ranks == 1


def _host_items(
    spec: ModelSpec, config: RunConfig, hardware: Hardware, layout: ZeroLayout
) -> list[Item]:
    """Pageable host memory of one rank."""
    size, ranks = layout.itemsize_bytes, config.launcher.ranks
    process = host_process(config, hardware.profile)
    items = [
        Item(name="Python and libraries", bytes=process.imported_bytes),
        Item(name="kernels and process group", bytes=process.growth_bytes),
    ]
    if config.offload.device == "cpu" and not config.offload.pin_memory:
        items.append(Item(name="weights", bytes=-(-layout.stored_numel // ranks) * size))
    if config.offload.device == "nvme":
        kept = -(-layout.stored_numel // ranks) - layout.swapped_numel
        items.append(Item(name="weights too small to swap", bytes=max(0, kept) * size))
    return items


def _pinned_items(
    spec: ModelSpec, config: RunConfig, hardware: Hardware, layout: ZeroLayout
) -> list[Item]:
    """Page-locked host memory of one rank; DeepSpeed locks NVMe staging buffers on every accelerator, offloaded weights on GPUs."""
    size = layout.itemsize_bytes
    if config.offload.device == "nvme":
        offload = derive(config, spec, hardware)["zero_optimization"]["offload_param"]
        return [
            Item(
                name="NVMe staging buffers",
                bytes=offload["buffer_count"] * offload["buffer_size"] * size,
            )
        ]
    if config.offload.device == "cpu" and config.offload.pin_memory:
        return [Item(name="weights", bytes=-(-layout.stored_numel // config.launcher.ranks) * size)]
    return []


def _layout_problems(
    spec: ModelSpec, config: RunConfig, hardware: Hardware, layout: ZeroLayout
) -> list[str]:
    """NVMe buffers that DeepSpeed would fail on."""
    if config.offload.device != "nvme":
        return []
    zero = derive(config, spec, hardware)["zero_optimization"]
    offload = zero["offload_param"]
    problems = []
    if offload["buffer_size"] < layout.largest_swapped_numel:
        problems.append(
            f"an NVMe buffer of {offload['buffer_size']:,} elements is smaller than the largest parameter "
            f"({layout.largest_swapped_numel:,}). Type offload.buffer_numel={layout.largest_swapped_numel}, or zero=tuned"
        )
    leaf = "leaf_module" in zero
    least = min_buffer_count(layout, spec, leaf=leaf)
    if offload["buffer_count"] < least:
        problems.append(
            f"{offload['buffer_count']} NVMe buffers are fewer than one {'layer' if leaf else 'module'}'s parameters need. "
            f"Type offload.buffer_count={least}"
        )
    return problems


def require_fit(plan: MemoryPlan, spec: ModelSpec, config: RunConfig, hardware: Hardware) -> None:
    """Refuse a run that would run out of memory.

    Raises:
        DoesNotFit: with each tier's numbers and the overrides that would make it fit.
    """
    if not plan.fits:
        raise DoesNotFit(shortfall(plan, spec, config, hardware))


def shortfall(
    plan: MemoryPlan,
    spec: ModelSpec,
    config: RunConfig,
    hardware: Hardware,
    *,
    with_advice: bool = True,
) -> str:
    """What does not fit, with numbers, and what to type unless only the numbers are wanted."""
    lines = list(plan.problems)
    for tier in plan.tiers:
        if not tier.fits:
            largest = max(tier.items, key=lambda item: item.bytes, default=None)
            because = f", most of it {largest.name}" if largest else ""
            lines.append(
                f"{tier.name}: needs {format_bytes(tier.needed_bytes)}{because}, has {format_bytes(tier.available_bytes)}"
            )
    if not with_advice:
        return "; ".join(lines)
    changes = fitting_changes(spec, config, hardware)
    advice = f"Try {' or '.join(changes)}" if changes else "No single change makes it fit here"
    return "; ".join(lines) + f". {advice}. plan.enforce=false runs it all the same"


def fitting_changes(spec: ModelSpec, config: RunConfig, hardware: Hardware) -> list[str]:
    """Overrides, each of which alone makes the run fit, found by planning them."""
    candidates: list[tuple[str, RunConfig]] = []
    rows = config.batch.batch_size // config.launcher.ranks
    fitting = largest_fitting_batch(spec, config, hardware, below=rows)
    if fitting is not None:
        candidates.append(
            (
                f"batch.batch_size={fitting}",
                replace(config, batch=replace(config.batch, batch_size=fitting)),
            )
        )
    if config.zero.derivation == "paper":
        candidates.append(
            ("zero=tuned", replace(config, zero=replace(config.zero, derivation="tuned")))
        )
    for device in engine_of(config).places:
        if device != config.offload.device:
            path = config.offload.nvme_path or "/local_nvme"
            offload = replace(
                config.offload, device=device, nvme_path=path, use_gds=False, pin_memory=False
            )
            candidates.append((f"offload={device}", replace(config, offload=offload)))
    if config.offload.pin_memory:
        candidates.append(
            (
                "offload.pin_memory=false",
                replace(config, offload=replace(config.offload, pin_memory=False)),
            )
        )
    if (
        config.dtype.bits is None
        and config.weights == "dummy"
        and engine_of(config).quantises
        and spec.dtype != "float32"
    ):
        quantised = replace(config.dtype, weights="int4", compute="bfloat16")
        candidates.append(("dtype=int4", replace(config, dtype=quantised)))
    return [name for name, changed in candidates if memory_plan(spec, changed, hardware).fits]


def largest_fitting_batch(
    spec: ModelSpec, config: RunConfig, hardware: Hardware, *, below: int | None = None
) -> int | None:
    """The largest batch_size (over all ranks) that fits, by bisection; None when not even one row per rank does.

    Args:
        below: look only for fewer rows per rank than this.
    """
    ranks = config.launcher.ranks

    def fits(rows: int) -> bool:
        return memory_plan(
            spec, replace(config, batch=replace(config.batch, batch_size=rows * ranks)), hardware
        ).fits

    low, high = 0, (below - 1 if below is not None else 1)
    if below is None:
        while fits(high) and high < 1 << 20:
            low, high = high, high * 2
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low * ranks or None
