"""Attention on the host against float64: every type, odd lengths, masks, sinks and softcaps."""

from __future__ import annotations

import ctypes
import itertools
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.planning import profile
from zinfer.machine import cpp_library
from zinfer.machine.measured import DeviceAttentionTime, HostAttentionTime, PackingTime
from zinfer.machine.profile_files import document_of, profile_from_document
from zinfer.worker.device_attention import device_attention_times
from zinfer.worker.kv_cache import kernel as module
from zinfer.worker.kv_cache.codes import dequantise, quantise
from zinfer.worker.kv_cache.kernel import (
    FORMULATIONS,
    MASKED,
    HostAttention,
    Rows,
    Scoring,
    compiled,
    half_compiled,
    library,
    unsupported,
)
from zinfer.worker.kv_cache.rates import host_attention_times, packing_times, unpacking_times

ROWS, SPARE = 2, 3
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1, 7, 8, 63, 64, 65, 300, 1030)
HEADS = ((4, 4), (8, 1), (6, 2), (7, 1), (16, 1), (9, 3), (10, 2))


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if isinstance(library(), str):
        pytest.skip(f"needs the compiled kernel: {library()}")


def rows_of(values: torch.Tensor, kind: torch.dtype | int, group: int) -> tuple[Rows, torch.Tensor]:
    """Store values [rows, heads, tokens, dim]; return them with what they are once read back."""
    if isinstance(kind, torch.dtype):
        stored = values.to(kind)
        return Rows(data=stored), stored.double()
    codes, scales = quantise(values, kind, group)
    back = dequantise(codes, scales, kind, group, torch.float32)
    rows = Rows(data=codes.contiguous(), scales=scales.contiguous(), bits=kind, group_size=group)
    return rows, back.double()


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Scoring) -> Any:
    """Attention in float64."""
    repeat = query.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(repeat, 1) for each in (keys, values))
    scores = torch.einsum("bhd,bhtd->bht", query.double(), keys) * how.scale
    if how.softcap:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if how.bias is not None:
        scores = scores + how.bias.double()
    if how.sinks is not None:
        sinks = how.sinks.double().view(1, -1, 1).expand(scores.shape[0], -1, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1)[..., : keys.shape[2]]
    return torch.einsum("bht,bhtd->bhd", weights, values)


def problem(
    heads: tuple[int, int],
    dim: int,
    tokens: int,
    kinds: tuple[Any, Any],
    seed: int = 0,
    group: int | None = None,
) -> tuple[Any, ...]:
    """Make a random problem with a padded row, sinks, and room behind the tokens."""
    torch.manual_seed(seed)
    query_heads, kv_heads = heads
    query = torch.randn(ROWS, query_heads, dim) * 2
    stored = [torch.randn(ROWS, kv_heads, tokens + SPARE, dim) for _ in range(2)]
    group = group or (32 if dim % 32 == 0 else 16)
    (keys, k), (values, v) = (
        rows_of(each, kind, group) for each, kind in zip(stored, kinds, strict=True)
    )
    bias = torch.randn(ROWS, query_heads, tokens) * 0.3
    bias[1, :, : tokens // 3] = MASKED
    how = Scoring(scale=dim**-0.5, bias=bias, sinks=torch.randn(query_heads))
    return query, keys, values, how, reference(query, k[:, :, :tokens], v[:, :, :tokens], how)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", [*FLOATS, 8, 4], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_compiled_kernel_is_right_at_every_length(
    heads: tuple[int, int], kind: Any, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens, dim in itertools.product(LENGTHS, (16, 64, 80, 128, 256)):
            if kind == 4 and dim % 32:
                continue
            query, keys, values, how, expected = problem(heads, dim, tokens, (kind, kind))
            error = (compiled(query, keys, values, tokens, how).double() - expected).abs().max()
            assert error < (1e-5 if isinstance(kind, torch.dtype) else 5e-4), (tokens, dim)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_groups_of_every_size_are_right(heads: tuple[int, int], bits: int, group: int) -> None:
    for tokens, dim in itertools.product((1, 66, 300), (64, 128, 192, 256, 512)):
        if dim % group or (bits == 4 and group == 16):
            continue
        query, keys, values, how, expected = problem(heads, dim, tokens, (bits, bits), group=group)
        error = (compiled(query, keys, values, tokens, how).double() - expected).abs().max()
        assert error < 5e-4, (tokens, dim)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_bfloat16_query_on_bfloat16_keys_loses_nothing_but_its_output(
    heads: tuple[int, int],
) -> None:
    for tokens, dim in itertools.product(LENGTHS, (32, 80, 128, 256)):
        _, keys, values, how, _ = problem(heads, dim, tokens, (torch.bfloat16, torch.bfloat16))
        torch.manual_seed(1)
        query = torch.randn(ROWS, heads[0], dim).bfloat16().float()
        k, v = (each.data[:, :, :tokens].double() for each in (keys, values))
        expected = reference(query, k, v, how)
        error = (compiled(query, keys, values, tokens, how).double() - expected).abs().max()
        assert error < 3e-5, (tokens, dim)


OTHER_PROCESSORS = {
    "AVX2": ("-mno-avx512f",),
    "AVX-512 without integer products": ("-mno-avx512vnni",),
    "AVX-512 without bfloat16": ("-mno-avx512bf16",),
    "no vectors": ("-mno-avx", "-mno-fma", "-mno-f16c"),
}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
@pytest.mark.parametrize("processor", OTHER_PROCESSORS)
def test_the_kernel_is_right_as_it_is_compiled_for_other_processors(
    processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path))
    flags = (*cpp_library.FLAGS, *OTHER_PROCESSORS[processor])
    monkeypatch.setattr(cpp_library, "FLAGS", flags)
    lib = ctypes.CDLL(str(cpp_library.build_library(module.DECODE_ATTENTION)))
    monkeypatch.setattr(module, "library", lambda: lib)
    for heads, kind, tokens in itertools.product(HEADS, (*FLOATS, 8, 4), (1, 66, 300)):
        query, keys, values, how, expected = problem(heads, 128, tokens, (kind, kind), group=64)
        error = (compiled(query, keys, values, tokens, how).double() - expected).abs().max()
        assert error < (1e-5 if isinstance(kind, torch.dtype) else 5e-4), (heads, kind, tokens)


@pytest.mark.parametrize(("keys", "values"), itertools.permutations([torch.bfloat16, 8, 4], 2))
def test_keys_and_values_may_be_stored_in_different_bits(keys: Any, values: Any) -> None:
    query, k, v, how, expected = problem((8, 2), 64, 200, (keys, values))
    assert (compiled(query, k, v, 200, how).double() - expected).abs().max() < 5e-4


@pytest.mark.parametrize("name", sorted(FORMULATIONS))
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1)], ids=str)
def test_the_formulations_in_pytorch_are_right_too(name: str, heads: tuple[int, int]) -> None:
    for kind in (torch.float32, 8, 4):
        query, keys, values, how, expected = problem(heads, 64, 130, (kind, kind))
        found = FORMULATIONS[name](query, keys, values, 130, how)
        assert (found.double() - expected).abs().max() < 1e-4
    plain = Scoring(scale=0.125, bias=how.bias)
    query, keys, values, _, _ = problem(heads, 64, 130, (torch.float32, torch.float32))
    expected = reference(
        query, keys.data[:, :, :130].double(), values.data[:, :, :130].double(), plain
    )
    found = FORMULATIONS[name](query, keys, values, 130, plain)
    assert (found.double() - expected).abs().max() < 1e-5


def test_softcaps_and_a_mask_for_all_rows_are_applied() -> None:
    query, keys, values, _, _ = problem((4, 2), 64, 90, (torch.float32, torch.float32))
    for bias in (None, torch.zeros(1, 1, 90).masked_fill_(torch.arange(90) < 40, MASKED)):
        how = Scoring(scale=0.3, bias=bias, softcap=5.0)
        k, v = (each.data[:, :, :90].double() for each in (keys, values))
        error = compiled(query, keys, values, 90, how).double() - reference(query, k, v, how)
        assert error.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_halves_of_attention_are_right(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    buffer = torch.randn(6, 75, 64).to(dtype)
    rows, query, weights = buffer[:, :70], torch.randn(6, 64), torch.rand(6, 70)
    scores = half_compiled(query, rows, scores=True)
    sums = half_compiled(weights, rows, scores=False)
    assert scores is not None and sums is not None
    assert (
        scores.double() - torch.einsum("nd,ntd->nt", query.double(), rows.double())
    ).abs().max() < 1e-4
    assert (
        sums.double() - torch.einsum("nt,ntd->nd", weights.double(), rows.double())
    ).abs().max() < 1e-4
    assert half_compiled(query, rows.transpose(1, 2), scores=True) is None, "not laid out as rows"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (Rows(data=torch.zeros(1, 1, 4, 20)), "20 values a head"),
        (Rows(data=torch.zeros(1, 1, 4, 64, dtype=torch.float64)), "float64"),
        (
            Rows(data=torch.zeros(1, 1, 4, 32, dtype=torch.uint8), bits=4, group_size=16),
            "groups of 16",
        ),
    ],
)
def test_sizes_that_the_kernel_cannot_read_are_left_to_pytorch(rows: Rows, says: str) -> None:
    assert says in str(unsupported(rows, rows))


@pytest.mark.parametrize("wanted", ["auto", "compiled", "torch"])
def test_what_computes_is_said_and_chosen(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values, how, expected = problem((4, 2), 64, 90, (torch.float32, torch.float32))
    attention = HostAttention(wanted=wanted)
    assert (attention.attend(query, keys, values, 90, how).double() - expected).abs().max() < 1e-5
    (said,) = attention.said.values()
    assert said.startswith("PyTorch" if wanted == "torch" else "compiled kernel")
    monkeypatch.setattr(module, "library", lambda: "no C++ compiler was found")
    without = HostAttention(wanted=wanted)
    if wanted == "compiled":
        with pytest.raises(ValueError, match=r"Set kv_cache.kernel=auto"):
            without.attend(query, keys, values, 90, how)
        return
    assert (without.attend(query, keys, values, 90, how).double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("bits", "levels"), [(8, 255), (4, 15)])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_rounding_errs_by_half_a_step_at_most(bits: int, levels: int, group: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 2, 50, 64) * torch.rand(3, 2, 50, 1) * 10
    codes, scales = quantise(values, bits, group)
    assert codes.shape[-1] == 64 * bits // 8 and codes.dtype == torch.uint8
    back = dequantise(codes, scales, bits, group, torch.float32)
    groups = values.unflatten(-1, (-1, group))
    step = (groups.amax(-1) - groups.amin(-1)) / levels
    error = (back - values).unflatten(-1, (-1, group)).abs().amax(-1)
    # the scale and the minimum are rounded to float16 first
    slack = step * 0.01 + groups.abs().amax(-1) * 2e-3
    assert (error <= step / 2 + slack).all()


@pytest.mark.parametrize(
    "values", [torch.zeros(1, 32), torch.full((1, 32), 7.5), torch.full((1, 32), 1e6)]
)
def test_constant_and_huge_values_stay_finite(values: torch.Tensor) -> None:
    for bits in (8, 4):
        back = dequantise(*quantise(values, bits, 32), bits, 32, torch.float32)
        assert torch.isfinite(back).all()
        assert torch.allclose(back, values.clamp(max=65504), rtol=2e-3) or values.max() > 65504


def test_the_structure_handed_over_has_the_fields_of_the_source() -> None:
    text = module.DECODE_ATTENTION.read_text()
    struct = text[text.index("struct Problem {") : text.index("};", text.index("struct Problem {"))]
    positions = [struct.index(f"{name}") for name, _ in module._Problem._fields_]
    assert len(positions) == struct.count(",") + struct.count(";")
    assert ctypes.sizeof(module._Problem) == 8 * 19 + 4 * 5 + 4  # padded to eight bytes


@pytest.mark.slow
def test_calibration_times_every_way_of_storing_keys_and_values() -> None:
    times = [HostAttentionTime(**fields) for fields in host_attention_times("bfloat16")]
    ways = {(time.bits, time.shared_by) for time in times}
    assert ways == set(itertools.product((16, 8, 4), (1, 8)))
    for way in ways:
        sizes = [time for time in times if (time.bits, time.shared_by) == way]
        assert [time.kv_bytes for time in sizes] == sorted({time.kv_bytes for time in sizes})
        assert all(time.seconds > 0 for time in sizes)
    whole = next(time for time in times if time.bits == 16)
    assert whole.kv_bytes == 2 * 2 * 16 * 64 * 128


@pytest.mark.slow
def test_calibration_times_unpacking_into_slots() -> None:
    times = [PackingTime(**fields) for fields in unpacking_times("bfloat16")]
    assert {(time.bits, time.values) for time in times} == set(
        itertools.product((8, 4), (64 * 2048, 512 * 2048, 2048 * 2048, 8192 * 2048))
    )
    found = profile(host_unpacking=tuple(times))
    assert profile_from_document(document_of(found)) == found
    assert found.unpacking_s(4, "bfloat16", 2048 * 2048) == pytest.approx(times[6].seconds)
    assert found.unpacking_s(8, "float32", 2048) is None, "it was not measured"


@pytest.mark.slow
def test_calibration_times_packing_and_a_cache_on_the_device() -> None:
    packed = [PackingTime(**fields) for fields in packing_times("bfloat16")]
    cached = [
        DeviceAttentionTime(**fields)
        for fields in device_attention_times("bfloat16", torch.device("cpu"))
    ]
    assert {(time.bits, time.values) for time in packed} == set(
        itertools.product((8, 4), (2048, 16 * 2048, 1024 * 2048))
    )
    sizes = (64, 4 * 512, 16 * 512, 24 * 1024)
    assert {(time.shared_by, time.kv_bytes) for time in cached} == set(
        itertools.product((1, 8), (2 * 2 * 12 * 64 * size for size in sizes))
    )
    found = profile(host_packing=tuple(packed), device_attention=tuple(cached))
    assert profile_from_document(document_of(found)) == found
    for row in cached:
        times = found.device_attention_s("bfloat16", row.shared_by, row.kv_bytes)
        assert times is not None and row.slot_s is not None
        measured = (row.grow_s, row.attend_s, row.slot_s)
        assert (times.grow_s, times.attend_s, times.slot_s) == pytest.approx(measured)
        assert min(measured) > 0
    assert found.packing_s(8, "bfloat16", 16 * 2048) == pytest.approx(packed[1].seconds)
