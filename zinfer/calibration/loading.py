"""Fit what loading a model costs, and the host memory that a run adds to its worker."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from zinfer.calibration.rests import Measured, line
from zinfer.job.calibration import HIDDEN
from zinfer.machine.hardware import Hardware
from zinfer.machine.measured import LoadCost
from zinfer.machine.profile import CalibrationProfile
from zinfer.model.spec import model_spec
from zinfer.plan.memory import memory_plan
from zinfer.plan.prediction import CACHES_BYTES
from zinfer.plan.process_memory import GROWTH_BYTES, IMPORTED_RSS_BYTES


def growth(measured: Sequence[Measured], hardware: Hardware, imported_bytes: int) -> dict[str, int]:
    """Return, per mode, the bytes that running adds to a worker that has imported everything.

    Subtract from each peak what the plan, made without a profile, knows of it. Take the median.
    """
    found: dict[str, list[int]] = {}
    for job, config, result in measured:
        spec = model_spec(config.model, compute_dtype=config.dtype.compute)
        plan = memory_plan(spec, config, replace(hardware, profile=None))
        assumed = IMPORTED_RSS_BYTES + GROWTH_BYTES[job.mode]
        known = plan.peak_host_rss_bytes - assumed + imported_bytes
        found.setdefault(job.mode, []).append(int(result["metrics"]["peak_host_rss_bytes"]) - known)
    medians = {mode: int(statistics.median(values)) for mode, values in found.items()}
    if "none" in medians and hardware.device_kind == "cpu":
        medians["cpu"] = medians["none"]
    return medians


def load_costs(measured: Sequence[Measured], rates: CalibrationProfile) -> dict[str, LoadCost]:
    """Return, per mode, seconds = fixed + parameters * each + bytes / rate.

    Small models give the first two. The others give the rate, where they are larger than the
    caches; else it is that of memory, and on NVMe of memory and disk one after the other.
    """
    costs: dict[str, LoadCost] = {
        mode: _load_cost(mode, measured, rates)
        for mode in sorted({job.mode for job, _, _ in measured})
    }
    if rates.device_kind == "cpu" and "none" in costs:
        costs["cpu"] = costs["none"]
    return costs


def _load_cost(mode: str, measured: Sequence[Measured], rates: CalibrationProfile) -> LoadCost:
    small: list[tuple[int, int, float]] = []
    large: list[tuple[int, int, float]] = []
    for job, config, result in measured:
        if job.mode == mode:
            spec = model_spec(config.model, compute_dtype=config.dtype.compute)
            load = (len(spec.parameters), spec.weight_bytes, result["metrics"]["load_s"])
            (small if job.hidden == HIDDEN else large).append(load)
    fixed_s, parameter_s = line((count, seconds) for count, _, seconds in small)
    rests = [(size, seconds - fixed_s - count * parameter_s) for count, size, seconds in large]
    found = [size / seconds for size, seconds in rests if size > CACHES_BYTES and seconds > 0]
    rate = statistics.median(found) if found else _rate_of_memory(mode, rates)
    return LoadCost(fixed_s=fixed_s, parameter_s=parameter_s, bytes_per_s=rate)


def _rate_of_memory(mode: str, rates: CalibrationProfile) -> float:
    """Return bytes of weights a second: made, copied, and on NVMe written to the disk.

    Memory is read and written once, every page of the target touched for the first time: a quarter
    of the rate of a copy.
    """
    memory = rates.host_copy.median / 4
    writes = [row.rate.median for row in rates.nvme if row.operation == "write"]
    return 1 / (1 / memory + 1 / max(writes)) if mode == "nvme" and writes else memory
