"""What a person who knows the trade would say of a plan: warnings before the run, and the overrides that would help most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from zinfer.config import RunConfig
from zinfer.config.engines import engine_of
from zinfer.machine.hardware import Hardware
from zinfer.model.spec import ModelSpec
from zinfer.plan.deepspeed_json import min_buffer_count
from zinfer.plan.host_process import mode_of
from zinfer.plan.memory import MemoryPlan, derive, memory_plan
from zinfer.plan.prediction import Prediction, predict
from zinfer.plan.zero_layout import zero_layout
from zinfer.units import format_bytes

PINNED_SHARE = 0.5
STAGING_WARNING_SHARE = 0.1
"""Of host memory: page-locked weights above half of it and NVMe buffers above a tenth leave too little for everything else."""
NOT_LOCAL = {
    "tmpfs": "is memory, not a disk: what is measured is RAM, and what is swapped does not leave it",
    "ramfs": "is memory, not a disk: what is measured is RAM, and what is swapped does not leave it",
    "overlay": "is a container's layered file system: slower than the disk below, and it may not take direct reads",
    "fuse.": "is a file system in user space: it may be remote, and it may not take direct reads",
    "nfs": "is on the network",
    "cifs": "is on the network",
    "smb": "is on the network",
    "lustre": "is on the network, shared with others",
    "gpfs": "is on the network, shared with others",
    "ceph": "is on the network, shared with others",
    "9p": "is a folder of the host of this virtual machine",
    "virtiofs": "is a folder of the host of this virtual machine",
}
"""File systems, by the beginning of their names, that are no local disk."""
KNEE_GAIN = 1.1
"""Beyond the knee, doubling the batch raises the tokens/s by less than a tenth."""
WORTHWHILE = 1.05


def plan_warnings(
    spec: ModelSpec, config: RunConfig, hardware: Hardware, plan: MemoryPlan, prediction: Prediction
) -> list[str]:
    """Everything worth saying of this plan, one sentence each; derivation_warnings has those of the DeepSpeed configuration."""
    return [
        *_memory_warnings(spec, config, hardware, plan),
        *_disk_warnings(config, hardware, plan),
        *_needless_offload(spec, config, hardware, prediction),
        *_beyond_the_knee(spec, config, hardware, prediction),
        *_no_kv(spec),
    ]


def _memory_warnings(
    spec: ModelSpec, config: RunConfig, hardware: Hardware, plan: MemoryPlan
) -> Iterator[str]:
    pinned, total = plan.tier("pinned"), hardware.host_total_bytes
    if not pinned.needed_bytes:
        return
    if total and config.offload.pin_memory and pinned.needed_bytes > PINNED_SHARE * total:
        yield (
            f"offload.pin_memory=true page-locks {format_bytes(pinned.needed_bytes)} of {format_bytes(total)} host memory; the system "
            "can neither move nor reclaim it. Type offload.pin_memory=false"
        )
    staging = pinned.needed_bytes if config.offload.device == "nvme" else 0
    if total and staging > STAGING_WARNING_SHARE * total:
        yield (
            f"the NVMe buffers page-lock {format_bytes(staging)}, {staging / total:.0%} of host memory. Type {fewer_buffers(spec, config)}"
        )
    limit = hardware.memlock_limit_bytes
    if limit is not None and pinned.needed_bytes > limit:
        yield (
            f"`ulimit -l` allows {format_bytes(limit)} of locked memory, this run locks {format_bytes(pinned.needed_bytes)}. "
            "Type ulimit -l unlimited in the shell that starts zinfer, or set memlock in /etc/security/limits.conf"
        )


def fewer_buffers(spec: ModelSpec, config: RunConfig) -> str:
    """The override that makes the NVMe buffers small."""
    if config.zero.derivation == "paper":
        return "zero=tuned"
    return f"offload.buffer_count={min_buffer_count(zero_layout(config, spec), spec, leaf=False)} for as few as work"


def _disk_warnings(config: RunConfig, hardware: Hardware, plan: MemoryPlan) -> Iterator[str]:
    if config.offload.device != "nvme":
        return
    filesystem, swapped = hardware.disk_filesystem, plan.tier("disk").needed_bytes
    reason = next(
        (why for name, why in NOT_LOCAL.items() if filesystem and filesystem.startswith(name)), None
    )
    if reason:
        yield f"offload.nvme_path={config.offload.nvme_path} is on {filesystem}, which {reason}. Give a folder on a local disk"
    if not swapped:
        yield (
            "offload=nvme swaps nothing of this model: DeepSpeed keeps every parameter below 1 MiB (and below aio.block_size) in host "
            "memory. Type offload=cpu"
        )
    cached = hardware.profile is not None and hardware.profile.nvme_page_cache not in (
        None,
        "bypassed",
    )
    spare = (hardware.host_available_bytes or 0) - plan.tier("host").needed_bytes
    if cached and swapped and spare > swapped:
        yield (
            f"the page cache can hold all {format_bytes(swapped)} of swapped weights, and this file system refuses direct reads: what is "
            "measured as NVMe would be RAM"
        )


def _needless_offload(
    spec: ModelSpec, config: RunConfig, hardware: Hardware, prediction: Prediction
) -> Iterator[str]:
    if config.offload.device == "none" or not engine_of(config).zero3:
        return
    kept = with_offload(config, "none")
    if not memory_plan(spec, kept, hardware).fits:
        return
    slower = _gain(predict(spec, kept, hardware), prediction)
    how_much = f" and would be {slower:.1f} times as fast" if slower and slower > WORTHWHILE else ""
    yield f"offload={config.offload.device} is asked for though everything fits the device{how_much}. Type offload=none"


def _beyond_the_knee(
    spec: ModelSpec, config: RunConfig, hardware: Hardware, prediction: Prediction
) -> Iterator[str]:
    half = config.batch.batch_size // 2
    if half < 8 or half % config.launcher.ranks:
        return
    smaller = predict(spec, with_batch(config, half), hardware)
    gain = _gain(prediction, smaller)
    if gain is not None and gain < KNEE_GAIN:
        yield (
            f"batch.batch_size={config.batch.batch_size} is beyond the knee: {gain:.2f} times the tokens/s of batch.batch_size={half}, "
            "for twice the memory and the waiting"
        )


def _no_kv(spec: ModelSpec) -> Iterator[str]:
    if spec.kv_layers is None:
        yield f"the KV cache of {spec.name} is not known ({spec.kv_unknown_reason}): it is missing from the plan"


def _gain(better: Prediction, than: Prediction) -> float | None:
    """Ratio of tokens/s: predicted, or of ceilings where neither is predicted. None: only one of them is, or nothing is known."""
    mine, other = better.generated_tokens_per_s, than.generated_tokens_per_s
    if mine is None and other is None:
        mine, other = better.ceiling.generated_tokens_per_s, than.ceiling.generated_tokens_per_s
    return mine / other if mine and other else None


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """An override that would help, with what it would bring."""

    override: str
    gain: float | None
    """Times the tokens/s of the plan at hand, of ceilings where nothing is calibrated; None: unknown, but it makes the run fit."""
    fits: bool
    saved_bytes: int
    """Of the tier that is fullest now; negative when it needs more."""


def with_offload(config: RunConfig, device: Any) -> RunConfig:
    """The same run with its weights elsewhere."""
    path = config.offload.nvme_path or "/local_nvme"
    offload = replace(
        config.offload,
        device=device,
        nvme_path=path,
        use_gds=False,
        pin_memory=False,
        buffer_numel=None,
        buffer_count=None,
    )
    return replace(config, offload=offload)


def with_batch(config: RunConfig, rows: int) -> RunConfig:
    """The same run with another batch."""
    return replace(config, batch=replace(config.batch, batch_size=rows))


def candidates(
    spec: ModelSpec, config: RunConfig, largest_batch: int | None
) -> Iterator[tuple[str, RunConfig]]:
    """Overrides of settings that exist, one at a time."""
    if largest_batch and largest_batch != config.batch.batch_size:
        yield f"batch.batch_size={largest_batch}", with_batch(config, largest_batch)
    if engine_of(config).offloads_to:
        for device in engine_of(config).places:
            if device != config.offload.device:
                yield f"offload={device}", with_offload(config, device)
        if config.offload.device == "none":
            yield "engine=resident", replace(config, engine=replace(config.engine, name="resident"))
    if config.offload.device == "cpu" and not config.offload.pin_memory:
        yield (
            "offload.pin_memory=true",
            replace(config, offload=replace(config.offload, pin_memory=True)),
        )
    if config.zero.derivation == "paper":
        yield "zero=tuned", replace(config, zero=replace(config.zero, derivation="tuned"))
    if config.dtype.bits is None and spec.dtype == "float32":
        yield (
            "dtype=bfloat16",
            replace(config, dtype=replace(config.dtype, weights="bfloat16", compute="bfloat16")),
        )
    if (
        config.dtype.bits is None
        and config.weights == "dummy"
        and engine_of(config).quantises
        and spec.dtype != "float32"
    ):
        for dtype in ("int8", "int4"):
            quantised: Any = replace(config.dtype, weights=dtype, compute="bfloat16")
            yield f"dtype={dtype}", replace(config, dtype=quantised)
    if (
        config.offload.device == "nvme"
        and config.zero.derivation == "tuned"
        and config.offload.buffer_count is None
    ):
        least = min_buffer_count(zero_layout(config, spec), spec, leaf=False)
        yield (
            f"offload.buffer_count={least}",
            replace(config, offload=replace(config.offload, buffer_count=least)),
        )


def suggestions(
    spec: ModelSpec,
    config: RunConfig,
    hardware: Hardware,
    plan: MemoryPlan,
    prediction: Prediction,
    largest_batch: int | None,
) -> list[Suggestion]:
    """Overrides that make the run fit, or make it faster, best first; one that neither helps nor fits is left out."""
    found = []
    tier = max(
        plan.tiers,
        key=lambda tier: tier.needed_bytes / tier.available_bytes if tier.available_bytes else 0.0,
    )
    for override, changed in candidates(spec, config, largest_batch):
        dtype = changed.dtype.compute if changed.dtype.compute != "auto" else spec.dtype
        changed_spec = replace(spec, dtype=dtype)
        if not _runs(changed_spec, changed, hardware):
            continue
        other_plan = memory_plan(changed_spec, changed, hardware)
        gain = _gain(predict(changed_spec, changed, hardware), prediction)
        saved = tier.needed_bytes - other_plan.tier(tier.name).needed_bytes
        helps = gain is not None and gain > WORTHWHILE
        if other_plan.fits and (helps or not plan.fits):
            found.append(Suggestion(override=override, gain=gain, fits=True, saved_bytes=saved))
    return sorted(found, key=lambda entry: -(entry.gain or 0.0))


def _runs(spec: ModelSpec, config: RunConfig, hardware: Hardware) -> bool:
    """Whether DeepSpeed would take it: its buffers are enough, the device computes in the type."""
    if spec.dtype not in hardware.device_dtypes:
        return False
    if config.offload.device != "nvme":
        return True
    layout = zero_layout(config, spec)
    offload = derive(config, spec, hardware)["zero_optimization"]["offload_param"]
    return (
        bool(offload["buffer_size"] >= layout.largest_swapped_numel) and mode_of(config) == "nvme"
    )
