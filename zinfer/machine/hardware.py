"""Describe one box: capacities of device, host and disk, and its rates where they are known.

The driver plans with these numbers before any worker starts, so nothing here imports torch or
initialises CUDA. What
cannot be found is None.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from zinfer.config import HardwareConfig
from zinfer.machine import disk, gpu, memory, processor, reading
from zinfer.machine.environment import hardware_fingerprint
from zinfer.machine.profile import CalibrationProfile
from zinfer.machine.profile_files import newest_profile, read_profile


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One box. Device numbers are of one device, host and disk numbers of the whole box."""

    name: str
    source: str
    device_kind: Literal["cpu", "cuda"]
    device_name: str
    device_count: int
    device_total_bytes: int | None
    """On the CPU accelerator device memory is host memory.

    None: a slice of a GPU (MIG), whose size nvidia-smi does not list.
    """
    device_free_bytes: int | None
    """Free memory of the fullest device that is used."""
    device_dtypes: tuple[str, ...]
    """Types in which a model can compute. A processor may emulate one of them."""
    host_total_bytes: int | None
    """Memory of the machine, or of the smallest cgroup that this process is in."""
    host_available_bytes: int | None
    host_cores: int | None
    memlock_limit_bytes: int | None
    """Bytes that a process may lock (`ulimit -l`); None: no limit."""
    disk_free_bytes: int | None = None
    """Free bytes of the file system of nvme_path; None without one."""
    disk_total_bytes: int | None = None
    disk_filesystem: str | None = None
    device_memory_bytes_per_s: float | None = None
    device_flops_per_s: Mapping[str, float] = field(default_factory=dict)
    """Dense, per dtype name."""
    host_memory_bytes_per_s: float | None = None
    host_to_device_bytes_per_s: float | None = None
    nvme_read_bytes_per_s: float | None = None
    emulated_dtypes: tuple[str, ...] = ()
    """Types of device_dtypes that this processor has no arithmetic for: slow ones."""
    rates_source: str | None = None
    """Source of the rates above; None when there are none."""
    profile: CalibrationProfile | None = None
    """Rates that task=calibrate measured here; None elsewhere, and before it has run."""

    @property
    def device_is_host(self) -> bool:
        """True without an accelerator: the device's memory is then the host's."""
        return self.device_kind == "cpu"


def detect_hardware(
    config: HardwareConfig, nvme_path: Path | None, ranks: int = 1, threads: int | None = None
) -> Hardware:
    """Describe this machine as it is now, or the published box that `config` names.

    A number given in `config` wins over a detected one. Rates of this machine come from its
    calibration profile for that many threads per rank, if there is one.

    Raises:
        ValueError: an accelerator was asked for, or is there, that cannot be used.
    """
    box = (
        published_box(config) if config.name != "detect" else this_machine(config, nvme_path, ranks)
    )
    profile = calibration_of(config, ranks, threads) if config.name == "detect" else None
    kinds = {row.dtype for row in profile.kernels} if profile else set()
    measured = {kind: rate for kind in kinds if profile and (rate := profile.flops_per_s(kind))}
    link = (profile.host_to_device_pinned or profile.host_to_device_pageable) if profile else None
    on_device = (profile.device_read or profile.host_read) if profile else None
    box = replace(
        box,
        device_memory_bytes_per_s=config.device_memory_bytes_per_s
        or (on_device.median if on_device else None),
        device_flops_per_s={**measured, **config.device_flops_per_s},
        host_memory_bytes_per_s=config.host_memory_bytes_per_s
        or (profile.host_read.median if profile else None),
        host_to_device_bytes_per_s=config.host_to_device_bytes_per_s
        or (link.median if link else None),
        nvme_read_bytes_per_s=config.nvme_read_bytes_per_s
        or (profile.nvme_read_bytes_per_s if profile else None),
        profile=profile,
    )
    rates = (
        box.device_memory_bytes_per_s,
        box.host_memory_bytes_per_s,
        box.host_to_device_bytes_per_s,
        box.nvme_read_bytes_per_s,
    )
    known = bool(box.device_flops_per_s) or any(rate is not None for rate in rates)
    source = (
        f"calibrated {profile.created}" if profile else config.source or f"hardware={config.name}"
    )
    return replace(box, rates_source=source if known else None)


def calibration_of(
    config: HardwareConfig, ranks: int, threads: int | None
) -> CalibrationProfile | None:
    """Find the profile that `config` names, else this machine's newest for that many threads.

    Raises:
        ValueError: the named profile cannot be read.
    """
    if config.profile is not None:
        return read_profile(Path(config.profile))
    found = newest_profile(
        machine_fingerprint(config), threads or max(1, len(os.sched_getaffinity(0)) // ranks)
    )
    return found[0] if found else None


def machine_fingerprint(config: HardwareConfig) -> str:
    """Name this machine, whatever disk a run uses. Calibration profiles are found by it."""
    gpus = [{"name": gpu.name} for gpu in gpu.usable_gpus(config)]
    cpu = {
        "model": processor.cpu_model_name(),
        "instruction_sets": processor.instruction_sets(processor.cpu_flags()),
        "usable_cores": processor.host_cores(),
    }
    return hardware_fingerprint(
        {"cpu": cpu, "host_total_bytes": memory.host_total_bytes(), "gpus": gpus, "disk": None}
    )


def published_box(config: HardwareConfig) -> Hardware:
    """Build a box that someone described: nothing of it is in use, locked memory has no limit.

    Numbers that were not published are None.
    """
    kind: Literal["cpu", "cuda"] = "cpu" if config.accelerator == "cpu" else "cuda"
    return Hardware(
        name=config.name,
        source=config.source or f"hardware={config.name}",
        device_kind=kind,
        device_name=config.device_name or config.name,
        device_count=config.device_count or 1,
        device_total_bytes=config.device_bytes if kind == "cuda" else config.host_bytes,
        device_free_bytes=config.device_bytes if kind == "cuda" else config.host_bytes,
        device_dtypes=("float32", "float16", "bfloat16"),
        host_total_bytes=config.host_bytes,
        host_available_bytes=config.host_bytes,
        host_cores=config.host_cores,
        memlock_limit_bytes=None,
        disk_free_bytes=config.disk_bytes,
        disk_total_bytes=config.disk_bytes,
    )


def this_machine(config: HardwareConfig, nvme_path: Path | None, ranks: int) -> Hardware:
    """Describe what is here. A size given in `config` caps what was found."""
    host_total = reading.least(memory.host_total_bytes(), config.host_bytes)
    host_available = reading.least(memory.host_available_bytes(), config.host_bytes)
    disk_free, disk_total = disk.disk_bytes(nvme_path) if nvme_path else (None, None)
    gpus = gpu.usable_gpus(config)[: config.device_count]
    host = Hardware(
        name=config.name,
        source=config.source or "this machine",
        device_kind="cpu",
        device_name=config.device_name or processor.cpu_description() or "CPU",
        device_count=1,
        device_total_bytes=reading.least(host_total, config.device_bytes),
        device_free_bytes=reading.least(host_available, config.device_bytes),
        device_dtypes=processor.cpu_dtypes(processor.cpu_flags()),
        emulated_dtypes=processor.emulated_dtypes(processor.cpu_flags()),
        host_total_bytes=host_total,
        host_available_bytes=host_available,
        host_cores=config.host_cores or processor.host_cores(),
        memlock_limit_bytes=memory.memlock_limit_bytes(),
        disk_free_bytes=reading.least(disk_free, config.disk_bytes),
        disk_total_bytes=reading.least(disk_total, config.disk_bytes),
        disk_filesystem=disk.filesystem_of(nvme_path) if nvme_path else None,
    )
    if not gpus:
        return host
    used = [
        replace(gpu, total_bytes=None, free_bytes=None) if gpu.mig else gpu for gpu in gpus[:ranks]
    ]
    return replace(
        host,
        device_kind="cuda",
        emulated_dtypes=(),
        device_name=config.device_name or used[0].name,
        device_count=len(gpus),
        device_total_bytes=reading.least(*(gpu.total_bytes for gpu in used), config.device_bytes),
        device_free_bytes=reading.least(*(gpu.free_bytes for gpu in used), config.device_bytes),
        device_dtypes=gpu.cuda_dtypes(used[0].compute_capability),
    )
