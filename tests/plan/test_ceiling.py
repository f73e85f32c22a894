"""The ceiling against arithmetic by hand."""

from __future__ import annotations

import pytest

from tests.helpers.planning import planned
from zinfer.plan.ceiling import Ceiling, implied_bandwidth_bytes_per_s
from zinfer.plan.products import matrix_products, pass_flops, touched_experts


def bound(*overrides: str) -> Ceiling:
    return planned(*overrides).prediction.ceiling


def test_products_of_opt_are_those_of_the_paper() -> None:
    """OPT-125m: 12 layers of four 768 x 768 and two 768 x 3072 matrices, and a tied head.

    The head of 50,272 x 768 is the embedding.
    """
    spec = planned("model=opt-125m").spec
    products = matrix_products(spec)
    assert dict(products.dense) == {768 * 768: 48, 768 * 3072: 24}
    assert products.head == 50_272 * 768
    assert not products.experts


def test_operations_of_a_decode_step_are_two_for_each_weight_and_four_for_each_pair() -> None:
    spec = planned("model=opt-125m").spec
    weights = 48 * 768 * 768 + 24 * 768 * 3072 + 50_272 * 768
    assert pass_flops(spec, 1, 1, 100) == 2 * weights + 4 * 12 * 12 * 64 * 100
    assert pass_flops(spec, 8, 1, 100) == 8 * pass_flops(spec, 1, 1, 100)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0.0), (1, 2.0), (2, 8 * (1 - 0.75**2)), (1000, 8.0)]
)
def test_a_batch_touches_the_experts_that_chance_gives_it(tokens: int, expected: float) -> None:
    spec = planned("model=mixtral-8x7b").spec
    assert touched_experts(spec, tokens) == pytest.approx(expected)


def test_experts_are_counted_once_for_each_layer_and_role() -> None:
    """Mixtral-8x7B: 32 layers; gate and up are fused [8, 28672, 4096], down is [8, 4096, 14336]."""
    spec = planned("model=mixtral-8x7b").spec
    assert dict(matrix_products(spec).experts) == {28_672 * 4096: 32, 4096 * 14_336: 32}


def test_weights_in_host_memory_are_bound_by_the_link() -> None:
    """OPT-30B float16: 59.95 GB over PCIe 3.0 x16 (15.75 GB/s), less small parameters that stay."""
    result = bound("model=opt-30b", "offload=cpu", "dtype=float16", "hardware=v100")
    assert result.decode_step.binding == "host_device_link"
    assert result.decode_step.ceiling_s == pytest.approx(29_974_540_288 * 2 / 15.75e9, rel=0.001)


def test_weights_on_the_device_are_bound_by_its_memory() -> None:
    """LLaMA-3-8B bfloat16 on 3.9 TB/s: the cache and the weights less the embedding, a lookup."""
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
