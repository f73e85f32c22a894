"""Packed weights: their layout, the error that rounding may make, and products with them."""

from __future__ import annotations

import random
import weakref

import pytest
import torch

from zinfer.worker.quantised import native
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


@pytest.mark.parametrize("rows", [(1,), (2, 3)])
def test_activations_of_8_bits_are_as_exact_as_a_step_of_their_group(rows: tuple[int, ...]) -> None:
    """Both ways to the kernel round them; with filled-up groups there is no product by address."""
    if isinstance(native.library(), str):
        pytest.skip("needs the compiled kernel")
    for inputs in (96, 128):
        layout = packing((40, inputs), False, activation_bits=8)
        packed, x = pack(weight((40, inputs)), layout, torch.float32), weight((*rows, inputs), 1.0)
        plain = unpack(packed, layout, torch.float32)
        error = (product(x, packed, layout) - x @ plain.T).norm() / (x @ plain.T).norm()
        assert 1e-3 < error < 2e-2, inputs


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
    found = product(x, packed, layout, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_embedding_unpacks_the_rows_that_are_asked_for() -> None:
    layout = packing((50, 96), False)
    packed = pack(weight((50, 96)), layout, torch.bfloat16)
    ids = torch.tensor([[3, 49], [0, 3]])
    expected = unpack(packed, layout, torch.bfloat16)[ids]
    assert torch.equal(rows_of(packed, layout, ids, torch.bfloat16), expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_each_matrix_is_multiplied_wherever_its_bytes_lie(turned: bool, kind: torch.dtype) -> None:
    """ZeRO-3 frees a weight after its use, and gives it another address for the next one."""
    shape = (3, 128, 40) if turned else (3, 40, 128)
    layout = packing(shape, turned, bits=4)
    kept = pack(weight(shape), layout, kind)
    plain = unpack(kept, layout, kind)
    for number in (2, 0, 1):
        packed = kept.clone()
        for x in (weight((1, 1, 128), 1.0, number), weight((4, 128)).T.contiguous().T):
            x = x.to(kind)
            expected = x @ (plain[number] if turned else plain[number].T)
            found = product(x, packed, layout, number=number)
            assert found.shape == expected.shape and found.dtype == kind
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        held = weakref.ref(packed)
        del packed
        assert held() is None


def test_a_weight_that_is_not_there_as_expected_goes_the_general_way() -> None:
    """Filled-up groups, other types and other routes have no product by address, or none here."""
    assert packing((5, 96), False).direct is None
    assert packing((5, 128), False, route="torch").direct is None
    assert packing((5, 128), False, group_size=24).direct is None
    direct = packing((5, 128), False).direct
    assert direct is not None
    packed = pack(weight((5, 128)), packing((5, 128), False), torch.float32)
    x = weight((3, 128))
    if direct(x, packed, 0, None) is None:
        pytest.skip("needs the compiled kernel")
    for other in (x.double(), x[:, :64], x[:0], x.T.contiguous().T, x.repeat(100, 1)):
        assert direct(other, packed, 0, None) is None
    assert direct(x, packed, 0, torch.zeros(5, dtype=torch.bfloat16)) is None
