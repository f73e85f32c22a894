"""Fit fixed costs: subtract kernel time from the measured passes of small models.

The stages follow each other, and each uses what the stages before it found:

1. rates: of kernels, memory and disk, as they were measured.
2. plain transformers: the generation loop, an operation and an element of each family.
3. ZeRO-3: what it adds to a pass, to a layer, and to a parameter or module that it fetches.
4. cold caches: the factor of weights that no cache of the processor holds.
5. NVMe: what its bookkeeping adds to a layer, and what waiting for a parameter adds.
6. memory and loading (loading.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from zinfer.calibration.loading import growth, load_costs
from zinfer.calibration.rests import (
    Measured,
    Rest,
    calmest,
    disturbance_of,
    line,
    rests_of,
    same_job,
)
from zinfer.job.calibration import FEW_LAYERS, SPARSE_FAMILIES
from zinfer.job.outcome import Json
from zinfer.machine.hardware import Hardware
from zinfer.machine.measured import ANY_FAMILY, FamilyCost, Mode, ModeCost, StreamCost
from zinfer.machine.profile import PROFILE_VERSION, CalibrationProfile
from zinfer.machine.profile_files import profile_from_document
from zinfer.model.spec import ModelSpec
from zinfer.plan.prediction import layer_parts, layers_seconds
from zinfer.plan.zero_layout import zero_layout

RESIDENT, NONE, CPU, NVME = Mode("resident"), Mode("none"), Mode("cpu"), Mode("nvme")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Fixed costs that the stages so far have found."""

    families: tuple[FamilyCost, ...]
    modes: tuple[ModeCost, ...]

    def family(self, spec: ModelSpec) -> FamilyCost | None:
        """Return the cost of the model's family in its dtype, else of any family."""
        found = {cost.model_type: cost for cost in self.families if cost.dtype == spec.dtype}
        return found.get(spec.model_type) or found.get(ANY_FAMILY)

    def mode(self, mode: Mode, dtype: str) -> ModeCost | None:
        """Return the cost of this mode in this dtype."""
        return next((cost for cost in self.modes if (cost.mode, cost.dtype) == (mode, dtype)), None)

    def with_modes(self, modes: Sequence[ModeCost]) -> Costs:
        """Return these costs and more modes."""
        return replace(self, modes=(*self.modes, *modes))


def fitted_profile(
    kernels: Json, measured: Sequence[Measured], hardware: Hardware, **facts: Any
) -> CalibrationProfile:
    """Fit the whole profile.

    Args:
        kernels: what the worker that runs kernels wrote.
        measured: every run of every job.
        facts: fields of the profile that were not measured.
    """
    rates = measured_rates(kernels, hardware, facts)
    disturbance = disturbance_of(measured)
    rests = rests_of(rates, measured, disturbance)
    costs = plain_costs(rests)
    costs = costs.with_modes(zero_costs(costs, rests))
    if hardware.device_kind == "cpu":  # offload=cpu uses the partition itself: no copy
        costs = costs.with_modes(copied(costs, CPU))
    cold = cold_factor(costs, rests)
    swap_s = bookkeeping_s(costs, rests)
    if any(rest.job.mode == "nvme" for rest in rests):
        costs = costs.with_modes(copied(costs, NVME, layer_s=swap_s))
    return replace(
        rates,
        disturbance=disturbance,
        yardstick_s=statistics.median(result["metrics"]["yardstick_s"] for *_, result in measured),
        families=costs.families,
        modes=costs.modes,
        cold_factor=cold,
        stream=stream_cost(swapped_rows(rests, cold * swap_s), rates.nvme_read_bytes_per_s),
        growth_bytes=growth(measured, hardware, rates.imported_rss_bytes),
        load=load_costs(measured, rates),
    )


def measured_rates(kernels: Json, hardware: Hardware, facts: Json) -> CalibrationProfile:
    """Stage 1: return a profile with rates and without costs."""
    return profile_from_document(
        {
            "version": PROFILE_VERSION,
            "families": [],
            "modes": [],
            "stream": None,
            "load": {},
            "growth_bytes": {},
            **kernels,
            **facts,
            "device_kind": hardware.device_kind,
            "device_name": hardware.device_name,
        }
    )


def plain_costs(rests: Sequence[Rest]) -> Costs:
    """Stage 2: fit plain transformers, in each dtype that ran."""
    plain = calmest(rest for rest in rests if rest.job.mode == "resident")
    modes = [_plain_loop(dtype, plain) for dtype in sorted({rest.job.dtype for rest in plain})]
    families = [cost for mode in modes for cost in family_costs(mode, plain)]
    return Costs(families=tuple(families), modes=tuple(modes))


def _plain_loop(dtype: str, plain: Sequence[Rest]) -> ModeCost:
    """Return the generation loop of plain transformers; its layers are the families' own cost."""
    steps = [rest for rest in plain if rest.job.dtype == dtype and not rest.is_prefill]
    return ModeCost(mode=RESIDENT, dtype=dtype, step_s=loop_s(steps), layer_s=0.0, part_s=0.0)


def loop_s(rests: Sequence[Rest]) -> float:
    """Return seconds of a pass without any layer.

    They are where a line through models of one family, which differ in their layers only, begins.
    """
    leaves = [rest for rest in rests if rest.job.leaf]
    families = {rest.job.family for rest in leaves if rest.job.layers == FEW_LAYERS}
    begins = [
        line((rest.job.layers, rest.calm_s) for rest in leaves if rest.job.family == family)[0]
        for family in sorted(families)
    ]
    return statistics.median(begins)


def family_costs(mode: ModeCost, plain: Sequence[Rest]) -> list[FamilyCost]:
    """Fit an operation from decode steps, and an element from prefills, for each family.

    The last entry is for families that were not measured: the median of the dense ones.
    """
    here = [rest for rest in plain if rest.job.dtype == mode.dtype]
    prefills = {rest.job.family: rest for rest in here if rest.is_prefill}
    steps = [rest for rest in here if not rest.is_prefill and rest.job.family in prefills]
    layers = max(rest.job.layers for rest in steps)
    found = [
        _family_cost(mode, rest, prefills[rest.job.family])
        for rest in steps
        if rest.job.layers == layers
    ]
    dense = [cost for cost in found if cost.model_type not in SPARSE_FAMILIES]
    any_family = FamilyCost(
        model_type=ANY_FAMILY,
        dtype=mode.dtype,
        op_s=statistics.median(cost.op_s for cost in dense),
        value_s=statistics.median(cost.value_s for cost in dense),
    )
    return [*found, any_family]


def _family_cost(mode: ModeCost, step: Rest, prefill: Rest) -> FamilyCost:
    operations = step.spec.layer_ops or 1.0
    op_s = max(0.0, (step.calm_s - mode.step_s) / step.job.layers / operations)
    spec, batch = prefill.spec, prefill.job.batch
    elementwise_s = prefill.calm_s - mode.step_s - spec.num_layers * (spec.layer_ops or 1.0) * op_s
    tokens = batch.batch_size * batch.prompt_tokens
    values = tokens * spec.num_layers * (spec.layer_values or 1.0)
    value_s = max(0.0, elementwise_s / values)
    return FamilyCost(model_type=step.job.family, dtype=mode.dtype, op_s=op_s, value_s=value_s)


def zero_costs(costs: Costs, rests: Sequence[Rest]) -> list[ModeCost]:
    """Stage 3: fit what ZeRO-3 adds, per mode.

    It was measured in one dtype and holds for all: it is Python, whatever the type.
    """
    dtypes = [cost.dtype for cost in costs.modes if cost.mode == RESIDENT]
    found: list[ModeCost] = []
    for where in sorted({rest.job.mode for rest in rests} - {"resident", "nvme"}):
        small = [rest for rest in rests if rest.job.mode == where and rest.is_small]
        added = _added_by_zero(costs, where, calmest(small))
        found += [replace(cost, dtype=dtype) for dtype in dtypes for cost in added]
    return found


def _added_by_zero(costs: Costs, where: str, rests: Sequence[Rest]) -> list[ModeCost]:
    """Fit ZeRO-3 when it fetches whole layers and, where it ran, module by module."""

    def plain_layers_s(rest: Rest) -> float:
        cost = costs.family(rest.spec)
        return rest.spec.num_layers * (rest.spec.layer_ops or 0.0) * cost.op_s if cost else 0.0

    added = [replace(rest, calm_s=rest.calm_s - plain_layers_s(rest)) for rest in rests]
    step_s, dtype = loop_s(added), rests[0].job.dtype

    def layer(rest: Rest, mode: Mode) -> tuple[float, float]:
        """Return (parts that are fetched, seconds) of one layer."""
        parts = layer_parts(rest.spec, zero_layout(rest.config, rest.spec), mode)
        return parts, (rest.calm_s - step_s) / rest.spec.num_layers

    whole, single = Mode(where), Mode(where, by_module=True)
    layers = max(rest.job.layers for rest in added)
    leaves = [rest for rest in added if rest.job.leaf and rest.job.layers == layers]
    layer_s, part_s = line(layer(rest, whole) for rest in leaves)
    found = [ModeCost(mode=whole, dtype=dtype, step_s=step_s, layer_s=layer_s, part_s=part_s)]
    modules = [layer(rest, single) for rest in added if not rest.job.leaf]
    if modules:
        part_s = statistics.median(max(0.0, seconds) / count for count, seconds in modules)
        found.append(ModeCost(mode=single, dtype=dtype, step_s=step_s, layer_s=0.0, part_s=part_s))
    return found


def copied(costs: Costs, target: Mode, *, layer_s: float = 0.0) -> list[ModeCost]:
    """Return the costs without offload as those of another target, with more for each layer."""
    return [
        replace(cost, mode=replace(cost.mode, where=target.where), layer_s=cost.layer_s + layer_s)
        for cost in costs.modes
        if cost.mode.where == NONE.where
    ]


def fixed_s(costs: Costs, rest: Rest, mode: Mode = NONE) -> float:
    """Return seconds of loop and layers of one pass, with warm caches."""
    family, cost = costs.family(rest.spec), costs.mode(mode, rest.spec.dtype)
    assert family is not None and cost is not None, "every family and mode of the jobs was fitted"
    layout = zero_layout(rest.config, rest.spec)
    return cost.step_s + layers_seconds(rest.spec, layout, family, cost)


def cold_factor(costs: Costs, rests: Sequence[Rest]) -> float:
    """Stage 4: return what fixed costs and products grow by where no cache holds the weights.

    For each such model divide its usual step by what its warm costs and its products should take;
    take the median, at least 1. It is one factor for both: fitted apart, they trade places from
    one calibration to the next.
    """
    ratios = []
    for rest in rests:
        if rest.job.mode != "none" or rest.is_small:
            continue
        family = costs.family(rest.spec)
        assert family is not None, "every family of the jobs was fitted"
        values = rest.job.batch.batch_size * (rest.spec.layer_values or 0.0) * rest.spec.num_layers
        should_s = fixed_s(costs, rest) + rest.products_s
        ratios.append((rest.usual_s + rest.products_s - family.value_s * values) / should_s)
    return max(1.0, statistics.median(ratios)) if ratios else 1.0


def bookkeeping_s(costs: Costs, rests: Sequence[Rest]) -> float:
    """Stage 5: return what offload=nvme adds to a layer of a model too small to be swapped."""
    small = calmest(rest for rest in rests if rest.job.mode == "nvme" and rest.is_small)
    added = [(rest.calm_s - fixed_s(costs, rest)) / rest.spec.num_layers for rest in small]
    return max(0.0, statistics.median(added)) if added else 0.0


def swapped_rows(rests: Sequence[Rest], layer_s: float) -> list[tuple[int, int, float]]:
    """Compare each model that is swapped with the same one that is not offloaded.

    Args:
        layer_s: what bookkeeping adds to a layer of such a model.

    Returns:
        (swapped parameters, their bytes, seconds that swapping added to a step) of each run.
    """
    rows = []
    for rest in rests:
        if rest.job.mode != "nvme":
            continue
        layout = zero_layout(rest.config, rest.spec)
        twin = replace(rest.job, mode="none")
        resident_s = [other.usual_s for other in rests if same_job(other.job, twin)]
        if layout.swapped_numel and resident_s:
            waiting_s = (
                rest.usual_s - statistics.median(resident_s) - rest.spec.num_layers * layer_s
            )
            size = layout.swapped_numel * layout.itemsize_bytes
            rows.append((layout.swapped_count, size, waiting_s))
    return rows


def stream_cost(
    rows: Sequence[tuple[int, int, float]], handle_bytes_per_s: float | None
) -> StreamCost | None:
    """Fit the wait for each swapped parameter; its bytes are read at the rate of the handle alone.

    What swapping added beyond that rate is divided by the parameters. The median of the models
    counts, at least 0. With two unknowns they would trade places between calibrations.

    Args:
        rows: (swapped parameters, their bytes, seconds that swapping added) of each model.
    """
    if not rows or not handle_bytes_per_s:
        return None
    waits_s = [(seconds - size / handle_bytes_per_s) / count for count, size, seconds in rows]
    return StreamCost(
        parameter_s=max(0.0, statistics.median(waits_s)), bytes_per_s=handle_bytes_per_s
    )
