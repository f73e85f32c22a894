"""Plan the memory of a run: bytes per tier, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from zinfer.config import RunConfig
from zinfer.machine.hardware import Hardware
from zinfer.model.spec import ModelSpec
from zinfer.plan.deepspeed_json import min_buffer_count
from zinfer.plan.memory_items import Demand, device_items, disk_items, host_items, pinned_items
from zinfer.plan.process_memory import loading_bytes, mapped_bytes
from zinfer.plan.tiers import Item, ItemKind, Lifetime, MemoryPlan, Tier, TierName


@dataclass(frozen=True, kw_only=True)
class TierRule:
    """One row of the table of tiers: what fills a memory, and what there is of it."""

    name: TierName
    items: Callable[[Demand], Iterator[Item]]
    available_bytes: Callable[[Demand], int | None]
    includes: Callable[[Hardware], tuple[TierName, ...]] = lambda hardware: ()
    is_shared: bool = True
    """All ranks of a host take from it."""
    keeps_headroom: bool = True
    """plan.headroom of it stays free."""


TIER_RULES = (
    TierRule(
        name="device",
        items=device_items,
        # without an accelerator the host tier holds it, and is compared with what is there
        available_bytes=lambda run: (
            None if run.hardware.device_is_host else run.hardware.device_free_bytes
        ),
        is_shared=False,
    ),
    TierRule(
        name="host",
        items=host_items,
        available_bytes=lambda run: run.hardware.host_available_bytes,
        includes=lambda hardware: ("pinned", "device") if hardware.device_is_host else ("pinned",),
    ),
    TierRule(
        name="pinned",
        items=pinned_items,
        available_bytes=lambda run: run.hardware.memlock_limit_bytes,
        keeps_headroom=False,
    ),
    TierRule(
        name="disk",
        items=disk_items,
        available_bytes=lambda run: (
            run.hardware.disk_free_bytes if run.config.offload.device == "nvme" else None
        ),
    ),
)


def memory_plan(spec: ModelSpec, config: RunConfig, hardware: Hardware) -> MemoryPlan:
    """Count the bytes of one run, per rank and tier."""
    run = Demand(spec, config, hardware)
    items = {rule.name: list(rule.items(run)) for rule in TIER_RULES}
    at_loading, mapped = _loading(run, items["device"])
    items["host"].append(at_loading)
    per_rank = {name: sum(item.bytes for item in found) for name, found in items.items()}
    return MemoryPlan(
        ranks=config.launcher.ranks,
        tiers=tuple(_tier(rule, run, items[rule.name], per_rank) for rule in TIER_RULES),
        kv_cache_bytes=None if run.kv is None else run.kv.total_bytes * config.launcher.ranks,
        weight_stored_bytes=run.layout.stored_numel * run.layout.itemsize_bytes,
        device_is_host=hardware.device_is_host,
        mapped_checkpoint_bytes=mapped,
        problems=tuple(_buffer_problems(run)),
    )


def _tier(rule: TierRule, run: Demand, items: list[Item], per_rank: dict[TierName, int]) -> Tier:
    """Return one tier of the plan, from its row of the table."""
    includes = rule.includes(run.hardware)
    of_one_rank = per_rank[rule.name] + sum(per_rank[name] for name in includes)
    available = rule.available_bytes(run)
    if available is not None and rule.keeps_headroom:
        available = int(available * (1 - run.config.plan.headroom))
    return Tier(
        name=rule.name,
        items=tuple(item for item in items if item.bytes),
        per_rank_bytes=per_rank[rule.name],
        needed_bytes=of_one_rank * (run.config.launcher.ranks if rule.is_shared else 1),
        available_bytes=available,
        includes=includes,
    )


def _loading(run: Demand, device: list[Item]) -> tuple[Item, int]:
    """Return (bytes that only the loader needs, bytes that mapped files add to the peak).

    Where the device is host memory, loading is over before a generation takes its share: only
    what exceeds that share counts.
    """
    freed_by_then = 0
    if run.hardware.device_is_host:
        freed_by_then = sum(item.bytes for item in device if item.lifetime is Lifetime.GENERATION)
    loading = loading_bytes(run.config, run.spec, run.layout)
    more = max(0, loading - freed_by_then)
    mapped = max(0, loading + mapped_bytes(run.config, run.spec) - freed_by_then) - more
    item = Item(
        name="more while loading", bytes=more, kind=ItemKind.LOADING, lifetime=Lifetime.LOADING
    )
    return item, mapped


def _buffer_problems(run: Demand) -> Iterator[str]:
    """List NVMe buffers on which DeepSpeed would fail."""
    if run.config.offload.device != "nvme":
        return
    buffers, largest = run.zero["offload_param"], run.layout.largest_swapped_numel
    if buffers["buffer_size"] < largest:
        yield (
            f"an NVMe buffer of {buffers['buffer_size']:,} elements is smaller than the largest "
            f"parameter ({largest:,}). Set offload.buffer_numel={largest}, or zero=tuned"
        )
    leaf = "leaf_module" in run.zero
    least = min_buffer_count(run.layout, run.spec, leaf=leaf)
    if buffers["buffer_count"] < least:
        yield (
            f"{buffers['buffer_count']} NVMe buffers are fewer than one "
            f"{'layer' if leaf else 'module'}'s parameters need. Set offload.buffer_count={least}"
        )
