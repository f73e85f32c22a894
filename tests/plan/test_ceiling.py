"""The ceiling against arithmetic by hand."""

from __future__ import annotations

import dataclasses

import pytest

from tests.helpers.composing import composed
from zinfer.config import RunConfig
from zinfer.machine.hardware import Hardware, detect_hardware
from zinfer.machine.profile import (
    CalibrationProfile,
    DequantiseTime,
    FamilyCost,
    KernelTime,
    LoadCost,
    ModeCost,
    Rate,
    StreamCost,
)
from zinfer.model.spec import ModelSpec, model_spec
from zinfer.plan.ceiling import (
    Ceiling,
    ceiling,
    implied_bandwidth_bytes_per_s,
    matrix_products,
    pass_flops,
    touched_experts,
)
from zinfer.plan.memory import memory_plan
from zinfer.plan.prediction import (
    predict,
    quantised_matrices,
    scored,
    speed_warnings,
    tokens_of_experts,
)


def planned(*overrides: str) -> tuple[ModelSpec, RunConfig, Hardware]:
    config = composed(*overrides)
    spec = model_spec(
        config.model, compute_dtype=None if config.dtype.compute == "auto" else config.dtype.compute
    )
    return spec, config, detect_hardware(config.hardware, None)


def bound(*overrides: str) -> Ceiling:
    return ceiling(*planned(*overrides))


def test_products_of_opt_are_those_of_the_paper() -> None:
    """OPT-125m: 12 layers of four 768 x 768 and two 768 x 3072 matrices, and a head of 50,272 x 768 that is the embedding."""
    spec, _, _ = planned("model=opt-125m")
    products = matrix_products(spec)
    assert dict(products.dense) == {768 * 768: 48, 768 * 3072: 24}
    assert products.head == 50_272 * 768
    assert not products.experts


def test_operations_of_a_decode_step_are_two_for_each_weight_and_four_for_each_pair() -> None:
    spec, _, _ = planned("model=opt-125m")
    weights = 48 * 768 * 768 + 24 * 768 * 3072 + 50_272 * 768
    assert pass_flops(spec, 1, 1, 100) == 2 * weights + 4 * 12 * 12 * 64 * 100
    assert pass_flops(spec, 8, 1, 100) == 8 * pass_flops(spec, 1, 1, 100)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0.0), (1, 2.0), (2, 8 * (1 - 0.75**2)), (1000, 8.0)]
)
def test_a_batch_touches_the_experts_that_chance_gives_it(tokens: int, expected: float) -> None:
    spec, _, _ = planned("model=mixtral-8x7b")
    assert touched_experts(spec, tokens) == pytest.approx(expected)


def test_experts_are_counted_once_for_each_layer_and_role() -> None:
    """Mixtral-8x7B: 32 layers; gate and up are fused [8, 28672, 4096], down is [8, 4096, 14336]."""
    spec, _, _ = planned("model=mixtral-8x7b")
    assert dict(matrix_products(spec).experts) == {28_672 * 4096: 32, 4096 * 14_336: 32}


def test_weights_in_host_memory_are_bound_by_the_link() -> None:
    """OPT-30B float16: 59.95 GB over PCIe 3.0 x16 (15.75 GB/s), less the small parameters that stay."""
    result = bound("model=opt-30b", "offload=cpu", "dtype=float16", "hardware=v100")
    assert result.decode_step.binding == "host_device_link"
    assert result.decode_step.ceiling_s == pytest.approx(29_974_540_288 * 2 / 15.75e9, rel=0.001)


def test_weights_on_the_device_are_bound_by_its_memory() -> None:
    """LLaMA-3-8B bfloat16 on 3.9 TB/s: the weights less the embedding, which is a lookup, and the cache."""
    result = bound("model=llama-3-8b", "offload=none", "dtype=bfloat16", "hardware=h100_2nvme")
    read = (8_030_261_248 - 128_256 * 4096) * 2
    assert result.decode_step.binding == "device_memory"
    assert result.decode_step.ceiling_s == pytest.approx(read / 3.9e12, rel=0.01)
    assert result.streamed_bytes == 0


def test_a_large_prefill_is_bound_by_arithmetic() -> None:
    result = bound(
        "model=llama-3-8b",
        "offload=cpu",
        "dtype=float16",
        "hardware=t4",
        "batch.batch_size=64",
        "batch.prompt_tokens=512",
        "batch.new_tokens=2",
    )
    assert result.prefill.binding == "device_compute"
    assert result.prefill.ceiling_s == pytest.approx(2 * 6.98e9 * 64 * 512 / 65e12, rel=0.05)


def test_tokens_per_second_are_those_of_one_prefill_and_the_steps() -> None:
    result = bound(
        "model=opt-30b",
        "offload=cpu",
        "dtype=float16",
        "hardware=a6000",
        "batch.batch_size=4",
        "batch.new_tokens=32",
    )
    assert result.prefill.ceiling_s is not None and result.decode_step.ceiling_s is not None
    seconds = result.prefill.ceiling_s + 31 * result.decode_step.ceiling_s
    assert result.generated_tokens_per_s == pytest.approx(4 * 32 / seconds)


def test_the_implied_bandwidth_of_a_published_row() -> None:
    """BLOOM-176B, batch 8, 0.291 tokens/s: 352.5 GB every 27.5 s."""
    assert implied_bandwidth_bytes_per_s(176_247_271_424 * 2, 0.291, 8) / 1e9 == pytest.approx(
        12.82, abs=0.01
    )


def profile() -> CalibrationProfile:
    """A machine where everything is round: 10 GFLOP/s whatever the shape, 10 GB/s, 1 ms a layer."""
    rows = (1, 16, 256)
    numels = (4096, 65_536, 1_048_576)
    kernels = tuple(
        KernelTime(
            dtype="float32", rows=m, weight_numel=n, wide=wide, seconds=2 * m * n / 10e9, spread=0.0
        )
        for m in rows
        for n in numels
        for wide in (False, True)
    )
    ten = Rate(median=10e9, spread=0.0)
    return CalibrationProfile(
        created="2026-01-01T00:00:00Z", fingerprint="0" * 12, threads=1, device_kind="cpu", device_name="round", seconds=60.0,
        host_read=ten, host_copy=ten, device_read=None, host_to_device_pageable=None, host_to_device_pinned=None,
        device_to_host_pinned=None,
        kernels=kernels, attention={"float32": ten}, attention_flops={"float32": ten},
        families=(FamilyCost(model_type="*", dtype="float32", op_s=1e-6, value_s=0.0),),
        modes=tuple(
            ModeCost(mode=mode, dtype="float32", step_s=0.002, layer_s=0.001, part_s=part_s)
            for mode, part_s in (("none", 1e-5), ("nvme", 1e-5), ("none, by module", 1e-4), ("nvme, by module", 1e-4))
        ),
        stream=StreamCost(parameter_s=0.0005, bytes_per_s=1e9), load={"none": LoadCost(fixed_s=0.5, parameter_s=0.001, bytes_per_s=1e9)},
        imported_rss_bytes=500 << 20,
    )  # fmt: skip


def test_a_calibrated_prediction_is_the_sum_of_its_parts() -> None:
    spec, config, hardware = planned(
        "model=tiny-llama", "dtype=float32", "hardware.accelerator=cpu"
    )
    hardware = dataclasses.replace(
        hardware, profile=profile(), device_flops_per_s={}, host_memory_bytes_per_s=None
    )
    hardware = dataclasses.replace(hardware, device_memory_bytes_per_s=None)
    said = predict(spec, config, hardware)
    products = matrix_products(spec)
    multiplied = sum(numel * count for numel, count in products.dense.items()) + products.head
    assert spec.layer_ops == 111
    assert said.parts["layers"] == pytest.approx(
        3 * (111 * 1e-6 + 0.001 + 9 * 1e-5)
    )  # nine parameters a layer
    assert said.parts["loop"] == pytest.approx(0.002)
    assert said.parts["matrix products"] == pytest.approx(2 * multiplied / 10e9, rel=1e-6)
    assert said.decode_step_s == pytest.approx(sum(said.parts.values()))
    assert said.load_s == pytest.approx(0.5 + (3 * 9 + 3) * 0.001 + spec.num_parameters * 4 / 1e9)


def test_a_prediction_is_of_a_usual_run_on_a_machine_that_others_use() -> None:
    spec, config, hardware = planned(
        "model=tiny-llama", "dtype=float32", "hardware.accelerator=cpu"
    )
    alone = predict(spec, config, dataclasses.replace(hardware, profile=profile()))
    shared = predict(
        spec,
        config,
        dataclasses.replace(hardware, profile=dataclasses.replace(profile(), disturbance=1.2)),
    )
    assert alone.decode_step_s is not None and alone.prefill_s is not None
    assert shared.decode_step_s == pytest.approx(1.2 * alone.decode_step_s)
    assert shared.prefill_s == pytest.approx(1.2 * alone.prefill_s)


def test_weights_that_no_cache_holds_make_what_is_fixed_and_thin_products_dearer() -> None:
    cold = dataclasses.replace(profile(), cold_factor=1.5)
    for model, beyond in (("tiny-llama", False), ("opt-125m", True)):
        spec, config, hardware = planned(
            f"model={model}", "dtype=float32", "hardware.accelerator=cpu", "batch.prompt_tokens=65"
        )
        before = predict(spec, config, dataclasses.replace(hardware, profile=profile()))
        after = predict(spec, config, dataclasses.replace(hardware, profile=cold))
        for part, factor in (
            ("loop", 1.5),
            ("layers", 1.5),
            ("matrix products", 1.5),
            ("attention", 1.0),
        ):
            assert after.parts[part] == pytest.approx(
                before.parts[part] * (factor if beyond else 1.0)
            ), part
        assert before.prefill_s is not None and after.prefill_s is not None
        fixed_s = 0.5 * (before.parts["loop"] + before.parts["layers"]) if beyond else 0.0
        assert after.prefill_s - before.prefill_s == pytest.approx(
            fixed_s, abs=1e-9
        )  # 65 rows and more are not thin


def test_fetching_module_by_module_costs_each_module() -> None:
    spec, config, hardware = planned(
        "model=tiny-llama", "dtype=float32", "hardware.accelerator=cpu", "zero.leaf_layers=false"
    )
    said = predict(spec, config, dataclasses.replace(hardware, profile=profile()))
    assert spec.layer_modules == 13
    assert said.parts["layers"] == pytest.approx(3 * (111 * 1e-6 + 0.001 + 13 * 1e-4))


@pytest.mark.parametrize("leaf", ["null", "false"])
def test_every_parameter_that_is_read_costs_a_wait_and_its_bytes(leaf: str) -> None:
    """OPT-125m in float32: six matrices of each of 12 layers are swapped, and both embeddings (50,272 and 2,050 x 768)."""
    spec, config, hardware = planned(
        "model=opt-125m",
        "dtype=float32",
        "offload=nvme",
        "hardware.accelerator=cpu",
        f"zero.leaf_layers={leaf}",
    )
    said = predict(
        spec, config, dataclasses.replace(hardware, profile=profile(), host_available_bytes=None)
    )
    swapped = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + (50_272 + 2050) * 768
    assert said.parts["streaming"] == pytest.approx((12 * 6 + 2) * 0.0005 + swapped * 4 / 1e9)


def test_quantised_matrices_are_unpacked_at_every_use() -> None:
    """int8 at 1 ns an element: every linear weight and the untied embedding and head, once each; fetched module by module."""
    spec, config, hardware = planned("model=tiny-llama", "dtype=int8", "hardware.accelerator=cpu")
    spec = dataclasses.replace(spec, dtype="float32")  # what the round machine was measured in
    times = tuple(
        DequantiseTime(bits=8, dtype="float32", weight_numel=n, seconds=n * 1e-9, spread=0.0)
        for n in (1024, 1_048_576)
    )
    said = predict(
        spec,
        config,
        dataclasses.replace(hardware, profile=dataclasses.replace(profile(), dequantise=times)),
    )
    matrices = sum(parameter.numel for parameter in spec.parameters if len(parameter.shape) == 2)
    assert not spec.tied_embeddings
    assert said.parts["dequantisation"] == pytest.approx(matrices * 1e-9, rel=1e-6)
    assert said.parts["layers"] == pytest.approx(3 * (111 * 1e-6 + 0.001 + 13 * 1e-4))
    assert said.load_s is None


def test_a_tied_head_is_unpacked_twice() -> None:
    spec, _, _ = planned("model=opt-125m", "dtype=int4", "hardware.accelerator=cpu")
    assert spec.tied_embeddings
    assert quantised_matrices(spec) == {
        50_272 * 768: (2, 0),
        768 * 768: (12 * 4, 0),
        768 * 3072: (12 * 2, 0),
    }


def test_what_nobody_measured_is_not_predicted() -> None:
    for overrides in (("dtype=int4",), ("launcher.ranks=2", "batch.batch_size=2")):
        spec, config, hardware = planned("model=tiny-llama", "hardware.accelerator=cpu", *overrides)
        said = predict(spec, config, dataclasses.replace(hardware, profile=profile()))
        assert said.decode_step_s is None and said.generated_tokens_per_s is None


@pytest.mark.parametrize("tokens", [1, 4, 64, 65])
@pytest.mark.parametrize(
    "model", ["tiny-mixtral", "deepseek-v3"]
)  # 65 tokens touch 223 of the latter's 256 experts
def test_experts_of_every_number_of_tokens_add_up_to_those_touched_and_to_all_tokens(
    model: str, tokens: int
) -> None:
    spec, *_ = planned(f"model={model}", "dtype=bfloat16", "hardware=a6000")
    assert spec.num_experts and spec.experts_per_token
    spread = list(tokens_of_experts(spec, tokens))
    assert sum(experts for _, experts in spread) == pytest.approx(touched_experts(spec, tokens))
    assert sum(each * experts for each, experts in spread) == pytest.approx(
        tokens * spec.experts_per_token
    )


def test_a_run_is_scored_against_its_prediction() -> None:
    spec, config, hardware = planned(
        "model=opt-30b", "offload=nvme", "dtype=float16", "hardware=a6000"
    )
    said = predict(spec, config, hardware)
    plan = memory_plan(spec, config, hardware)
    metrics = {
        "decode_step_s": 12.0,
        "generated_tokens_per_s": 0.05,
        "peak_host_rss_bytes": float(plan.peak_host_rss_bytes),
    }
    found = scored(metrics, said, plan)
    assert found["prediction_ratio_peak_host_rss"] == 1.0
    assert found["streamed_bytes_per_s"] == pytest.approx(said.ceiling.streamed_bytes / 12.0)
    assert found["ceiling_fraction"] == pytest.approx(
        0.05 / (said.ceiling.generated_tokens_per_s or 0)
    )
    assert "predicted_generated_tokens_per_s" not in found
    assert "slowdown" not in found  # data sheets say nothing of the yardstick


@pytest.mark.parametrize(
    ("yardstick_s", "slowdown", "words"),
    [
        (0.011, 1.1, None),
        (0.015, 1.5, "1.5 times slower while this ran"),
        (0.005, 0.5, "2.0 times faster while this ran"),
    ],
)
def test_a_run_on_a_machine_that_was_slower_then_says_so(
    yardstick_s: float, slowdown: float, words: str | None
) -> None:
    spec, config, hardware = planned(
        "model=tiny-llama", "dtype=float32", "hardware.accelerator=cpu"
    )
    said = predict(
        spec,
        config,
        dataclasses.replace(hardware, profile=dataclasses.replace(profile(), yardstick_s=0.01)),
    )
    assert said.generated_tokens_per_s is not None
    metrics = {
        "generated_tokens_per_s": said.generated_tokens_per_s / 1.2,
        "yardstick_s": yardstick_s,
    }
    found = scored(metrics, said, memory_plan(spec, config, hardware))
    assert found["slowdown"] == pytest.approx(slowdown)
    assert found["prediction_ratio_tokens_per_s"] == pytest.approx(1.2)
    assert found["prediction_ratio_tokens_per_s_at_speed"] == pytest.approx(1.2 / slowdown)
    warnings = list(speed_warnings(found))
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]
