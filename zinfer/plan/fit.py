"""Refuse a run that would run out of memory, and find the settings that would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from zinfer.config import RunConfig
from zinfer.config.engines import engine_of
from zinfer.model.spec import ModelSpec
from zinfer.plan.kv_advice import PLACEMENTS, can_place, with_kv
from zinfer.plan.memory import memory_plan
from zinfer.plan.planned import Planned
from zinfer.plan.tiers import MemoryPlan, Tier
from zinfer.units import format_bytes

LARGEST_BATCH_TRIED = 1 << 20
"""Rows of one rank up to which the largest batch is looked for."""


class DoesNotFit(ValueError):
    """The run would run out of memory. The message has the numbers and the overrides to set."""


def require_fit(run: Planned) -> None:
    """Refuse a run that would run out of memory.

    Raises:
        DoesNotFit: with each tier's numbers and the overrides that would make it fit.
    """
    if not run.fits:
        raise DoesNotFit(shortfall(run))


def shortfall(run: Planned, *, with_advice: bool = True) -> str:
    """Say what does not fit, with numbers.

    Args:
        with_advice: add the overrides that would make it fit; finding them costs some plans.
    """
    lines = [
        *run.plan.problems,
        *(_lacking(run.plan, tier) for tier in run.plan.tiers if not tier.fits),
    ]
    if not with_advice:
        return "; ".join(lines)
    changes = fitting_changes(run)
    advice = f"Try {' or '.join(changes)}" if changes else "No single change makes it fit here"
    return "; ".join(lines) + f". {advice}. plan.enforce=false runs it all the same"


def _lacking(plan: MemoryPlan, tier: Tier) -> str:
    """Say one tier's need, its largest part, and what there is."""
    needed, has = format_bytes(tier.needed_bytes), format_bytes(tier.available_bytes)
    return f"{tier.name}: needs {needed}{largest_part(plan, tier)}, has {has}"


def largest_part(plan: MemoryPlan, tier: Tier) -> str:
    """Name the largest item of everything that is counted in this tier: ', most of it weights'."""
    items = list(plan.counted_items(tier.name))
    if not items:
        return ""
    largest = max(items, key=lambda item: item.bytes)
    share = "most of it" if 2 * largest.bytes > sum(item.bytes for item in items) else "the most"
    return f", {share} {largest.name}"


def fitting_changes(run: Planned) -> list[str]:
    """Return overrides, each of which alone makes the run fit. They are found by planning them."""
    return [
        name for name, changed in _changes(run) if memory_plan(run.spec, changed, run.hardware).fits
    ]


def _changes(run: Planned) -> Iterator[tuple[str, RunConfig]]:
    """Return the overrides that save memory, with the configuration that each makes."""
    config = run.config
    rows = config.batch.batch_size // config.launcher.ranks
    fitting = largest_fitting_batch(run, below=rows)
    if fitting is not None:
        yield f"batch.batch_size={fitting}", config.with_batch(fitting)
    if config.zero.derivation == "paper":
        yield "zero=tuned", replace(config, zero=replace(config.zero, derivation="tuned"))
    offload = config.offload
    for device in engine_of(config).places:
        if device != offload.device:
            path = offload.nvme_path or "/local_nvme"
            moved = replace(offload, device=device, nvme_path=path, use_gds=False, pin_memory=False)
            yield f"offload={device}", replace(config, offload=moved)
    if offload.pin_memory:
        pageable = replace(offload, pin_memory=False)
        yield "offload.pin_memory=false", replace(config, offload=pageable)
    yield from other_kv_placements(run)
    if can_quantise(config, run.spec):
        quantised = replace(config.dtype, weights="int4", compute="bfloat16")
        yield "dtype=int4", replace(config, dtype=quantised)


def other_kv_placements(run: Planned) -> Iterator[tuple[str, RunConfig]]:
    """Return the KV cache elsewhere, or in fewer bits, where this engine and model can."""
    kv, on_cpu = run.config.kv_cache, run.hardware.device_is_host
    tried: list[tuple[str, RunConfig]] = []
    for placement in PLACEMENTS:
        # without an accelerator `host` only copies from host memory to host memory
        if placement != kv.placement and not (placement == "host" and on_cpu):
            moved = with_kv(run.config, placement, 16 if placement == "device" else kv.bits)
            tried.append((f"kv_cache={placement}", moved))
    if kv.is_offloaded and min(kv.bits_of_keys, kv.bits_of_values) > 8:
        tried.append(("kv_cache.bits=8", with_kv(run.config, kv.placement, 8)))
    yield from ((name, config) for name, config in tried if can_place(run, config))


def can_quantise(config: RunConfig, spec: ModelSpec) -> bool:
    """Tell if the weights could be quantised, and are not yet.

    DeepSpeed, which zero=paper leaves it to, quantises dummy weights in 16 bits only.
    """
    if config.dtype.bits is not None or not engine_of(config).quantises:
        return False
    by_deepspeed = engine_of(config).zero3 and config.zero.derivation == "paper"
    return not by_deepspeed or (config.weights == "dummy" and spec.dtype != "float32")


def largest_fitting_batch(run: Planned, *, below: int | None = None) -> int | None:
    """Find the largest batch_size (over all ranks) that fits, by bisection.

    Returns None when not even one row per rank fits.

    Args:
        below: look only for fewer rows per rank than this.
    """
    ranks = run.config.launcher.ranks

    def fits(rows: int) -> bool:
        return memory_plan(run.spec, run.config.with_batch(rows * ranks), run.hardware).fits

    low, high = 0, (below - 1 if below is not None else 1)
    if below is None:
        while fits(high) and high < LARGEST_BATCH_TRIED:
            low, high = high, high * 2
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low * ranks or None
