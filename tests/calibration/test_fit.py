"""Fixed costs are found again in passes that were made of them, from all jobs or from few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.composing import composed
from tests.helpers.planning import profile
from zinfer.calibration.fit import fitted_profile
from zinfer.calibration.measure import job_config
from zinfer.calibration.rests import is_prefill
from zinfer.job.calibration import DISK, ESSENTIAL, LARGE, Job, jobs
from zinfer.machine.hardware import detect_hardware
from zinfer.machine.measured import Mode
from zinfer.machine.profile_files import document_of
from zinfer.model.spec import model_spec
from zinfer.plan.kv_seconds import attention_seconds
from zinfer.plan.prediction import (
    elementwise_seconds,
    layer_parts,
)
from zinfer.plan.product_seconds import products_seconds
from zinfer.plan.zero_layout import zero_layout

RATES = profile()
LOOP_S, OP_S, VALUE_S = 0.003, 2e-6, 3e-9
ZERO_STEP_S, ZERO_LAYER_S, ZERO_PART_S, ZERO_MODULE_S = 0.004, 5e-4, 2e-5, 9e-5
NVME_LAYER_S, NVME_PARAMETER_S = 1e-4, 2e-4


def pass_s(job: Job) -> float:
    """Return the seconds of one pass, put together from kernels and the costs above."""
    config = job_config(job, composed("hardware.accelerator=cpu", "offload=nvme"))
    spec, batch = model_spec(config.model, compute_dtype=job.dtype), job.batch
    layout = zero_layout(config, spec)
    prefill = is_prefill(job)
    new = batch.prompt_tokens if prefill else 1
    context = float(new) if prefill else batch.prompt_tokens + batch.new_tokens / 2
    rows = batch.batch_size
    seconds = products_seconds(spec, config, RATES, rows, new) or 0.0
    seconds += attention_seconds(spec, RATES, rows, new, context)
    seconds += elementwise_seconds(spec, VALUE_S if job.hidden > 64 else 0.0, RATES, rows, new)
    layer_s = OP_S * (spec.layer_ops or 0.0)
    if job.mode == "resident":
        return seconds + LOOP_S + spec.num_layers * layer_s
    if job.leaf:
        layer_s += ZERO_LAYER_S + ZERO_PART_S * layer_parts(spec, layout, Mode("none"))
    else:
        parts = layer_parts(spec, layout, Mode("none", by_module=True))
        layer_s += ZERO_MODULE_S * parts
    seconds += ZERO_STEP_S + spec.num_layers * layer_s
    if job.mode == "nvme":
        seconds += spec.num_layers * NVME_LAYER_S + layout.swapped_count * NVME_PARAMETER_S
        seconds += layout.swapped_numel * layout.itemsize_bytes / READ_BYTES_PER_S
    return seconds


READ_BYTES_PER_S = 2e9
KERNELS: dict[str, Any] = {
    **{
        name: document_of(RATES)[name]
        for name in (
            "host_read", "host_copy", "device_read", "host_to_device_pageable",
            "host_to_device_pinned", "device_to_host_pinned", "kernels", "dequantise", "attention",
            "attention_flops", "imported_rss_bytes",
        )
    },
    "nvme": [
        {
            "operation": "read",
            "block_bytes": 1 << 20,
            "queue_depth": 16,
            "intra_op_parallelism": 4,
            "rate": {"median": READ_BYTES_PER_S, "spread": 0.0},
        }
    ],
}  # fmt: skip


def measured(job: Job) -> tuple[Job, Any, dict[str, Any]]:
    seconds = pass_s(job)
    sample = {"kind": "timed", "prefill_s": seconds, "decode_step_s": [seconds] * 11}
    metrics = {"yardstick_s": 0.01, "peak_host_rss_bytes": 600 << 20, "load_s": 0.5}
    config = job_config(job, composed("hardware.accelerator=cpu", "offload=nvme"))
    return job, config, {"samples": [sample, sample], "metrics": metrics}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "families"),
    [
        (lambda job: True, {"llama", "opt", "bloom", "mixtral", "*"}),
        (lambda job: job.group in (ESSENTIAL, LARGE, DISK), {"llama", "opt", "*"}),
        (lambda job: job.group == ESSENTIAL, {"llama", "opt", "*"}),
    ],
)
def test_costs_are_found_again(chosen: Callable[[Job], bool], families: set[str]) -> None:
    ran = [job for job in jobs(("float32",), nvme=True, cpu_offload=False) if chosen(job)]
    groups = {job.group for job in ran}
    hardware = detect_hardware(composed("hardware.accelerator=cpu").hardware, None, 1)
    found = fitted_profile(
        KERNELS,
        [measured(job) for job in ran],
        hardware,
        created="2026-01-01T00:00:00Z",
        fingerprint="0" * 12,
        threads=1,
        seconds=1.0,
    )
    assert {cost.model_type for cost in found.families} == families
    for cost in found.families:
        assert cost.op_s == pytest.approx(OP_S), cost.model_type
        assert cost.value_s == pytest.approx(VALUE_S, rel=0.02), cost.model_type
    zero = found.mode_cost(Mode("none"), "float32")
    assert zero is not None
    assert zero.step_s == pytest.approx(ZERO_STEP_S)
    assert zero.layer_s == pytest.approx(ZERO_LAYER_S)
    assert zero.part_s == pytest.approx(ZERO_PART_S)
    assert found.mode_cost(Mode("cpu"), "float32") is not None
    single = found.mode_cost(Mode("none", by_module=True), "float32")
    assert (single is None) == ("fetching module by module" not in groups)
    if single is not None:
        assert single.part_s == pytest.approx(ZERO_MODULE_S)
    assert found.cold_factor == pytest.approx(1.0, abs=0.01)
    assert (found.disturbance, found.yardstick_s) == (1.0, 0.01)
    nvme = found.mode_cost(Mode("nvme"), "float32")
    assert (nvme is None) == (DISK not in groups) == (found.stream is None)
    if nvme is not None and found.stream is not None:
        assert nvme.layer_s == pytest.approx(ZERO_LAYER_S + NVME_LAYER_S)
        assert found.stream.parameter_s == pytest.approx(NVME_PARAMETER_S)
