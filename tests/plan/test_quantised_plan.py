"""Packed weights in the plan: their bytes, what reading them costs, and what they gain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.planning import planned, profile
from zinfer.machine.measured import PackedTime
from zinfer.machine.profile import CalibrationProfile
from zinfer.model.quantisable import stored_bits
from zinfer.model.quantisable import stored_numel as own_stored_numel
from zinfer.plan import dtype_advice
from zinfer.plan.dtype_advice import fewer_bits, measured_quality
from zinfer.plan.page import fewer_bits_lines
from zinfer.plan.planned import Planned
from zinfer.plan.products import stored_products, touched_weight_bytes, unpacked_weight_bytes
from zinfer.plan.tiers import ItemKind
from zinfer.plan.warnings import plan_warnings

FAMILIES = ("llama-2-7b", "opt-1.3b", "bloom-560m", "mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b")
CPU = "hardware.accelerator=cpu"


def rows(run: Planned, tier: Any) -> dict[str, int]:
    """Return the tier's items that are weights: name -> bytes."""
    items = run.plan.tier(tier).items
    return {item.name: item.bytes for item in items if item.kind is ItemKind.WEIGHTS}


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("model", FAMILIES)
def test_packed_and_kept_weights_have_a_row_each_and_add_up(model: str, weights: str) -> None:
    run = planned(f"model={model}", f"dtype={weights}", "offload=none", "hardware=h100_2nvme")
    found = rows(run, "device")
    kept = found.pop(f"weights kept in {run.spec.dtype}")
    assert list(found) == ["weights in int8" if weights == "int8" else "weights in int8 and int4"]
    assert sum(found.values()) + kept == run.plan.weight_stored_bytes
    expected = sum(own_stored_numel(each, run.config.dtype, 2) for each in run.spec.parameters)
    assert run.plan.weight_stored_bytes == expected * 2
    unpacked = [each for each in run.spec.parameters if not stored_bits(each, run.config.dtype)]
    assert kept == 2 * sum(each.numel for each in unpacked)


def test_where_all_is_stored_in_four_bits_the_row_says_so() -> None:
    run = planned("model=opt-1.3b", "dtype=int4", "dtype.eight_bits=[]", "offload=none", CPU)
    assert "weights in int4" in rows(run, "device")


@pytest.mark.parametrize("tier", ["host", "device"])
def test_the_plain_model_holds_what_zero_holds(tier: Any) -> None:
    common = ("model=opt-1.3b", "dtype=int8", "offload=none", CPU)
    resident = planned(*common, "engine=resident")
    assert rows(resident, tier) == rows(planned(*common), tier)


def test_ranks_share_packed_and_kept_weights() -> None:
    run = planned(
        "model=opt-1.3b", "dtype=int8", "offload=cpu", "launcher.ranks=2", "batch.batch_size=2", CPU
    )
    shared = rows(run, "host")
    assert sum(shared.values()) == pytest.approx(run.plan.weight_stored_bytes / 2, rel=1e-6)


def test_a_step_reads_stored_bytes_and_lookups_read_none() -> None:
    """Keep the embedding of an untied model: a step does not read it, whatever its bytes."""
    keep = "dtype.keep=[embeddings]"
    run = planned("model=llama-2-7b", "dtype=int8", keep, "offload=none", "hardware=h100_2nvme")
    embedding = 32_000 * 4096
    read = touched_weight_bytes(run.spec, run.config, 1)
    packed = run.spec.num_parameters - embedding - 65 * 4096
    assert read == packed * (1 + 4 / 64)


def test_experts_of_one_tensor_are_read_by_the_expert() -> None:
    run = planned("model=mixtral-8x7b", "dtype=int4", "offload=none", "hardware=h100_2nvme")
    products = stored_products(run.spec, run.config)
    each = {matrix.numel: matrix for matrix in products.experts}[4096 * 14_336]
    assert each.bits == 4 and each.bytes == 4096 * 14_336 * (0.5 + 4 / 64)
    assert sum(products.experts.values()) == 64


def test_unquantised_weights_are_read_as_before() -> None:
    run = planned("model=llama-2-7b", "dtype=bfloat16", "offload=none", "hardware=h100_2nvme")
    lookups_and_norms = 32_000 * 4096 + 65 * 4096
    assert touched_weight_bytes(run.spec, run.config, 1) == 2 * (
        run.spec.num_parameters - lookups_and_norms
    )


GPU_PLAN = ("model=llama-2-7b", "dtype=int4", "offload=none", "hardware=h100_2nvme")
HEAD = 32_000 * 4096


@pytest.mark.parametrize(
    ("overrides", "rows", "new", "copies_head", "copies_layers"),
    [
        ((), 1, 1, False, False),
        ((), 64, 1, False, False),
        ((), 65, 1, True, True),
        ((), 1, 100, False, True),  # of a prefill the head multiplies one token a row
        (("dtype.kernel=compiled",), 65, 100, False, False),
        (("dtype.kernel=torch",), 1, 1, True, True),
        (("dtype.kernel=unpack",), 1, 1, True, True),
    ],
)
def test_a_gpu_copies_the_packed_weights_that_the_kernel_does_not_multiply(
    overrides: tuple[str, ...], rows: int, new: int, copies_head: bool, copies_layers: bool
) -> None:
    run = planned(*GPU_PLAN, *overrides)
    layers = run.spec.num_parameters - 2 * HEAD - 65 * 4096
    copied = layers * copies_layers + HEAD * copies_head
    assert unpacked_weight_bytes(run.spec, run.config, rows, new) == copied * 2 * 2


def test_experts_are_copied_where_each_has_many_tokens() -> None:
    # A token meets 2 of 8 experts: of 100 tokens 25 meet each, of 1000 250.
    run = planned("model=mixtral-8x7b", "dtype=int4", "offload=none", "hardware=h100_2nvme")
    experts = 32 * 3 * 8 * 4096 * 14_336
    outside = run.spec.num_parameters - experts - 2 * HEAD - 65 * 4096 - 32 * 8 * 4096
    assert unpacked_weight_bytes(run.spec, run.config, 1, 100) == outside * 4
    assert unpacked_weight_bytes(run.spec, run.config, 1, 1000) == pytest.approx(
        (outside + experts) * 4, rel=1e-6
    )


def test_a_plan_for_a_gpu_says_what_packed_weights_gain_with_the_kernel_and_without() -> None:
    run = planned(*GPU_PLAN)
    moved = run.prediction.ceiling.decode_step.demand.device_memory_bytes
    assert moved == pytest.approx(touched_weight_bytes(run.spec, run.config, 1), rel=0.03)
    eight, four = fewer_bits(run)
    assert 3 < (four.gain or 0) < 3.6 and 0.4 < (four.gain_unpacked or 0) < 0.5
    lines = list(fewer_bits_lines([vars(eight), vars(four)]))
    assert lines[3].startswith(
        "  by zinfer's Triton kernel; where the GPU refuses it and unpacks: "
    )
    assert lines[3].endswith(f"dtype=int4 {four.gain_unpacked:.2f} times")


@pytest.mark.parametrize(
    "overrides",
    [
        (*GPU_PLAN, "dtype.kernel=torch"),
        (*GPU_PLAN, "offload=cpu"),  # the link takes longer than either
        ("model=llama-2-7b", "dtype=int4", "offload=none", CPU),
    ],
)
def test_where_the_kernel_makes_no_difference_a_plan_does_not_name_it(
    overrides: tuple[str, ...],
) -> None:
    found = list(fewer_bits(planned(*overrides)))
    assert [entry.gain_unpacked for entry in found] == [None, None]
    assert "Triton" not in "".join(fewer_bits_lines([vars(entry) for entry in found]))


def test_a_gpu_that_unpacks_is_slower_with_all_weights_on_it_and_faster_when_they_stream() -> None:
    def gain(*words: str) -> float:
        given = (*words, "hardware=h100_2nvme", "model=llama-2-7b")
        ours, plain = (
            planned(*given, dtype).prediction.ceiling.decode_step.ceiling_s
            for dtype in ("dtype=int4", "dtype=bfloat16")
        )
        assert ours and plain
        return plain / ours

    by_torch = "dtype.kernel=torch"
    assert gain("offload=none", by_torch) < 1 < 3 < gain("offload=cpu", by_torch)
    assert 3 < gain("offload=none")


def with_packed_kernel(times: float) -> CalibrationProfile:
    """Calibrate a packed product that takes 1/times as long as one in float32."""
    return profile(
        packed=tuple(
            PackedTime(
                bits=bits,
                dtype=row.dtype,
                rows=row.rows,
                weight_numel=row.weight_numel,
                seconds=row.seconds / times,
                spread=0.0,
            )
            for bits in (4, 8)
            for row in profile().kernels
            if not row.wide
        )
    )


TINY = ("model=tiny-llama", "dtype.compute=float32", "offload=none", CPU)


def test_packed_products_take_what_their_kernel_takes() -> None:
    whole = planned(*TINY, "dtype.weights=float32", profile=profile()).prediction.parts
    run = planned(*TINY, "dtype.weights=int8", profile=with_packed_kernel(4))
    parts = run.prediction.parts
    assert parts["matrix products"] == pytest.approx(whole["matrix products"] / 4)
    assert parts["dequantisation"] == 0.0
    kept = planned(
        *TINY, "dtype.weights=int8", "dtype.keep=[lm_head]", profile=with_packed_kernel(4)
    )
    assert parts["matrix products"] < kept.prediction.parts["matrix products"]


def test_activations_of_8_bits_have_times_of_their_own_where_they_were_measured() -> None:
    sixteen = with_packed_kernel(4)
    faster = tuple(
        replace(row, activation_bits=8, seconds=row.seconds / 2) for row in sixteen.packed
    )
    times = [
        planned(*TINY, "dtype.weights=int4", each, profile=machine).prediction.parts[
            "matrix products"
        ]
        for machine in (sixteen, replace(sixteen, packed=(*sixteen.packed, *faster)))
        for each in ("dtype.activation_bits=16", "dtype.activation_bits=8")
    ]
    assert times == pytest.approx([times[0], times[0], times[0], times[0] / 2])


@pytest.mark.parametrize(
    ("overrides", "machine"),
    [((), profile()), (("dtype.kernel=unpack",), with_packed_kernel(4))],
    ids=["calibrated before there was a kernel", "another kernel than the calibrated one"],
)
def test_a_packed_product_that_nobody_measured_is_not_predicted(
    overrides: tuple[str, ...], machine: CalibrationProfile
) -> None:
    said = planned(*TINY, "dtype.weights=int4", *overrides, profile=machine).prediction
    assert said.decode_step_s is None and said.generated_tokens_per_s is None


def test_a_plan_says_what_fewer_bits_gain_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ({"model": "small", "weights": "int4", "rounding": "searched", "perplexity_ratio": 1.2},)
    monkeypatch.setattr(
        dtype_advice, "measured_quality", lambda model, weights: rows if weights == "int4" else ()
    )
    opt = ("model=opt-125m", *TINY[1:], "dtype.weights=float32")
    run = planned(*opt, profile=with_packed_kernel(4))
    eight, four = fewer_bits(run)
    assert four.is_predicted and (four.gain or 0) > 1.1
    assert four.stored_share < eight.stored_share < 0.35
    lines = list(fewer_bits_lines([vars(eight), vars(four)]))
    assert lines[0].startswith("weights in fewer bits, over dtype=float32 (tokens/s as predicted")
    assert "dtype=int8" in lines[1] and lines[1].endswith("perplexity unknown")
    assert "dtype=int4" in lines[2] and lines[2].endswith("perplexity unknown")
    assert lines[3].endswith("set weights=pretrained quality.enabled=true")
    assert lines[4].startswith("  small (small models lose most): perplexity ")
    assert lines[4].endswith("dtype=int4 x 1.2 with dtype=int4_searched")


def test_a_plan_of_a_model_that_was_measured_says_its_own_perplexity() -> None:
    run = planned("model=smollm2-135m", "dtype=bfloat16", "offload=none", CPU)
    lines = list(fewer_bits_lines([vars(entry) for entry in fewer_bits(run)]))
    assert len(lines) == 3 and "perplexity unknown" not in "".join(lines)
    assert lines[2].endswith(" with dtype=int4_searched") and "perplexity x " in lines[1]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_packed_plan_says_what_it_gained_over_the_plain_one(weights: str) -> None:
    opt = ("model=opt-125m", *TINY[1:])
    plain = planned(*opt, "dtype.weights=float32", profile=with_packed_kernel(4))
    packed = planned(*opt, f"dtype.weights={weights}", profile=with_packed_kernel(4))
    mine, theirs = list(fewer_bits(packed)), list(fewer_bits(plain))
    assert [replace(entry, is_this_run=False) for entry in mine] == theirs
    assert [entry.override for entry in mine if entry.is_this_run] == [f"dtype={weights}"]
    found = packed.prediction.generated_tokens_per_s or 0
    before = plain.prediction.generated_tokens_per_s or 0
    gain = next(entry.gain for entry in mine if entry.is_this_run)
    assert gain == pytest.approx(found / before)
    lines = list(fewer_bits_lines([vars(entry) for entry in mine]))
    assert [f"dtype={weights}" in line for line in lines if line.endswith("; this run")] == [True]


def test_a_box_without_a_calibration_gains_what_its_bandwidth_allows() -> None:
    run = planned("model=llama-3-8b", "dtype=bfloat16", "offload=cpu", "hardware=h100_2nvme")
    gains = {entry.override: entry.gain or 0 for entry in fewer_bits(run)}
    assert 1.7 < gains["dtype=int8"] < 2.0
    assert 2.5 < gains["dtype=int4"] < 4.0
    assert not any(entry.is_predicted for entry in fewer_bits(run))


@pytest.mark.parametrize(
    "overrides",
    [("dtype=float32", "zero=paper"), ("zero=paper", "weights=pretrained")],
)
def test_what_cannot_be_quantised_gets_no_advice(overrides: tuple[str, ...]) -> None:
    run = planned("model=opt-125m", *overrides, "offload=none", CPU)
    assert list(fewer_bits(run)) == []


def test_shipped_quality_says_its_model_source_and_numbers() -> None:
    for weights in ("int8", "int4"):
        found = measured_quality("smollm2-135m", weights)
        assert found and {row["model"] for row in found} == {"smollm2-135m"}
        assert measured_quality("another-model", weights) == found
        for row in found:
            assert row["perplexity_ratio"] > 0.9 and 0 < row["token_agreement"] <= 1
            assert row["measured"] and row["rounding"] in ("nearest", "searched")


def test_deepspeeds_own_scheme_is_counted_as_before() -> None:
    run = planned("model=opt-1.3b", "dtype=int8", "zero=paper", "offload=cpu", CPU)
    spec = run.spec
    quantised = sum(each.numel for each in spec.parameters if each.kind in ("linear", "embedding"))
    rest = spec.num_parameters - quantised
    assert run.plan.weight_stored_bytes == quantised + 2 * 2 * quantised // 64 + 2 * rest


def test_patterns_that_name_no_weight_are_said() -> None:
    def said(*overrides: str) -> list[str]:
        run = planned("model=llama-2-7b", "dtype=int4", "offload=none", CPU, *overrides)
        return [each for each in plan_warnings(run) if "names no weight" in each]

    (one,) = said("dtype.keep=[q_porj,lm_head,norm]")
    assert one.startswith("dtype.keep=[q_porj,norm] names no weight of llama-2-7b")
    assert one.endswith(".weight")
    (one,) = said("dtype.eight_bits=[embed]")
    assert one.startswith("dtype.eight_bits=[embed]")
    assert said("dtype.keep=[embeddings,layers.0,down_proj,lm*]") == []
    tied = planned("model=smollm2-135m", "dtype=int4", "offload=none", CPU)
    assert not [each for each in plan_warnings(tied) if "names no weight" in each]


NARROW = ("model.overrides.hidden_size=8", "model.overrides.word_embed_proj_dim=8",
          "model.overrides.ffn_dim=8", "model.overrides.num_attention_heads=2")  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "because"),
    [
        (("dtype=int4", "dtype.keep=['*']"), "dtype.keep=[*] keeps all that could be packed"),
        (("dtype=int8", "dtype.keep=[embeddings,layers]"), "dtype.keep=[embeddings,layers] keeps"),
        (("dtype=int4", *NARROW), "in groups of 64 none of them would get smaller"),
        (("dtype=int8", "dtype.keep=[embeddings]"), None),
        (("dtype=int4",), None),
        (("dtype=bfloat16",), None),
    ],
)
def test_weights_of_which_none_is_packed_are_said(
    overrides: tuple[str, ...], because: str | None
) -> None:
    run = planned("model=tiny-opt", "offload=none", CPU, *overrides)
    said = [each for each in plan_warnings(run) if "packs no weight of tiny-opt" in each]
    assert len(said) == (because is not None)
    assert all(because in each and "Set dtype=bfloat16" in each for each in said if because)


def test_an_empty_pattern_is_shown_as_one() -> None:
    run = planned("model=tiny-opt", "dtype=int4", "offload=none", CPU, "dtype.keep=['']")
    assert any('dtype.keep=[""] names no weight' in each for each in plan_warnings(run))
