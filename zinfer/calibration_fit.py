"""From what was measured to a profile: what a run costs beyond its kernels is the rest that small models leave."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from zinfer.calibration_jobs import Job
from zinfer.calibration_profile import PROFILE_VERSION, CalibrationProfile, FixedCost, LoadCost, StreamCost, profile_from_document
from zinfer.config import RunConfig
from zinfer.hardware import Hardware
from zinfer.host_process import GROWTH_BYTES, IMPORTED_RSS_BYTES
from zinfer.memory_plan import memory_plan
from zinfer.model_spec import ModelSpec, model_spec
from zinfer.outcome import Json
from zinfer.prediction import attention_seconds, elementwise_seconds, products_seconds
from zinfer.zero_layout import zero_layout

Measured = tuple[Job, RunConfig, Json]
NO_COST = FixedCost(model_type="*", mode="", dtype="", step_s=0.0, layer_s=0.0, element_s=0.0)


def fitted_profile(kernels: Json, measured: list[Measured], hardware: Hardware, **facts: Any) -> CalibrationProfile:
    """The whole profile: kernels first, then what jobs cost on top."""
    fields = {name: kernels[name] for name in kernels if name not in ("nvme",)}
    empty = {"fixed": [], "stream": None, "load": {}, "nvme": kernels.get("nvme", []), "version": PROFILE_VERSION, "growth_bytes": {}}
    base = profile_from_document({**empty, **fields, **facts, "device_kind": hardware.device_kind, "device_name": hardware.device_name})
    plain = [entry for entry in measured if entry[0].mode != "nvme"]
    fixed = tuple(fixed_costs(base, plain))
    if hardware.device_kind == "cpu":
        fixed += tuple(replace(cost, mode="cpu") for cost in fixed if cost.mode == "none")
    nvme = [entry for entry in measured if entry[0].mode == "nvme"]
    profile = replace(base, fixed=fixed)
    if nvme:
        profile = with_streaming(profile, nvme)
    return replace(
        profile,
        growth_bytes=growth(measured, hardware, base.imported_rss_bytes),
        load=load_costs(measured, profile),
        packages=dict(facts.get("packages", {})),
    )


def _spec(config: RunConfig) -> ModelSpec:
    return model_spec(config.model, compute_dtype=config.dtype.compute)


def _timed(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [sample for sample in result["samples"] if sample["kind"] == "timed"]


def calm_decode_s(result: Mapping[str, Any]) -> float:
    """The least of the generations' median steps: whatever else the machine does only adds."""
    return min(statistics.median(sample["decode_step_s"]) for sample in _timed(result))


def kernel_seconds(profile: CalibrationProfile, config: RunConfig, *, new: int, context: float) -> float:
    """Of one pass, without anything fixed."""
    spec, rows = _spec(config), config.batch.batch_size
    return (
        (products_seconds(spec, profile, rows, new) or 0.0)
        + attention_seconds(spec, profile, rows, new, context)
        + elementwise_seconds(spec, NO_COST, profile, rows, new)
    )


def fixed_costs(profile: CalibrationProfile, measured: list[Measured]) -> Iterable[FixedCost]:
    """By family, mode and dtype: the loop's share from two LLaMAs that differ in layers only, elementwise work from prefills."""
    steps: dict[tuple[str, str, str, int], float] = {}
    prefills: dict[tuple[str, str], tuple[int, int, float]] = {}
    for job, config, result in measured:
        batch = config.batch
        if batch.new_tokens > 2:
            steps[job.family, job.mode, job.dtype, job.layers] = _decode_rest(profile, config, result)
        else:
            seconds = min(sample["prefill_s"] for sample in _timed(result))
            rest = seconds - kernel_seconds(profile, config, new=batch.prompt_tokens, context=batch.prompt_tokens)
            elements = job.layers * batch.batch_size * batch.prompt_tokens * job.hidden
            prefills[job.family, job.dtype] = (job.layers, elements, rest)
    costs: list[FixedCost] = []
    for mode, dtype in sorted({(mode, dtype) for _, mode, dtype, _ in steps}):
        here = {(family, layers): rest for (family, m, d, layers), rest in steps.items() if (m, d) == (mode, dtype)}
        few, many = (min(layers for _, layers in here), max(layers for _, layers in here))
        slope = max(0.0, (here["llama", many] - here["llama", few]) / (many - few))
        step_s = max(0.0, here["llama", few] - few * slope)
        for family in sorted({family for family, layers in here if layers == many}):
            layer_s = max(0.0, (here[family, many] - step_s) / many)
            costs.append(FixedCost(model_type=family, mode=mode, dtype=dtype, step_s=step_s, layer_s=layer_s, element_s=0.0))
    costs = [replace(cost, element_s=_element_s(cost, costs, prefills)) for cost in costs]
    yield from costs
    for mode, dtype in sorted({(cost.mode, cost.dtype) for cost in costs}):
        dense = [cost for cost in costs if (cost.mode, cost.dtype) == (mode, dtype) and cost.model_type != "mixtral"]
        yield replace(
            dense[0],
            model_type="*",
            layer_s=statistics.median(cost.layer_s for cost in dense),
            element_s=statistics.median(cost.element_s for cost in dense),
        )


def _element_s(cost: FixedCost, costs: list[FixedCost], prefills: Mapping[tuple[str, str], tuple[int, int, float]]) -> float:
    """What this family's prefill takes beyond kernels and fixed cost, for each token and hidden element of a layer, whatever the mode."""
    if (cost.model_type, cost.dtype) not in prefills:
        return 0.0
    layers, elements, rest = prefills[cost.model_type, cost.dtype]
    none = next(other for other in costs if (other.model_type, other.dtype, other.mode) == (cost.model_type, cost.dtype, "none"))
    return max(0.0, (rest - none.step_s - layers * none.layer_s) / elements)


def with_streaming(profile: CalibrationProfile, measured: list[Measured]) -> CalibrationProfile:
    """NVMe: first what its bookkeeping adds to a layer where nothing is swapped, then what each swapped parameter and byte costs."""
    none = {(cost.model_type, cost.dtype): cost for cost in profile.fixed if cost.mode == "none"}
    added = []
    for job, config, result in measured:
        if zero_layout(config, _spec(config)).swapped_numel == 0:
            cost = none[job.family, job.dtype]
            rest = _decode_rest(profile, config, result) - cost.step_s - job.layers * cost.layer_s
            added.append(max(0.0, rest / job.layers))
    extra = statistics.median(added) if added else 0.0
    fixed = profile.fixed + tuple(replace(cost, mode="nvme", layer_s=cost.layer_s + extra) for cost in none.values())
    rows = []
    for job, config, result in measured:
        layout = zero_layout(config, _spec(config))
        if layout.swapped_numel:
            cost = none[job.family, job.dtype]
            rest = _decode_rest(profile, config, result) - cost.step_s - job.layers * (cost.layer_s + extra)
            rows.append((layout.swapped_count, layout.swapped_numel * layout.itemsize_bytes, max(0.0, rest)))
    return replace(profile, fixed=fixed, stream=stream_cost(rows, profile.nvme_read_bytes_per_s))


def _decode_rest(profile: CalibrationProfile, config: RunConfig, result: Mapping[str, Any]) -> float:
    batch = config.batch
    return calm_decode_s(result) - kernel_seconds(profile, config, new=1, context=batch.prompt_tokens + batch.new_tokens / 2)


def stream_cost(rows: list[tuple[int, int, float]], handle_bytes_per_s: float | None) -> StreamCost | None:
    """Seconds = parameters * a + bytes / b through two measurements; where that gives nonsense, all of it goes to the bytes.

    Args:
        rows: (swapped parameters, swapped bytes, seconds that swapping added) of each.
    """
    if not rows:
        return None
    if len(rows) >= 2:
        (p0, s0, t0), (p1, s1, t1) = rows[0], rows[1]
        determinant = p0 * s1 - p1 * s0
        if determinant:
            a = (t0 * s1 - t1 * s0) / determinant
            c = (p0 * t1 - p1 * t0) / determinant
            if a >= 0 and c > 0:
                return StreamCost(parameter_s=a, bytes_per_s=1 / c)
    seconds, count = sum(row[2] for row in rows), sum(row[1] for row in rows)
    if seconds <= 0:
        return StreamCost(parameter_s=0.0, bytes_per_s=handle_bytes_per_s or float(count))
    return StreamCost(parameter_s=0.0, bytes_per_s=count / seconds)


def growth(measured: list[Measured], hardware: Hardware, imported_bytes: int) -> dict[str, int]:
    """Mode -> what running adds to a worker that has imported everything: the median of what the plan without it leaves of the peaks."""
    found: dict[str, list[int]] = {}
    for job, config, result in measured:
        plan = memory_plan(_spec(config), config, replace(hardware, profile=None))
        known = plan.peak_host_rss_bytes - IMPORTED_RSS_BYTES - GROWTH_BYTES[job.mode] + imported_bytes
        found.setdefault(job.mode, []).append(int(result["metrics"]["peak_host_rss_bytes"]) - known)
    medians = {mode: int(statistics.median(values)) for mode, values in found.items()}
    if "none" in medians and hardware.device_kind == "cpu":
        medians["cpu"] = medians["none"]
    return medians


def load_costs(measured: list[Measured], profile: CalibrationProfile) -> dict[str, LoadCost]:
    """Mode -> seconds = a + bytes / b. The models are too small to show b: that of copying into fresh memory, or of writing to NVMe."""
    memory = profile.host_copy.median / 4  # read and written once, every page of the target touched for the first time
    writes = [row.rate.median for row in profile.nvme if row.operation == "write"]
    costs = {}
    for mode in sorted({job.mode for job, _, _ in measured}):
        rate = 1 / (1 / memory + 1 / max(writes)) if mode == "nvme" and writes else memory
        rests = []
        for job, config, result in measured:
            if job.mode == mode:
                layout = zero_layout(config, _spec(config))
                rests.append(result["metrics"]["load_s"] - layout.stored_numel * layout.itemsize_bytes / rate)
        costs[mode] = LoadCost(fixed_s=max(0.0, statistics.median(rests)), bytes_per_s=rate)
    if profile.device_kind == "cpu" and "none" in costs:
        costs["cpu"] = costs["none"]
    return costs
