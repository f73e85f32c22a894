"""Packed weights: their layout, the error that rounding may make, and products with them."""

from __future__ import annotations

import random

import pytest
import torch

from zinfer.worker.quantised.packing import (
    Packing,
    pack,
    product,
    rounding_fault,
    rows_of,
    unpack,
)

SHAPES = [  # shape in the model, transposed
    ((3, 64), False),
    ((5, 96), False),  # the last group of 64 is filled up
    ((64, 7), True),
    ((2, 5, 160), False),
    ((2, 160, 6), True),
]


def packing(shape: tuple[int, ...], turned: bool, **settings: object) -> Packing:
    chosen = {"bits": 8, "group_size": 64, **settings}
    return Packing(shape=shape, is_transposed=turned, **chosen)  # type: ignore[arg-type]


def weight(shape: tuple[int, ...], scale: float = 0.1, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_bytes_lie_as_the_format_says(bits: int, dtype: torch.dtype) -> None:
    """Read them with a plain loop: codes row by row, then scale and minimum of every group."""
    layout = packing((5, 96), False, bits=bits, group_size=32)
    values = weight((5, 96))
    packed = pack(values, layout, dtype)
    assert packed.dtype == dtype and packed.dim() == 1
    raw = packed.view(torch.uint8)
    codes, scales = raw[: 5 * 96 * bits // 8], raw[5 * 96 * bits // 8 : layout.bytes]
    pairs = scales.view(torch.float16).view(-1, 2).tolist()
    read = torch.empty(5 * 96)
    for place in range(5 * 96):
        group, at = divmod(place, 32)
        if bits == 8:
            code = int(codes[place])
        else:  # values j and j + 16 of a group share a byte
            both = int(codes[group * 16 + at % 16])
            code = both & 15 if at < 16 else both >> 4
        scale, least = pairs[group]
        read[place] = scale * code + least
    torch.testing.assert_close(read.view(5, 96), unpack(packed, layout, torch.float32))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_no_value_is_further_away_than_half_a_step(bits: int, symmetric: bool) -> None:
    """Any size, spread and offset: a hundred drawn at random."""
    draw = random.Random(bits)
    for seed in range(100):
        shape = (draw.randint(1, 5), draw.randint(1, 200))
        group, scale = draw.choice([32, 64, 128]), draw.choice([1e-4, 0.02, 1.0, 300.0])
        layout = packing(shape, False, bits=bits, group_size=group, symmetric=symmetric)
        values = weight(shape, scale, seed) + draw.choice([0.0, 5.0]) * scale
        packed = pack(values, layout, torch.bfloat16)
        fault = rounding_fault(values, packed, layout)
        assert fault is None, (shape, group, scale, seed, fault)
        scales = layout.split(packed)[1].float()
        assert not symmetric or torch.equal(scales[..., 1], -scales[..., 0] * 2 ** (bits - 1))


@pytest.mark.parametrize(("shape", "turned"), SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_groups_lie_along_the_inputs_also_of_transposed_weights(
    shape: tuple[int, ...], turned: bool, bits: int
) -> None:
    values, layout = weight(shape), packing(shape, turned, bits=bits)
    packed = pack(values, layout, torch.float32)
    found = unpack(packed, layout, torch.float32)
    plain = values.transpose(-1, -2).contiguous() if turned else values
    straight = packing(tuple(plain.shape), False, bits=bits)
    expected = unpack(pack(plain, straight, torch.float32), straight, torch.float32)
    assert torch.equal(found, expected.transpose(-1, -2) if turned else expected)
    assert rounding_fault(values, packed, layout) is None


def test_a_changed_code_and_a_changed_scale_are_found() -> None:
    values, layout = weight((4, 128)), packing((4, 128), False)
    packed = pack(values, layout, torch.bfloat16)
    raw = packed.view(torch.uint8)
    raw[130] += 3
    assert "row 1, column 2" in str(rounding_fault(values, packed, layout))
    raw[130] -= 3
    layout.split(packed)[1][2, 1, 0] *= 1.1
    assert "row 2" in str(rounding_fault(values, packed, layout))


@pytest.mark.parametrize("route", ["auto", "unpack"])
@pytest.mark.parametrize("rows", [(1,), (2, 3)])
@pytest.mark.parametrize(("shape", "turned"), [((40, 96), False), ((96, 40), True)])
def test_a_product_is_that_of_the_unpacked_weight(
    shape: tuple[int, ...], turned: bool, rows: tuple[int, ...], route: str
) -> None:
    layout = packing(shape, turned, bits=4, route=route)
    packed = pack(weight(shape), layout, torch.float32)
    x, bias = weight((*rows, 96), 1.0, 1), weight((40,), 1.0, 2)
    plain = unpack(packed, layout, torch.float32)
    expected = x @ (plain if turned else plain.T) + bias
    found = product(x, *layout.split(packed), layout, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_embedding_unpacks_the_rows_that_are_asked_for() -> None:
    layout = packing((50, 96), False)
    packed = pack(weight((50, 96)), layout, torch.bfloat16)
    ids = torch.tensor([[3, 49], [0, 3]])
    expected = unpack(packed, layout, torch.bfloat16)[ids]
    assert torch.equal(rows_of(packed, layout, ids, torch.bfloat16), expected)
