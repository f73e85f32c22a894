"""Searched codes cost less than the nearest ones, where it counts, in the same bytes."""

from __future__ import annotations

import pytest
import torch

from zinfer.worker.kv_cache.codes import dequantise, quantise
from zinfer.worker.quantised.search import (
    Feedback,
    Inputs,
    Scheme,
    nearest,
    packed,
    round_searched,
    search_scales,
    unreachable,
    values_of,
)

OUT, TOKENS = 48, 400


def a_weight(width: int, seed: int = 0) -> torch.Tensor:
    """Make a weight [OUT, width] with a few large values, as trained ones have."""
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, width, generator=chance) * 0.05
    weight[:, 3] *= 6
    return weight


def some_inputs(width: int, seed: int = 1) -> torch.Tensor:
    """Make inputs [TOKENS, width] that hang together, of very different sizes."""
    chance = torch.Generator().manual_seed(seed)
    mixed = torch.randn(TOKENS, width // 4, generator=chance) @ torch.randn(
        width // 4, width, generator=chance
    )
    sizes = torch.logspace(-1, 1, width)[torch.randperm(width, generator=chance)]
    return (mixed + torch.randn(TOKENS, width, generator=chance)) * sizes


def seen(inputs: torch.Tensor) -> Inputs:
    return Inputs(squares=inputs.T @ inputs / len(inputs))


def output_error(weight: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor) -> float:
    """Return the mean square by which a product with these inputs changes."""
    return float((inputs @ (weight - rounded).T).square().mean())


def nearest_values(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return what plain rounding makes of a weight."""
    codes, scales = quantise(weight, scheme.bits, scheme.group_size)
    return dequantise(codes, scales, scheme.bits, scheme.group_size, torch.float32)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_output_changes_far_less_than_by_rounding_to_the_nearest(
    group_size: int, symmetric: bool
) -> None:
    scheme = Scheme(bits=4, group_size=group_size, symmetric=symmetric)
    weight, text, other_text = a_weight(128), some_inputs(128), some_inputs(128, seed=1)
    codes, scales = round_searched(weight, scheme, seen(text[:300]))
    searched = values_of(codes, scales, scheme)
    plain = nearest_values(weight, scheme)
    assert output_error(weight, searched, text[:300]) < 0.4 * output_error(
        weight, plain, text[:300]
    )
    unseen = other_text[300:]
    assert output_error(weight, searched, unseen) < 0.6 * output_error(weight, plain, unseen)


def test_without_inputs_the_weight_itself_changes_less() -> None:
    scheme = Scheme(bits=4, group_size=64)
    weight = a_weight(192)
    searched = values_of(*round_searched(weight, scheme, None), scheme)
    plain = nearest_values(weight, scheme)
    assert (weight - searched).square().mean() < 0.9 * (weight - plain).square().mean()


def test_scales_spare_the_columns_that_count() -> None:
    scheme = Scheme(bits=4, group_size=32)
    weight = a_weight(32)
    importance = torch.ones(32)
    importance[5:9] = 1000.0
    even = torch.ones(32)
    errors = []
    for counts in (importance, even):
        scales = search_scales(weight, counts, scheme)
        left = weight - values_of(nearest(weight, scales, scheme), scales, scheme)
        errors.append(float(left[:, 5:9].square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_feedback_on_unrelated_inputs_is_plain_rounding() -> None:
    scheme = Scheme(bits=4, group_size=32)
    weight = a_weight(64)
    scales = search_scales(weight, torch.ones(64), scheme)
    unrelated = Inputs(squares=torch.diag(torch.arange(1.0, 65.0)))
    assert torch.equal(
        Feedback.of(unrelated).round(weight, scales, scheme), nearest(weight, scales, scheme)
    )


@pytest.mark.parametrize(
    "squares",
    [torch.zeros(64, 64), torch.ones(64, 64), torch.diag(torch.tensor([1e9] + [1e-9] * 63))],
    ids=["no input at all", "all inputs equal", "one input outweighs all"],
)
def test_inputs_that_say_little_still_give_codes(squares: torch.Tensor) -> None:
    scheme = Scheme(bits=4, group_size=32)
    weight = a_weight(64)
    values = values_of(*round_searched(weight, scheme, Inputs(squares=squares)), scheme)
    assert bool(torch.isfinite(values).all())


def test_inputs_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not numbers"):
        Feedback.of(Inputs(squares=torch.full((8, 8), torch.nan)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "groups"), [(64, 1), (100, 2), (130, 3)])
def test_the_bytes_are_those_of_the_packed_format(bits: int, width: int, groups: int) -> None:
    scheme = Scheme(bits=bits, group_size=64)
    weight = a_weight(width)
    codes, scales = round_searched(weight, scheme, seen(some_inputs(width)))
    stored = packed(codes, scales, scheme)
    assert stored.numel() == OUT * groups * (64 * bits // 8 + 4)
    split = OUT * groups * 64 * bits // 8
    unpacked = dequantise(
        stored[:split].view(OUT, -1),
        stored[split:].view(torch.float16).view(OUT, groups, 2),
        bits,
        64,
        torch.float32,
    )
    assert torch.equal(unpacked, values_of(codes, scales, scheme))
    assert unpacked[:, :width].sub(weight).abs().max() < 0.3


@pytest.mark.parametrize("value", [0.0, 3.0, -70000.0, 1e-9])
def test_groups_of_one_value_survive(value: float) -> None:
    scheme = Scheme(bits=4, group_size=32)
    weight = torch.full((2, 32), value)
    values = values_of(*round_searched(weight, scheme, None), scheme)
    assert values == pytest.approx(weight.clamp(-65504, 65504), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_symmetric_group_has_a_code_for_zero(bits: int) -> None:
    scheme = Scheme(bits=bits, group_size=32, symmetric=True)
    weight = a_weight(64)
    weight[:, ::2] = 0.0
    codes, scales = round_searched(weight, scheme, None)
    assert torch.equal(scales[..., 1], scales[..., 0] * -scheme.middle)
    assert (values_of(codes, scales, scheme)[:, ::2] == 0).all()


REACHES = [  # bits, symmetric, a value in a group of zeros, whether scales in float16 reach it
    (4, False, 15 * 65504.0, True), (4, False, 15 * 65600.0, False),
    (4, False, -65504.0, True), (4, False, -65600.0, False),
    (8, False, 255 * 65504.0, True), (8, False, 255 * 65600.0, False),
    (4, True, -65504.0, True), (4, True, -65600.0, False),
    (4, True, 57316.0, True), (4, True, 57400.0, False),
    (8, True, 64992.0, True), (8, True, 65100.0, False),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "symmetric", "value", "is_reached"), REACHES)
def test_values_beyond_the_scales_are_found(
    bits: int, symmetric: bool, value: float, is_reached: bool
) -> None:
    scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric)
    weight = torch.zeros(3, 70)
    weight[1, 65] = value
    assert unreachable(weight, scheme) == (None if is_reached else (1, 65))
    held = values_of(*round_searched(weight, scheme, None), scheme)[1, 65]
    assert (abs(float(held) - value) <= 1e-3 * abs(value)) is is_reached
