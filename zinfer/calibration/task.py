"""Measure this machine and store the profile that plans and predictions use: task=calibrate.

A worker that runs no model measures the rates of kernels, memory and disk (calibrate_kernels). Real
jobs with small models of four families measure what generating costs on top of them. All of them
go through the driver and the server that every run uses; neither imports torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from zinfer.calibration.fit import fitted_profile
from zinfer.calibration.measure import JobFailed, Measurement
from zinfer.calibration.schedule import Clock, expected_s
from zinfer.config import RunConfig
from zinfer.driver.finishing import finish
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.terminal import Terminal
from zinfer.job.calibration import Job, calibrated_dtypes, jobs
from zinfer.job.outcome import Outcome
from zinfer.machine.environment import package_versions
from zinfer.machine.hardware import Hardware, detect_hardware, machine_fingerprint
from zinfer.machine.measured import Mode
from zinfer.machine.profile import CalibrationProfile
from zinfer.machine.profile_files import now_text, save_profile
from zinfer.tracking.deadline import never
from zinfer.units import format_rate, format_roughly, format_seconds

LIBRARIES = ("torch", "transformers", "deepspeed")


def calibrate_job(
    config: RunConfig,
    job_dir: Path,
    terminal: Terminal,
    *,
    forked: bool = False,
    stopped: Callable[[], bool] = never,
) -> Outcome:
    """Calibrate this machine, and leave and show how that ended.

    Args:
        forked: of no use here: the small models are always forked from one server.
        stopped: True ends the job that is measured, and the calibration with it.
    """
    return finish(calibrated(config, job_dir, terminal, stopped), job_dir, terminal)


def calibrated(
    config: RunConfig, job_dir: Path, terminal: Terminal, stopped: Callable[[], bool] = never
) -> Outcome:
    """Measure, fit, store, and say where."""
    started_s = time.perf_counter()
    job_dir.mkdir(parents=True, exist_ok=True)
    nvme_path = config.offload.nvme_path or str(job_dir / "swap")
    config = config.changed(offload={"nvme_path": nvme_path})
    hardware = replace(detect_hardware(config.hardware, Path(nvme_path), 1), profile=None)
    measurement = Measurement(
        config=config,
        folder=job_dir,
        terminal=terminal,
        clock=Clock(budget_s=config.calibrate.budget_s),
        stopped=stopped,
    )
    try:
        with Interrupts.in_order():  # between two jobs too: the next one ends at once
            measure(measurement, hardware)
    except JobFailed as failed:
        return replace(failed.outcome, reason=str(failed), job_dir=str(job_dir))
    except OSError as error:
        return Outcome(status="error", reason=f"calibration failed: {error}", job_dir=str(job_dir))
    assert measurement.kernels is not None, "measuring ends with the kernels, or raises"
    versions = package_versions()
    profile = fitted_profile(
        measurement.kernels,
        measurement.runs,
        hardware,
        created=now_text(),
        fingerprint=machine_fingerprint(config.hardware),
        threads=threads_of(config),
        packages={name: versions[name] for name in LIBRARIES if name in versions},
        seconds=time.perf_counter() - started_s,
        left_out=measurement.left_out,
    )
    path = save_profile(profile)
    for line in summary(profile):
        terminal.note(line)
    terminal.note(f"stored as {path}")
    return Outcome(status="ok", metrics=profile_metrics(profile), job_dir=str(job_dir))


def measure(measurement: Measurement, hardware: Hardware) -> None:
    """Say how long it will take, then measure everything, or as much as the budget allows.

    Raises:
        JobFailed: a job did not end well.
    """
    dtypes = calibrated_dtypes(hardware.device_dtypes)
    cpu_offload = hardware.device_kind != "cpu"
    chosen = jobs(dtypes, nvme=True, cpu_offload=cpu_offload)
    measurement.terminal.note(expectation(chosen, measurement.clock.budget_s))
    if measurement.clock.budget_s is None:
        measurement.everything(chosen)
    else:
        measurement.within_budget(dtypes, cpu_offload=cpu_offload)


def expectation(chosen: list[Job], budget_s: float | None) -> str:
    """Say what the calibration will take."""
    least_s, most_s = expected_s(chosen)
    usual = f"{format_roughly(least_s)} to {format_roughly(most_s)}"
    if budget_s is None:
        return (
            f"{len(chosen)} small models, most of them two or three times, and kernels: "
            f"{usual} on two quiet cores. Set calibrate.budget_s=60 for what matters most"
        )
    return (
        f"what matters most in {budget_s:g} s (all of it takes {usual} on two quiet "
        "cores); kernels and the essential models are always measured"
    )


def threads_of(config: RunConfig) -> int:
    """Return the threads of one rank."""
    return config.launcher.omp_threads or max(
        1, len(os.sched_getaffinity(0)) // config.launcher.ranks
    )


def profile_metrics(profile: CalibrationProfile) -> dict[str, float]:
    """Return the main rates, for the result document. Unknown is absent."""
    device, pinned = profile.device_read, profile.host_to_device_pinned
    values = {
        "host_read_bytes_per_s": profile.host_read.median,
        "host_copy_bytes_per_s": profile.host_copy.median,
        "device_read_bytes_per_s": device.median if device else None,
        "host_to_device_pinned_bytes_per_s": pinned.median if pinned else None,
        "nvme_read_bytes_per_s": profile.nvme_read_bytes_per_s,
        **{
            f"flops_per_s_{kind}": profile.flops_per_s(kind)
            for kind in sorted({row.dtype for row in profile.kernels})
        },
        "calibration_s": profile.seconds,
    }
    return {name: value for name, value in values.items() if value is not None}


def summary(profile: CalibrationProfile) -> Iterator[str]:
    """Yield what a person wants to see of a profile."""
    took = format_seconds(profile.seconds)
    yield f"{profile.device_name}, {profile.threads} threads, measured in {took}"
    reads, copies = format_rate(profile.host_read.median), format_rate(profile.host_copy.median)
    yield f"host memory: reads {reads}, copies {copies} (read + write)"
    for kind in sorted({row.dtype for row in profile.kernels}):
        yield f"{kind}: {(profile.flops_per_s(kind) or 0) / 1e9:.0f} GFLOP/s at best"
    yield from _summary_of_nvme(profile)
    for cost in profile.modes:
        if cost.mode == Mode("none"):
            layer, part = format_seconds(cost.layer_s), format_seconds(cost.part_s)
            yield f"ZeRO-3 adds {layer} to each layer and {part} for each of its parameters"
            break
    if profile.left_out:
        yield f"not measured, for want of time: {', '.join(profile.left_out)}"


def _summary_of_nvme(profile: CalibrationProfile) -> Iterator[str]:
    best = max(
        (row for row in profile.nvme if row.operation == "read"),
        key=lambda row: row.rate.median,
        default=None,
    )
    if best is not None:
        yield (
            f"NVMe ({profile.nvme_path_filesystem}, page cache {profile.nvme_page_cache}): "
            f"reads {format_rate(best.rate.median)} with blocks of {best.block_bytes >> 20} MiB, "
            f"depth {best.queue_depth}, {best.intra_op_parallelism} threads"
        )
