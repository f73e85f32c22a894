"""The compiled packer writes the bits that PyTorch's operators give, into any place."""

from __future__ import annotations

import ctypes
import itertools
import platform
from pathlib import Path

import pytest
import torch

from zinfer.machine import cpp_library
from zinfer.worker.kv_cache import packer
from zinfer.worker.kv_cache.codes import dequantise, quantise, quantise_into, quantise_with_torch
from zinfer.worker.kv_cache.memory import Memory
from zinfer.worker.kv_cache.store import Format, Shape, Stored

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (16, 32, 48, 64, 80, 128)


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if isinstance(packer.library(), str):
        pytest.skip(f"needs the compiled packer: {packer.library()}")


def prompt(dtype: torch.dtype, dim: int, tokens: int = 70) -> torch.Tensor:
    """Make keys as a model leaves them: tokens before heads, sizes from tiny to large."""
    generator = torch.Generator().manual_seed(dim + tokens)
    values = torch.randn(2, tokens, 3, dim, generator=generator)
    size = torch.logspace(-9, 4.6, tokens).view(1, tokens, 1, 1)
    return (values * size).to(dtype).transpose(1, 2)


def assert_same_bits(
    values: torch.Tensor, bits: int, group: int, *, symmetric: bool = False
) -> None:
    assert packer.unsupported(values, group) is None
    found = quantise(values, bits, group, symmetric=symmetric)
    expected = quantise_with_torch(values, bits, group, symmetric=symmetric)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].view(torch.int16), expected[1].view(torch.int16))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_and_scales_are_those_of_the_operators(
    dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    for group, count in itertools.product(GROUPS, (1, 3)):
        assert_same_bits(prompt(dtype, group * count), bits, group, symmetric=symmetric)
    rows = prompt(dtype, 2048)[0, 0]
    assert_same_bits(rows, bits, 1024, symmetric=symmetric)


@pytest.mark.parametrize("bits", [8, 4])
def test_halves_between_two_codes_go_to_the_even_one(bits: int) -> None:
    steps = (1 << bits) - 1
    values = torch.cat([torch.arange(31) * 0.5, torch.tensor([float(steps)])])
    assert_same_bits(values.clamp(max=steps), bits, 32)


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 7.5, -3e-9, 1e-30, 65504.0, 1e6, -1e6, 3e38, float("inf"), -float("inf")]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_constants_zeros_and_numbers_beyond_float16_give_the_same_bits(
    bits: int, value: float
) -> None:
    for symmetric in (False, True):
        assert_same_bits(torch.full((3, 32), value), bits, 32, symmetric=symmetric)
        mixed = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        mixed[:, 7] = value
        assert_same_bits(mixed, bits, 16, symmetric=symmetric)


def test_a_group_with_a_nan_is_nan_when_it_is_read_back() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    values[1, 20] = float("nan")
    back = dequantise(*quantise(values, 8, 32), 8, 32, torch.float32)
    assert back[1, :32].isnan().all()
    assert back.isnan().sum() == 32


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_are_packed_into_their_slots_and_nowhere_else(bits: int, tokens_first: bool) -> None:
    shape = Shape(batch=2, heads=3, capacity=40, dim=64)
    stores = [
        Stored(
            Memory(pin=False), shape, torch.bfloat16,
            Format(bits=bits, group_size=32, compiled=compiled), tokens_first=tokens_first,
        )
        for compiled in (True, False)
    ]  # fmt: skip
    for part in (part for store in stores for part in store.parts):
        part.view(torch.uint8).fill_(170)
    values, past = prompt(torch.bfloat16, 64, 29 + 1 + 25), 0
    for tokens in (29, 1, 25):  # the last ones wrap around
        for store in stores:
            new = values[:, :, past : past + tokens]
            store.write(new, past, lambda into, source: pytest.fail("copied, not packed"))
        past += tokens
        for ours, theirs in zip(*(store.parts for store in stores), strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_what_the_packer_cannot_read_is_left_to_the_operators() -> None:
    wide = torch.randn(4, 64)
    assert "float64" in str(packer.unsupported(wide.double(), 32))
    assert "groups of 40" in str(packer.unsupported(torch.randn(4, 80), 40))
    assert "in rows" in str(packer.unsupported(wide.T, 32))
    for values, group in ((wide.double(), 32), (torch.randn(4, 80), 40), (wide.T[:, :4], 4)):
        codes, scales = quantise(values, 8, group)
        into, into_scales = torch.empty_like(codes), torch.empty_like(scales)
        quantise_into(values, into, into_scales, 8, group)
        assert torch.equal(codes, into) and torch.equal(scales, into_scales)
        back = dequantise(codes, scales, 8, group, torch.float32)
        assert (back - values).abs().max() < 0.05


OTHER_PROCESSORS = {"AVX2": ("-mno-avx512f",), "no vectors": ("-mno-avx", "-mno-fma", "-mno-f16c")}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
@pytest.mark.parametrize("processor", OTHER_PROCESSORS)
def test_other_processors_pack_the_same_bits(
    processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path))
    monkeypatch.setattr(cpp_library, "FLAGS", (*cpp_library.FLAGS, *OTHER_PROCESSORS[processor]))
    lib = ctypes.CDLL(str(cpp_library.build_library(cpp_library.PACK_CODES)))
    monkeypatch.setattr(packer, "library", lambda: lib)
    for dtype, bits, symmetric in itertools.product(FLOATS, (8, 4), (False, True)):
        assert_same_bits(prompt(dtype, 128), bits, 32, symmetric=symmetric)
        assert_same_bits(prompt(dtype, 128) / 1e6, bits, 64, symmetric=symmetric)
