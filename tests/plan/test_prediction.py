"""Predicted times against arithmetic by hand, on a machine whose numbers are round."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.planning import planned, profile
from zinfer.machine.measured import DequantiseTime
from zinfer.plan.planned import plan_run
from zinfer.plan.product_seconds import quantised_matrices, tokens_of_experts
from zinfer.plan.products import matrix_products, touched_experts
from zinfer.plan.scores import scored, speed_warnings

TINY = ("model=tiny-llama", "dtype=float32", "hardware.accelerator=cpu")


def test_a_calibrated_prediction_is_the_sum_of_its_parts() -> None:
    run = planned(
        *TINY,
        "zero.leaf_layers=true",
        profile=profile(),
        device_flops_per_s={},
        host_memory_bytes_per_s=None,
        device_memory_bytes_per_s=None,
    )
    spec, said = run.spec, run.prediction
    products = matrix_products(spec)
    multiplied = sum(numel * count for numel, count in products.dense.items()) + products.head
    assert spec.layer_ops == 111
    nine_parameters_a_layer = 3 * (111 * 1e-6 + 0.001 + 9 * 1e-5)
    assert said.parts["layers"] == pytest.approx(nine_parameters_a_layer)
    assert said.parts["loop"] == pytest.approx(0.002)
    assert said.parts["matrix products"] == pytest.approx(2 * multiplied / 10e9, rel=1e-6)
    assert said.decode_step_s == pytest.approx(sum(said.parts.values()))
    assert said.load_s == pytest.approx(0.5 + (3 * 9 + 3) * 0.001 + spec.num_parameters * 4 / 1e9)


def test_a_prediction_is_of_a_usual_run_on_a_machine_that_others_use() -> None:
    alone = planned(*TINY, profile=profile()).prediction
    shared = planned(*TINY, profile=profile(disturbance=1.2)).prediction
    assert alone.decode_step_s is not None and alone.prefill_s is not None
    assert shared.decode_step_s == pytest.approx(1.2 * alone.decode_step_s)
    assert shared.prefill_s == pytest.approx(1.2 * alone.prefill_s)


@pytest.mark.parametrize(("model", "factor"), [("tiny-llama", 1.0), ("opt-125m", 1.5)])
def test_weights_that_no_cache_holds_make_what_is_fixed_and_thin_products_dearer(
    model: str, factor: float
) -> None:
    overrides = (f"model={model}", *TINY[1:], "batch.prompt_tokens=65")
    before = planned(*overrides, profile=profile()).prediction
    after = planned(*overrides, profile=profile(cold_factor=1.5)).prediction
    for part in ("loop", "layers", "matrix products"):
        assert after.parts[part] == pytest.approx(factor * before.parts[part]), part
    assert after.parts["attention"] == pytest.approx(before.parts["attention"])
    assert before.prefill_s is not None and after.prefill_s is not None
    fixed_s = (factor - 1) * (before.parts["loop"] + before.parts["layers"])
    grown_s = after.prefill_s - before.prefill_s
    assert grown_s == pytest.approx(fixed_s, abs=1e-9)  # 65 rows and more are not thin


def test_fetching_module_by_module_costs_each_module() -> None:
    run = planned(*TINY, "zero.leaf_layers=false", profile=profile())
    assert run.spec.layer_modules == 13
    thirteen_modules_a_layer = 3 * (111 * 1e-6 + 0.001 + 13 * 1e-4)
    assert run.prediction.parts["layers"] == pytest.approx(thirteen_modules_a_layer)


@pytest.mark.parametrize("leaf", ["null", "false"])
def test_every_parameter_that_is_read_costs_a_wait_and_its_bytes(leaf: str) -> None:
    """OPT-125m in float32: six matrices of each of 12 layers are swapped, and both embeddings.

    Those are 50,272 and 2,050 x 768.
    """
    run = planned(
        "model=opt-125m",
        *TINY[1:],
        "offload=nvme",
        f"zero.leaf_layers={leaf}",
        profile=profile(),
        host_available_bytes=None,
    )
    swapped = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + (50_272 + 2050) * 768
    streaming_s = (12 * 6 + 2) * 0.0005 + swapped * 4 / 1e9
    assert run.prediction.parts["streaming"] == pytest.approx(streaming_s)


def test_quantised_matrices_are_unpacked_at_every_use() -> None:
    """int8 at 1 ns an element: every linear weight and the untied embedding and head, once each.

    Quantised layers are fetched module by module.
    """
    times = tuple(
        DequantiseTime(bits=8, dtype="float32", weight_numel=n, seconds=n * 1e-9, spread=0.0)
        for n in (1024, 1_048_576)
    )
    overrides = (TINY[0], "dtype=int8", "zero=paper", TINY[2])
    run = planned(*overrides, profile=profile(dequantise=times))
    in_the_measured_type = replace(run.spec, dtype="float32")
    run = plan_run(run.config, run.hardware, in_the_measured_type)
    matrices = sum(
        parameter.numel for parameter in run.spec.parameters if len(parameter.shape) == 2
    )
    assert not run.spec.tied_embeddings
    parts = run.prediction.parts
    assert parts["dequantisation"] == pytest.approx(matrices * 1e-9, rel=1e-6)
    assert parts["layers"] == pytest.approx(3 * (111 * 1e-6 + 0.001 + 13 * 1e-4))
    assert run.prediction.load_s is None


def test_a_tied_head_is_unpacked_twice() -> None:
    spec = planned("model=opt-125m", "dtype=int4", "hardware.accelerator=cpu").spec
    assert spec.tied_embeddings
    assert quantised_matrices(spec) == {
        50_272 * 768: (2, 0),
        768 * 768: (12 * 4, 0),
        768 * 3072: (12 * 2, 0),
    }


@pytest.mark.parametrize("overrides", [("dtype=int4",), ("launcher.ranks=2", "batch.batch_size=2")])
def test_what_nobody_measured_is_not_predicted(overrides: tuple[str, ...]) -> None:
    said = planned(TINY[0], TINY[2], *overrides, profile=profile()).prediction
    assert said.decode_step_s is None and said.generated_tokens_per_s is None


@pytest.mark.parametrize("tokens", [1, 4, 64, 65])
@pytest.mark.parametrize(
    "model", ["tiny-mixtral", "deepseek-v3"]
)  # 65 tokens touch 223 of the latter's 256 experts
def test_experts_of_every_number_of_tokens_add_up_to_those_touched_and_to_all_tokens(
    model: str, tokens: int
) -> None:
    spec = planned(f"model={model}", "dtype=bfloat16", "hardware=a6000").spec
    assert spec.num_experts and spec.experts_per_token
    spread = list(tokens_of_experts(spec, tokens))
    touched = sum(experts for _, experts in spread)
    used = sum(each * experts for each, experts in spread)
    assert touched == pytest.approx(touched_experts(spec, tokens))
    assert used == pytest.approx(tokens * spec.experts_per_token)


def test_a_run_is_scored_against_its_prediction() -> None:
    run = planned("model=opt-30b", "offload=nvme", "dtype=float16", "hardware=a6000")
    metrics = {
        "decode_step_s": 12.0,
        "generated_tokens_per_s": 0.05,
        "peak_host_rss_bytes": float(run.plan.peak_host_rss_bytes),
    }
    found = scored(metrics, run.prediction, run.plan)
    ceiling = run.prediction.ceiling
    assert found["prediction_ratio_peak_host_rss"] == 1.0
    assert found["streamed_bytes_per_s"] == pytest.approx(ceiling.streamed_bytes / 12.0)
    assert found["ceiling_fraction"] == pytest.approx(0.05 / (ceiling.generated_tokens_per_s or 0))
    assert "predicted_generated_tokens_per_s" not in found
    assert "slowdown" not in found  # data sheets say nothing of the yardstick


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_effective_rates_are_bytes_of_a_token_times_tokens_per_s(
    offload: str, batch_size: int
) -> None:
    run = planned(
        "model=opt-30b", f"offload={offload}", "hardware=a6000", "dtype=float16",
        f"batch.batch_size={batch_size}",
        *(["offload.nvme_path=/nvme"] if offload == "nvme" else []),
    )  # fmt: skip
    demand = run.prediction.ceiling.decode_step.demand
    found = scored({"decode_tokens_per_s": 2.0 * batch_size}, run.prediction, run.plan)
    moved = {
        "nvme": demand.nvme_bytes,
        "link": demand.host_device_link_bytes,
        "host_memory": demand.host_memory_bytes,
        "device_memory": demand.device_memory_bytes,
    }
    for name, count in moved.items():
        assert found.get(f"predicted_{name}_bytes_per_token", 0) == pytest.approx(
            count / batch_size
        )
        assert found.get(f"effective_{name}_bytes_per_s", 0) == pytest.approx(2.0 * count)
    assert bool(demand.nvme_bytes) == (offload == "nvme")
    read = {"decode_tokens_per_s": 3.0, "nvme_read_bytes_per_token": 5e9}
    measured = scored(read, run.prediction, run.plan).get("effective_nvme_bytes_per_s")
    assert measured == (15e9 if offload == "nvme" else None), "bytes that were read win"
    assert "effective_link_bytes_per_s" not in scored({}, run.prediction, run.plan)


@pytest.mark.parametrize(
    ("yardstick_s", "slowdown", "words"),
    [
        (0.011, 1.1, None),
        (0.015, 1.5, None),  # the verdict on its stability says that
        (0.005, 0.5, "2.0 times faster while this ran"),
    ],
)
def test_a_run_on_a_machine_that_was_slower_then_says_so(
    yardstick_s: float, slowdown: float, words: str | None
) -> None:
    run = planned(*TINY, profile=profile(yardstick_s=0.01))
    predicted = run.prediction.generated_tokens_per_s
    assert predicted is not None
    metrics = {"generated_tokens_per_s": predicted / 1.2, "yardstick_s": yardstick_s}
    found = scored(metrics, run.prediction, run.plan)
    assert found["slowdown"] == pytest.approx(slowdown)
    assert found["prediction_ratio_tokens_per_s"] == pytest.approx(1.2)
    assert found["prediction_ratio_tokens_per_s_at_speed"] == pytest.approx(1.2 / slowdown)
    warnings = list(speed_warnings(found))
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]
