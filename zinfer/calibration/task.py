"""`zinfer task=calibrate`: measures this machine in about a minute and stores the profile that plans and predictions use from then on.

Rates of kernels, memory and disk come from a worker that runs no model (calibrate_kernels); what generating costs on top of them comes from
real jobs with small models of four families. All of them go through the driver and the server that every run uses; neither imports torch.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.calibration.fit import calm_times_s, fitted_profile
from zinfer.config import DtypeConfig, EngineConfig, RunConfig, TrackingConfig, ZeroConfig
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.run import finish
from zinfer.driver.terminal import Terminal
from zinfer.job.calibration import ROUNDS, Job, calibrated_dtypes, jobs, small_model, to_run_again
from zinfer.job.events import Event
from zinfer.job.files import KERNELS_FILE
from zinfer.job.outcome import Outcome
from zinfer.machine.environment import package_versions
from zinfer.machine.hardware import detect_hardware, machine_fingerprint
from zinfer.machine.profile import CalibrationProfile, now_text, save_profile
from zinfer.units import format_rate, format_seconds

if TYPE_CHECKING:
    from zinfer.job.outcome import Json

JOB_TIMEOUT_S = 180.0
"""A job takes seconds, the kernels a quarter of a minute."""


def job_config(job: Job, config: RunConfig) -> RunConfig:
    """The job as a configuration: dummy weights, no tracking, nothing of the user's choices but the machine's."""
    resident = job.mode == "resident"
    device: Any = "none" if resident else job.mode
    dtype: Any = job.dtype
    return replace(
        config,
        task="run",
        weights="dummy",
        model=small_model(job.family, job.layers, job.hidden),
        engine=EngineConfig(name="resident" if resident else "zero"),
        offload=replace(
            config.offload,
            device=device,
            nvme_path=config.offload.nvme_path if device == "nvme" else None,
            use_gds=False,
        ),
        dtype=DtypeConfig(weights=dtype, compute=dtype),
        batch=job.batch,
        zero=ZeroConfig(derivation="tuned", leaf_layers=None if job.leaf else False),
        tracking=TrackingConfig(store="none"),
        launcher=replace(
            config.launcher, ranks=1, timeout_s=config.launcher.timeout_s or JOB_TIMEOUT_S
        ),
        plan=replace(config.plan, enforce=False),
    )


def calibrate_job(config: RunConfig, job_dir: Path, terminal: Terminal) -> Outcome:
    """Calibrate this machine, and leave and show how that ended."""
    return finish(main_task(config, job_dir, terminal), job_dir, terminal)


def main_task(config: RunConfig, job_dir: Path, terminal: Terminal) -> Outcome:
    """Measure, store, say where."""
    started_s = time.perf_counter()
    job_dir.mkdir(parents=True, exist_ok=True)
    config = replace(
        config,
        offload=replace(
            config.offload, nvme_path=config.offload.nvme_path or str(job_dir / "swap")
        ),
    )
    hardware = replace(
        detect_hardware(config.hardware, Path(str(config.offload.nvme_path)), 1), profile=None
    )
    dtypes, on_gpu = calibrated_dtypes(hardware.device_dtypes), hardware.device_kind != "cpu"
    chosen = list(jobs(dtypes, nvme=True, cpu_offload=on_gpu))
    try:
        with Interrupts.in_order():  # between two jobs too: the next one ends at once
            measured = run_jobs(config, job_dir / "round0", chosen, terminal)
            kernels = measure_kernels(config, job_dir / "kernels", terminal)
            for number in range(1, ROUNDS):
                again = to_run_again(chosen, calm_times_s(measured))
                measured += run_jobs(config, job_dir / f"round{number}", again, terminal)
    except JobFailed as failed:
        return replace(failed.outcome, reason=str(failed), job_dir=str(job_dir))
    except OSError as error:
        return Outcome(status="error", reason=f"calibration failed: {error}", job_dir=str(job_dir))
    profile = fitted_profile(
        kernels,
        measured,
        hardware,
        created=now_text(),
        fingerprint=machine_fingerprint(config.hardware),
        threads=threads_of(config),
        packages={
            name: version
            for name, version in package_versions().items()
            if name in ("torch", "transformers", "deepspeed")
        },
        seconds=time.perf_counter() - started_s,
    )
    path = save_profile(profile)
    for line in summary(profile):
        terminal.note(line)
    terminal.note(f"stored as {path}")
    return Outcome(status="ok", metrics=profile_metrics(profile), job_dir=str(job_dir))


def threads_of(config: RunConfig) -> int:
    """Threads of one rank."""
    return config.launcher.omp_threads or max(
        1, len(os.sched_getaffinity(0)) // config.launcher.ranks
    )


class JobFailed(RuntimeError):
    """One of the calibration's jobs; it ends the calibration as it ended itself."""

    def __init__(self, which: str, outcome: Outcome) -> None:
        super().__init__(f"{outcome.reason}, in the calibration's job {which}")
        self.outcome = outcome


class OneOfMany(Terminal):
    """Of a job of the calibration: what goes on inside it shows on the calibration's own terminal if at all, its end nowhere."""

    def __init__(self, outer: Terminal | None = None) -> None:
        super().__init__("text", out=io.StringIO(), err=io.StringIO())
        self._outer = outer

    def event(self, event: Event) -> None:
        if self._outer is not None:
            self._outer.event(event)


def run_jobs(
    config: RunConfig, job_dir: Path, all_jobs: list[Job], terminal: Terminal
) -> list[tuple[Job, RunConfig, Json]]:
    """Each job's own result document, through the driver that every run uses.

    Raises:
        JobFailed: as soon as one of them did not end well.
    """
    from zinfer.driver.run import run_job

    terminal.event({"event": "phase", "name": "small models"})
    results = []
    for done, job in enumerate(all_jobs):
        terminal.event({"event": "progress", "done": done, "total": len(all_jobs), "unit": "jobs"})
        job_config_ = job_config(job, config)
        outcome = run_job(job_config_, job_dir / f"job{done}", OneOfMany(), forked=True)
        if outcome.status != "ok":
            raise JobFailed(f"{job.family}, {job.mode}, {job.dtype}", outcome)
        document = {**outcome.document(), "samples": list(outcome.samples)}
        results.append((job, job_config_, document))
    return results


def measure_kernels(config: RunConfig, job_dir: Path, terminal: Terminal) -> Json:
    """What a worker found that runs kernels instead of a model.

    Raises:
        JobFailed: it did not end well.
    """
    from zinfer.driver.run import run_job

    kernels = replace(
        job_config(Job(family="llama", mode="nvme", dtype="float32"), config), task="calibrate"
    )
    outcome = run_job(kernels, job_dir, OneOfMany(terminal), forked=True)
    if outcome.status != "ok":
        raise JobFailed("that measures kernels", outcome)
    found: Json = json.loads((job_dir / KERNELS_FILE).read_text())
    return found


def profile_metrics(profile: CalibrationProfile) -> dict[str, float]:
    """The main rates, for the result document. Unknown is absent."""
    values = {
        "host_read_bytes_per_s": profile.host_read.median,
        "host_copy_bytes_per_s": profile.host_copy.median,
        "device_read_bytes_per_s": profile.device_read.median if profile.device_read else None,
        "host_to_device_pinned_bytes_per_s": profile.host_to_device_pinned.median
        if profile.host_to_device_pinned
        else None,
        "nvme_read_bytes_per_s": profile.nvme_read_bytes_per_s,
        **{
            f"flops_per_s_{kind}": profile.flops_per_s(kind)
            for kind in sorted({row.dtype for row in profile.kernels})
        },
        "calibration_s": profile.seconds,
    }
    return {name: value for name, value in values.items() if value is not None}


def summary(profile: CalibrationProfile) -> Iterator[str]:
    """What a person wants to see of it."""
    yield f"{profile.device_name}, {profile.threads} threads, measured in {format_seconds(profile.seconds)}"
    yield f"host memory: reads {format_rate(profile.host_read.median)}, copies {format_rate(profile.host_copy.median)} (read + write)"
    for kind in sorted({row.dtype for row in profile.kernels}):
        yield f"{kind}: {(profile.flops_per_s(kind) or 0) / 1e9:.0f} GFLOP/s at best"
    reads = [row for row in profile.nvme if row.operation == "read"]
    if reads:
        best = max(reads, key=lambda row: row.rate.median)
        yield (
            f"NVMe ({profile.nvme_path_filesystem}, page cache {profile.nvme_page_cache}): reads {format_rate(best.rate.median)} "
            f"with blocks of {best.block_bytes >> 20} MiB, depth {best.queue_depth}, {best.intra_op_parallelism} threads"
        )
    for cost in profile.modes:
        if cost.mode == "none":
            yield f"ZeRO-3 adds {format_seconds(cost.layer_s)} to each layer and {format_seconds(cost.part_s)} for each of its parameters"
            break
