"""From what was measured to a profile: what a run costs beyond its kernels is the rest that small models leave.

Plain transformers shows what an operation and an element cost; ZeRO-3's jobs what it adds to a pass, a layer and a parameter; those on NVMe
what waiting for weights adds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zinfer.config import RunConfig
from zinfer.job.calibration import FEW_LAYERS, HIDDEN, Job
from zinfer.job.outcome import Json
from zinfer.machine.hardware import Hardware
from zinfer.machine.profile import (
    ANY_FAMILY,
    BY_MODULE,
    PROFILE_VERSION,
    CalibrationProfile,
    FamilyCost,
    LoadCost,
    ModeCost,
    StreamCost,
    profile_from_document,
)
from zinfer.model.spec import ModelSpec, model_spec
from zinfer.plan.memory import memory_plan
from zinfer.plan.prediction import (
    CACHES_BYTES,
    attention_seconds,
    elementwise_seconds,
    layer_parts,
    layers_seconds,
    products_seconds,
)
from zinfer.plan.process_memory import GROWTH_BYTES, IMPORTED_RSS_BYTES
from zinfer.plan.zero_layout import zero_layout

Measured = tuple[Job, RunConfig, Json]


@dataclass(frozen=True, kw_only=True)
class Rest:
    """One job, and what its passes took beyond products, attention and the choice of the next token."""

    job: Job
    config: RunConfig
    spec: ModelSpec
    calm_s: float
    usual_s: float
    """See calm_and_usual_s; what is usual without the disturbance that is usual."""
    products_s: float
    """What the products of that pass are taken to need."""

    @property
    def is_prefill(self) -> bool:
        return self.job.batch.new_tokens <= 2

    @property
    def is_small(self) -> bool:
        """Nothing but fixed cost."""
        return self.job.hidden == HIDDEN


def fitted_profile(
    kernels: Json, measured: Sequence[Measured], hardware: Hardware, **facts: Any
) -> CalibrationProfile:
    """The whole profile: kernels first, then what jobs cost on top."""
    unfitted: Json = {
        "version": PROFILE_VERSION,
        "families": [],
        "modes": [],
        "stream": None,
        "load": {},
        "growth_bytes": {},
    }
    profile = profile_from_document(
        {
            **unfitted,
            **kernels,
            **facts,
            "device_kind": hardware.device_kind,
            "device_name": hardware.device_name,
        }
    )
    yardstick_s = statistics.median(result["metrics"]["yardstick_s"] for *_, result in measured)
    profile = replace(profile, disturbance=disturbance(measured), yardstick_s=yardstick_s)
    rests = [rest_of(profile, *entry) for entry in measured]
    plain = list(calmest(rest for rest in rests if rest.job.mode == "resident"))
    modes = [resident_cost(kind, plain) for kind in sorted({rest.job.dtype for rest in plain})]
    profile = replace(
        profile, families=tuple(cost for mode in modes for cost in family_costs(mode, plain))
    )
    for mode in sorted({rest.job.mode for rest in rests} - {"resident", "nvme"}):
        added = zero_costs(
            profile,
            mode,
            list(calmest(rest for rest in rests if rest.job.mode == mode and rest.is_small)),
        )
        modes += [
            replace(cost, dtype=resident.dtype)
            for resident in modes
            if resident.mode == "resident"
            for cost in added
        ]
    if hardware.device_kind == "cpu":
        modes += [
            replace(cost, mode=cost.mode.replace("none", "cpu"))
            for cost in modes
            if cost.mode.startswith("none")
        ]
    profile = replace(
        profile,
        modes=tuple(modes),
        growth_bytes=growth(measured, hardware, profile.imported_rss_bytes),
    )
    profile = replace(profile, load=load_costs(measured, profile))
    profile = replace(
        profile,
        cold_factor=cold_factor(
            profile, [rest for rest in rests if rest.job.mode == "none" and not rest.is_small]
        ),
    )
    return with_streaming(profile, rests)


def calmest(rests: Iterable[Rest]) -> Iterable[Rest]:
    """Of each job the round in which it took least: whatever else the machine does only adds."""
    least: dict[Job, Rest] = {}
    for rest in rests:
        if rest.job not in least or rest.calm_s < least[rest.job].calm_s:
            least[rest.job] = rest
    return least.values()


def calm_and_usual_s(job: Job, result: Json) -> tuple[float, float]:
    """Lower quartile and median of one run's decode steps; of a job that is there for its prefill the fastest and the median of these."""
    timed = [sample for sample in result["samples"] if sample["kind"] == "timed"]
    if job.batch.new_tokens <= 2:
        prefills = [sample["prefill_s"] for sample in timed]
        return min(prefills), statistics.median(prefills)
    steps = [seconds for sample in timed for seconds in sample["decode_step_s"]]
    return statistics.quantiles(steps, n=4)[0], statistics.median(steps)


def calm_times_s(measured: Sequence[Measured]) -> dict[Job, list[float]]:
    """What each job's runs took when nothing else ran."""
    found: dict[Job, list[float]] = {}
    for job, _, result in measured:
        found.setdefault(job, []).append(calm_and_usual_s(job, result)[0])
    return found


def disturbance(measured: Sequence[Measured]) -> float:
    """The median over all runs of what is usual in it over the calmest run of the same job."""
    calmest_s = {job: min(times_s) for job, times_s in calm_times_s(measured).items()}
    return max(
        1.0,
        statistics.median(
            calm_and_usual_s(job, result)[1] / calmest_s[job] for job, _, result in measured
        ),
    )


def rest_of(profile: CalibrationProfile, job: Job, config: RunConfig, result: Json) -> Rest:
    """What this job's kernels do not explain."""
    spec, batch = model_spec(config.model, compute_dtype=config.dtype.compute), config.batch
    is_prefill = batch.new_tokens <= 2
    new, context = (
        (batch.prompt_tokens, float(batch.prompt_tokens))
        if is_prefill
        else (1, batch.prompt_tokens + batch.new_tokens / 2)
    )
    products_s = products_seconds(spec, profile, batch.batch_size, new) or 0.0
    kernels_s = (
        products_s
        + attention_seconds(spec, profile, batch.batch_size, new, context)
        + elementwise_seconds(spec, 0.0, profile, batch.batch_size, new)
    )
    calm_s, usual_s = calm_and_usual_s(job, result)
    undisturbed_s = usual_s / profile.disturbance
    return Rest(
        job=job,
        config=config,
        spec=spec,
        calm_s=calm_s - kernels_s,
        usual_s=undisturbed_s - kernels_s,
        products_s=products_s,
    )


def line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of y = a + b * x with the least squares, neither below zero."""
    xs, ys = zip(*points, strict=True)
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((one - x) ** 2 for one in xs)
    b = (
        sum((one - x) * (other - y) for one, other in zip(xs, ys, strict=True)) / spread
        if spread
        else 0.0
    )
    if b < 0:
        return max(0.0, y), 0.0
    if y - b * x >= 0:
        return y - b * x, b
    return 0.0, max(
        0.0,
        sum(one * other for one, other in zip(xs, ys, strict=True)) / sum(one * one for one in xs),
    )


def loop_s(rests: Iterable[Rest]) -> float:
    """What a pass costs without any layer: through models of one family that differ in their layers only."""
    leaves = [rest for rest in rests if rest.job.leaf]
    families = {rest.job.family for rest in leaves if rest.job.layers == FEW_LAYERS}
    through = [
        line((rest.job.layers, rest.calm_s) for rest in leaves if rest.job.family == family)[0]
        for family in sorted(families)
    ]
    return statistics.median(through)


def resident_cost(dtype: str, plain: Sequence[Rest]) -> ModeCost:
    """Of plain transformers: the loop. Its layers are the families' own cost."""
    steps = [rest for rest in plain if rest.job.dtype == dtype and not rest.is_prefill]
    return ModeCost(mode="resident", dtype=dtype, step_s=loop_s(steps), layer_s=0.0, part_s=0.0)


def family_costs(mode: ModeCost, plain: Sequence[Rest]) -> Iterator[FamilyCost]:
    """An operation from decode steps, an element from prefills; last what a family not measured is taken to cost."""
    here = [rest for rest in plain if rest.job.dtype == mode.dtype]
    prefills = {rest.job.family: rest for rest in here if rest.is_prefill}
    layers = max(rest.job.layers for rest in here if not rest.is_prefill)
    found = []
    for rest in here:
        if rest.is_prefill or rest.job.layers != layers:
            continue
        op_s = max(0.0, (rest.calm_s - mode.step_s) / layers / (rest.spec.layer_ops or 1.0))
        prefill = prefills[rest.job.family]
        tokens, spec = prefill.job.batch.batch_size * prefill.job.batch.prompt_tokens, prefill.spec
        elementwise_s = (
            prefill.calm_s - mode.step_s - spec.num_layers * (spec.layer_ops or 1.0) * op_s
        )
        value_s = max(0.0, elementwise_s / (tokens * spec.num_layers * (spec.layer_values or 1.0)))
        found.append(
            FamilyCost(model_type=rest.job.family, dtype=mode.dtype, op_s=op_s, value_s=value_s)
        )
    yield from found
    dense = [cost for cost in found if cost.model_type != "mixtral"]
    yield FamilyCost(
        model_type=ANY_FAMILY,
        dtype=mode.dtype,
        op_s=statistics.median(cost.op_s for cost in dense),
        value_s=statistics.median(cost.value_s for cost in dense),
    )


def zero_costs(profile: CalibrationProfile, mode: str, rests: Sequence[Rest]) -> list[ModeCost]:
    """What ZeRO-3 adds when it fetches whole layers, and when it fetches module by module."""
    added = [
        replace(rest, calm_s=rest.calm_s - rest.spec.num_layers * _plain_layer_s(profile, rest))
        for rest in rests
    ]
    step_s = loop_s(added)
    dtype = rests[0].job.dtype

    def of_a_layer(rest: Rest, mode: str) -> tuple[float, float]:
        return layer_parts(rest.spec, zero_layout(rest.config, rest.spec), mode), (
            rest.calm_s - step_s
        ) / rest.spec.num_layers

    layers = max(rest.job.layers for rest in added)
    layer_s, part_s = line(
        of_a_layer(rest, mode) for rest in added if rest.job.leaf and rest.job.layers == layers
    )
    costs = [ModeCost(mode=mode, dtype=dtype, step_s=step_s, layer_s=layer_s, part_s=part_s)]
    modules = [of_a_layer(rest, mode + BY_MODULE) for rest in added if not rest.job.leaf]
    if modules:
        module_s = statistics.median(max(0.0, seconds) / count for count, seconds in modules)
        costs.append(
            ModeCost(
                mode=mode + BY_MODULE, dtype=dtype, step_s=step_s, layer_s=0.0, part_s=module_s
            )
        )
    return costs


def _plain_layer_s(profile: CalibrationProfile, rest: Rest) -> float:
    cost = profile.family_cost(rest.spec.model_type, rest.spec.dtype)
    return (rest.spec.layer_ops or 0.0) * cost.op_s if cost else 0.0


def cold_factor(profile: CalibrationProfile, rests: Sequence[Rest]) -> float:
    """Of models that no cache holds: what a usual step takes over what its fixed costs and products should, the median, at least 1.

    One factor for both: fitted apart they trade places from one calibration to the next.
    """
    ratios = []
    for rest in rests:
        should_s = _fixed_s(profile, rest, "none") + rest.products_s
        ratios.append((rest.usual_s + rest.products_s - _elements_s(profile, rest)) / should_s)
    return max(1.0, statistics.median(ratios)) if ratios else 1.0


def _elements_s(profile: CalibrationProfile, rest: Rest) -> float:
    family = profile.family_cost(rest.spec.model_type, rest.spec.dtype)
    assert family is not None, "every family of the jobs was fitted"
    return (
        family.value_s
        * rest.job.batch.batch_size
        * (rest.spec.layer_values or 0.0)
        * rest.spec.num_layers
    )


def _fixed_s(profile: CalibrationProfile, rest: Rest, mode: str) -> float:
    """Loop and layers of one pass, with warm caches."""
    family, cost = (
        profile.family_cost(rest.spec.model_type, rest.spec.dtype),
        profile.mode_cost(mode, rest.spec.dtype),
    )
    assert family is not None and cost is not None, "every family and mode of the jobs was fitted"
    return cost.step_s + layers_seconds(
        rest.spec, zero_layout(rest.config, rest.spec), family, cost
    )


def with_streaming(profile: CalibrationProfile, rests: Sequence[Rest]) -> CalibrationProfile:
    """NVMe: first what its bookkeeping adds to a layer where nothing is swapped, then what each parameter and byte costs that is read.

    The latter is what a model takes longer than the same one that is not offloaded.
    """
    swapping = [rest for rest in rests if rest.job.mode == "nvme"]
    small = [
        (rest.calm_s - _fixed_s(profile, rest, "none")) / rest.spec.num_layers
        for rest in calmest(swapping)
        if rest.is_small
    ]
    extra_s = max(0.0, statistics.median(small)) if small else 0.0
    modes = [
        replace(cost, mode=cost.mode.replace("none", "nvme"), layer_s=cost.layer_s + extra_s)
        for cost in profile.modes
        if cost.mode.startswith("none")
    ]
    profile = replace(profile, modes=(*profile.modes, *modes))
    rows = []
    for rest in swapping:
        layout = zero_layout(rest.config, rest.spec)
        twin = replace(rest.job, mode="none", rounds=0)
        resident_s = [other.usual_s for other in rests if replace(other.job, rounds=0) == twin]
        if layout.swapped_numel and resident_s:
            added_s = (
                rest.usual_s
                - statistics.median(resident_s)
                - profile.cold_factor * rest.spec.num_layers * extra_s
            )
            rows.append(
                (layout.swapped_count, layout.swapped_numel * layout.itemsize_bytes, added_s)
            )
    return replace(profile, stream=stream_cost(rows, profile.nvme_read_bytes_per_s))


def stream_cost(
    rows: Sequence[tuple[int, int, float]], handle_bytes_per_s: float | None
) -> StreamCost | None:
    """Bytes at the rate of the handle alone; what swapping added beyond that, over the parameters: the median of the models, at least 0.

    Two unknowns fitted to a few models would trade places from one calibration to the next.

    Args:
        rows: (swapped parameters, their bytes, seconds that swapping added) of each model.
    """
    if not rows or not handle_bytes_per_s:
        return None
    waits_s = [(seconds - size / handle_bytes_per_s) / count for count, size, seconds in rows]
    return StreamCost(
        parameter_s=max(0.0, statistics.median(waits_s)), bytes_per_s=handle_bytes_per_s
    )


def growth(measured: Sequence[Measured], hardware: Hardware, imported_bytes: int) -> dict[str, int]:
    """Mode -> what running adds to a worker that has imported everything: the median of what the plan without it leaves of the peaks."""
    found: dict[str, list[int]] = {}
    for job, config, result in measured:
        spec = model_spec(config.model, compute_dtype=config.dtype.compute)
        plan = memory_plan(spec, config, replace(hardware, profile=None))
        known = (
            plan.peak_host_rss_bytes - IMPORTED_RSS_BYTES - GROWTH_BYTES[job.mode] + imported_bytes
        )
        found.setdefault(job.mode, []).append(int(result["metrics"]["peak_host_rss_bytes"]) - known)
    medians = {mode: int(statistics.median(values)) for mode, values in found.items()}
    if "none" in medians and hardware.device_kind == "cpu":
        medians["cpu"] = medians["none"]
    return medians


def load_costs(measured: Sequence[Measured], profile: CalibrationProfile) -> dict[str, LoadCost]:
    """Mode -> seconds = a + parameters * b + bytes / c: a and b from the small models, c from the others, else from memory and NVMe."""
    memory = (
        profile.host_copy.median / 4
    )  # read and written once, every page of the target touched for the first time
    writes = [row.rate.median for row in profile.nvme if row.operation == "write"]
    costs = {}
    for mode in sorted({job.mode for job, _, _ in measured}):
        loads = []
        for job, config, result in measured:
            if job.mode == mode:
                spec = model_spec(config.model, compute_dtype=config.dtype.compute)
                loads.append(
                    (
                        job.hidden == HIDDEN,
                        len(spec.parameters),
                        spec.weight_bytes,
                        result["metrics"]["load_s"],
                    )
                )
        fixed_s, parameter_s = line(
            (count, seconds) for is_small, count, _, seconds in loads if is_small
        )
        rests = [
            (size, seconds - fixed_s - count * parameter_s)
            for is_small, count, size, seconds in loads
            if not is_small
        ]
        rates = [size / seconds for size, seconds in rests if size > CACHES_BYTES and seconds > 0]
        rate = 1 / (1 / memory + 1 / max(writes)) if mode == "nvme" and writes else memory
        costs[mode] = LoadCost(
            fixed_s=fixed_s,
            parameter_s=parameter_s,
            bytes_per_s=statistics.median(rates) if rates else rate,
        )
    if profile.device_kind == "cpu" and "none" in costs:
        costs["cpu"] = costs["none"]
    return costs
