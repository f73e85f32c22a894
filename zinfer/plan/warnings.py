"""Warn before a run of what an experienced person would see in its plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from zinfer.config import DtypeConfig, RunConfig
from zinfer.config.engines import engine_of
from zinfer.model.quantisable import is_named, is_packable, stored_bits
from zinfer.model.spec import ModelSpec
from zinfer.plan.advice import WORTHWHILE, gain_of, with_offload
from zinfer.plan.deepspeed_json import min_buffer_count
from zinfer.plan.dtype_advice import dtype_warnings
from zinfer.plan.planned import Planned, plan_run
from zinfer.plan.problems import has_position_table, last_position
from zinfer.plan.zero_layout import zero_layout
from zinfer.units import format_bytes, format_times

PINNED_SHARE = 0.5
"""Page-locked weights above this share of host memory leave too little for everything else."""
STAGING_WARNING_SHARE = 0.1
"""NVMe buffers above this share of host memory leave too little for everything else."""
NOT_LOCAL = {
    "tmpfs": "is memory, not a disk: what is measured is RAM, and what is swapped stays in it",
    "ramfs": "is memory, not a disk: what is measured is RAM, and what is swapped stays in it",
    "overlay": "is a container's layered file system: slower than the disk below, and it may not "
    "take direct reads",
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
"""File systems that are no local disk, by the beginning of their names."""
KNEE_GAIN = 1.1
"""Beyond the knee, doubling the batch raises the tokens/s by less than a tenth."""


def plan_warnings(run: Planned) -> list[str]:
    """Collect everything worth saying of this plan, one sentence each.

    derivation_warnings has those of the DeepSpeed configuration.
    """
    return [
        *_memory_warnings(run),
        *_disk_warnings(run),
        *_needless_offload(run),
        *_beyond_the_knee(run),
        *_beyond_training(run),
        *dtype_warnings(run),
        *_patterns_of_nothing(run),
        *_packs_nothing(run),
        *_more_threads_than_cores(run),
        *_kv_placement(run),
        *_no_kv(run.spec),
    ]


def _memory_warnings(run: Planned) -> Iterator[str]:
    """Warn of page-locked memory that leaves too little, or that the system will not lock."""
    pinned, total = run.plan.tier("pinned").needed_bytes, run.hardware.host_total_bytes
    if not pinned:
        return
    if total and run.config.offload.pin_memory and pinned > PINNED_SHARE * total:
        yield (
            f"offload.pin_memory=true page-locks {format_bytes(pinned)} of {format_bytes(total)} "
            "host memory; the system can neither move nor reclaim it. "
            "Set offload.pin_memory=false"
        )
    staging = pinned if run.config.offload.device == "nvme" else 0
    if total and staging > STAGING_WARNING_SHARE * total:
        yield (
            f"the NVMe buffers page-lock {format_bytes(staging)}, {staging / total:.0%} of host "
            f"memory. Set {fewer_buffers(run.spec, run.config)}"
        )
    limit = run.hardware.memlock_limit_bytes
    if limit is not None and pinned > limit:
        yield (
            f"`ulimit -l` allows {format_bytes(limit)} of locked memory, this run locks "
            f"{format_bytes(pinned)}. Run `ulimit -l unlimited` in the shell that starts zinfer, "
            "or set memlock in /etc/security/limits.conf"
        )


def fewer_buffers(spec: ModelSpec, config: RunConfig) -> str:
    """Return the override that makes the NVMe buffers small."""
    if config.zero.derivation == "paper":
        return "zero=tuned"
    least = min_buffer_count(zero_layout(config, spec), spec, leaf=False)
    return f"offload.buffer_count={least} for as few as work"


def _disk_warnings(run: Planned) -> Iterator[str]:
    """Warn of an nvme_path that is no local disk, and of swapping that reads no disk."""
    if run.config.offload.device != "nvme":
        return
    filesystem, swapped = run.hardware.disk_filesystem, run.plan.tier("disk").needed_bytes
    reason = next(
        (why for name, why in NOT_LOCAL.items() if filesystem and filesystem.startswith(name)), None
    )
    if reason:
        yield (
            f"offload.nvme_path={run.config.offload.nvme_path} is on {filesystem}, which {reason}. "
            "Give a folder on a local disk"
        )
    if not swapped:
        yield (
            "offload=nvme swaps nothing of this model: DeepSpeed keeps every parameter below 1 MiB "
            "(and below aio.block_size) in host memory. Set offload=cpu"
        )
    profile = run.hardware.profile
    cached = profile is not None and profile.nvme_page_cache not in (None, "bypassed")
    spare = (run.hardware.host_available_bytes or 0) - run.plan.tier("host").needed_bytes
    if cached and swapped and spare > swapped:
        yield (
            f"the page cache can hold all {format_bytes(swapped)} of swapped weights, and this "
            "file system refuses direct reads: what is measured as NVMe would be RAM"
        )


def _needless_offload(run: Planned) -> Iterator[str]:
    """Warn where weights are offloaded that would fit the device."""
    device = run.config.offload.device
    if device == "none" or not engine_of(run.config).zero3:
        return
    kept = plan_run(with_offload(run.config, "none"), run.hardware, run.spec)
    if not kept.fits:
        return
    slower = gain_of(kept.prediction, run.prediction)
    how_much = ""
    if slower and slower > WORTHWHILE:
        how_much = f" and would be {format_times(slower)} as fast"
    yield (
        f"offload={device} is asked for though everything fits the device{how_much}. "
        "Set offload=none"
    )


def _beyond_the_knee(run: Planned) -> Iterator[str]:
    """Warn where half the batch would be nearly as fast."""
    rows = run.config.batch.batch_size
    half = rows // 2
    if half < 8 or half % run.config.launcher.ranks:
        return
    smaller = plan_run(run.config.with_batch(half), run.hardware, run.spec)
    gain = gain_of(run.prediction, smaller.prediction)
    if gain is not None and gain < KNEE_GAIN:
        yield (
            f"batch.batch_size={rows} is beyond the knee: {gain:.2f} times the tokens/s of "
            f"batch.batch_size={half}, for twice the memory and the waiting"
        )


def _beyond_training(run: Planned) -> Iterator[str]:
    """Warn of rotary positions that the model was not made for; a table of them is refused."""
    last, most = last_position(run.config), run.spec.max_positions
    if most is not None and last > most and not has_position_table(run.spec):
        yield (
            f"{last} positions are beyond the {most} that {run.spec.name} is made for: speed and "
            "memory are real, the text is not"
        )


def _patterns_of_nothing(run: Planned) -> Iterator[str]:
    """Warn of patterns that name no weight of this model: they change nothing."""
    dtype = run.config.dtype
    if run.config.quantiser != "zinfer":
        return
    packable = [each for each in run.spec.parameters if is_packable(each)]
    asked = {"dtype.keep": dtype.keep}
    if dtype.bits == 4 and dtype.eight_bits != DtypeConfig.eight_bits:
        asked["dtype.eight_bits"] = dtype.eight_bits
    for name, patterns in asked.items():
        unused = [each for each in patterns if not any(is_named(one, (each,)) for one in packable)]
        if unused and packable:
            shown = ",".join(each or '""' for each in unused)
            yield (
                f"{name}=[{shown}] names no weight of {run.spec.name} that could be "
                f"packed. Name whole parts, with * for anything: {packable[-1].name}"
            )


def _packs_nothing(run: Planned) -> Iterator[str]:
    """Warn of a run that says int8 or int4 and stores every weight as it is computed with."""
    dtype, weights = run.config.dtype, run.spec.parameters
    if run.config.quantiser != "zinfer" or any(stored_bits(each, dtype) for each in weights):
        return
    plain = f"dtype={run.spec.dtype}"
    if any(stored_bits(each, replace(dtype, keep=())) for each in weights):
        because = f"dtype.keep=[{','.join(dtype.keep)}] keeps all that could be packed"
        instead = f"{plain}, or a shorter dtype.keep"
    else:
        because = f"in groups of {dtype.group_size} none of them would get smaller"
        instead = plain
    yield f"dtype={dtype.weights} packs no weight of {run.spec.name}: {because}. Set {instead}"


def _more_threads_than_cores(run: Planned) -> Iterator[str]:
    """Warn of threads that wait for each other."""
    launcher, cores = run.config.launcher, run.hardware.host_cores
    threads = launcher.ranks * (launcher.omp_threads or 1)
    if not cores or threads <= cores or not run.hardware.device_is_host:
        return
    fitting = max(1, cores // launcher.ranks)
    instead = (
        f"launcher.omp_threads={fitting}"
        if (launcher.omp_threads or 1) > fitting
        else f"launcher.ranks={cores}"
    )
    yield (
        f"{threads} threads on {cores} cores wait for each other: each of "
        f"launcher.ranks={launcher.ranks} has {launcher.omp_threads or 1}. Set {instead}"
    )


def _kv_placement(run: Planned) -> Iterator[str]:
    """Warn of a copy that gains nothing, and of keys in too few bits."""
    kv = run.config.kv_cache
    if not kv.is_offloaded:
        return
    if kv.placement == "host" and run.hardware.device_is_host:
        yield (
            "kv_cache=host on a machine without an accelerator only costs time: the cache is in "
            "host memory anyway, and each step copies it. Set kv_cache=host_attention, or "
            "kv_cache=device"
        )
    if kv.pin_memory and run.hardware.device_is_host:
        yield (
            "kv_cache.pin_memory=true has no effect without an accelerator: nothing is copied over "
            "a link. Drop kv_cache.pin_memory"
        )
    if kv.bits_of_keys == 4:
        yield (
            "keys in 4 bits suffer first: greedy tokens of a small model differed after 2 to 15 "
            "tokens. Set kv_cache.key_bits=8"
        )


def _no_kv(spec: ModelSpec) -> Iterator[str]:
    """Say that the KV cache is missing from the plan."""
    if spec.kv_layers is None:
        yield (
            f"the KV cache of {spec.name} is not known ({spec.kv_unknown_reason}): "
            "it is missing from the plan"
        )
