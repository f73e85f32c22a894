"""Compiled products of packed and 16-bit weights against float64, in every instruction set here."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Iterator

import pytest
import torch

from zinfer.machine import cpp_library
from zinfer.machine.cpp_library import PRODUCTS
from zinfer.worker.kv_cache.codes import dequantise, quantise
from zinfer.worker.quantised import native
from zinfer.worker.quantised.kernel import Kernel, by_unpacking, multiply, unpack
from zinfer.worker.quantised.native import library
from zinfer.worker.skinny.product import skinny_linear

FLAGS_OF_VECTORS = (
    (512, []),
    (512, ["-mno-avx512vnni"]),
    (256, ["-mno-avx512f"]),
    (0, ["-mno-avx512f", "-mno-avx2", "-mno-avx", "-mno-fma", "-mno-f16c"]),
)
"""Bits of a vector, and what the compiler is told so that it uses no wider ones."""
KERNELS: tuple[Kernel, ...] = ("auto", "compiled", "torch", "unpack")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 5, 8, 13, 32, 100)
SHAPES = ((7, 32), (33, 96), (20, 192), (50, 1280), (130, 4128), (3, 11008))
"""(out, in): out no multiple of 8, in of one group, of a part of a block, of several segments."""
LARGEST_ERROR = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 3e-3}
"""Norm of the error over that of the result. bfloat16's own rounding is 2e-3."""


@pytest.fixture(scope="module", params=FLAGS_OF_VECTORS)
def vectors(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """Compile the kernel for vectors of so many bits; tests run with it."""
    lib, compiler = library(), cpp_library._compiler()
    if isinstance(lib, str) or compiler is None:
        pytest.skip(f"needs the compiled kernel: {lib}")
    bits, flags = request.param
    if lib.zinfer_vector_bits() < bits or platform.machine() != "x86_64":
        pytest.skip(f"needs an x86-64 processor with vectors of {bits} bits")
    if flags:
        made = tmp_path_factory.mktemp("kernels") / f"products-{bits}.so"
        subprocess.run(
            [compiler, *cpp_library.FLAGS, *flags, str(PRODUCTS), "-o", str(made)],
            check=True, capture_output=True,
        )  # fmt: skip
        lib = ctypes.CDLL(str(made))
    assert lib.zinfer_vector_bits() == bits
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "library", lambda: lib)
        yield bits


def packed(
    out: int, inputs: int, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scales, and the values that they stand for in float64."""
    codes, scales = quantise(torch.randn(out, inputs) * 0.02, bits, group)
    values = dequantise(codes, scales, bits, group, torch.float32)
    return codes, scales, values.double()


def error_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_products_equal_those_of_the_unpacked_weights(
    vectors: int, shape: tuple[int, int], bits: int
) -> None:
    torch.manual_seed(0)
    out, inputs = shape
    for group in (size for size in (32, 64, 128, 256) if inputs % size == 0):
        codes, scales, values = packed(out, inputs, bits, group)
        bias = torch.randn(out)
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            x[:, 5] *= 50
            for kind in FLOATS:
                given = x.to(kind)
                exact = given.double() @ values.T + bias.to(kind).double()
                found = multiply(
                    given, codes, scales, bits=bits, group_size=group, bias=bias, kernel="compiled"
                )
                assert found.dtype == kind
                assert error_of(found, exact) < LARGEST_ERROR[kind], (group, rows, kind)


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_many_rows_are_multiplied_like_few(vectors: int, activation_bits: int) -> None:
    """The kernel takes 256 rows at a time."""
    torch.manual_seed(5)
    codes, scales, _ = packed(20, 192, 4, 64)
    x, bias = torch.randn(600, 192), torch.randn(20)
    together, *parts = (
        multiply(
            rows, codes, scales,
            bits=4, group_size=64, bias=bias, kernel="compiled", activation_bits=activation_bits,
        )
        for rows in (x, *x.split(200))
    )  # fmt: skip
    assert torch.equal(together, torch.cat(parts))


def test_the_error_stays_below_half_a_step_of_the_largest_activation(vectors: int) -> None:
    """Each activation is off by at most half of (the largest of its sixteen groups / 32639)."""
    torch.manual_seed(1)
    codes, scales, values = packed(24, 2048, 8, 64)
    x = torch.randn(4, 2048) * torch.logspace(-6, 4, 2048)
    found = multiply(x, codes, scales, bits=8, group_size=64, kernel="compiled").double()
    exact = x.double() @ values.T
    steps = x.double().abs().view(4, 2, 1024).amax(-1) / 32639 / 2
    weight_sums = values.abs().view(24, 2, 1024).sum(-1)
    bound = steps @ weight_sums.T
    rounding = 1e-5 * (x.double().abs() @ values.abs().T)
    assert bool(((found - exact).abs() <= bound + rounding).all())


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_multiplies_the_same_integers(
    vectors: int, shape: tuple[int, int], bits: int, activation_bits: int
) -> None:
    """One integer more or less would be an error of 1e-3 with 8 bits."""
    torch.manual_seed(6)
    out, inputs = shape
    for group in (size for size in (32, 64, 128, 256) if inputs % size == 0):
        codes, scales, values = packed(out, inputs, bits, group)
        for rows in (1, 2, 4, 6, 7, 11):
            x = torch.randn(rows, inputs)
            x[:, 7] *= 300
            rounded = as_integers(x, activation_bits, group)
            found = multiply(
                x, codes, scales,
                bits=bits, group_size=group, kernel="compiled", activation_bits=activation_bits,
            )  # fmt: skip
            assert error_of(found, rounded @ values.T) < 5e-5, (group, rows)


def as_integers(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Round activations as the kernel does: 16 bits by sixteen groups, 8 bits by groups."""
    most, size = (32639.0, 16 * group) if bits == 16 else (127.0, group)
    parts = []
    for part in x.split(size, 1):
        largest = part.abs().amax(1, keepdim=True)
        parts.append((part * (most / largest)).round().double() * largest.double() / most)
    return torch.cat(parts, 1)


def test_a_group_without_values_and_one_that_is_not_finite(vectors: int) -> None:
    codes, scales, values = packed(9, 192, 4, 64)
    x = torch.randn(4, 192)
    x[0], x[1, 64:128], x[2, 70] = 0.0, 0.0, float("inf")
    found = multiply(x, codes, scales, bits=4, group_size=64, kernel="compiled", activation_bits=8)
    assert found.isfinite().all(1).tolist() == [True, True, False, True]
    assert not found[0].any()
    finite = x[[1, 3]]
    assert error_of(found[[1, 3]], finite.double() @ values.T) < 2e-2


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", FLOATS)
def test_rows_and_weights_may_lie_apart(vectors: int, kind: torch.dtype, rows: int) -> None:
    torch.manual_seed(2)
    codes, scales, values = packed(40, 256, 4, 64)
    x = torch.randn(rows * 2, 300).to(kind)[::2, 7:263]
    exact = x.double() @ values[3:19].T
    found = multiply(x, codes[3:19], scales[3:19], bits=4, group_size=64, kernel="compiled")
    assert error_of(found, exact) < LARGEST_ERROR[kind]
    columns = torch.randn(256, rows).to(kind).T
    exact = columns.double() @ values.T
    found = multiply(columns, codes, scales, bits=4, group_size=64, kernel="compiled")
    assert error_of(found, exact) < LARGEST_ERROR[kind]


def test_no_rows_give_no_rows(vectors: int) -> None:
    codes, scales, _ = packed(16, 64, 8, 32)
    found = multiply(torch.empty(0, 64), codes, scales, bits=8, group_size=32, kernel="compiled")
    assert found.shape == (0, 16)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", FLOATS)
def test_what_is_not_finite_spoils_its_own_row_only(
    vectors: int, kind: torch.dtype, wrong: float
) -> None:
    codes, scales, _ = packed(16, 256, 8, 64)
    x = torch.randn(3, 256).to(kind)
    x[1, 200] = wrong
    found = multiply(x, codes, scales, bits=8, group_size=64, kernel="compiled")
    assert found.isfinite().all(1).tolist() == [True, False, True]
    assert not found[1].isfinite().any()


@pytest.mark.parametrize("scale", [2.0**-24, 1e-7, 100.0])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_scales_and_activations_of_any_size(vectors: int, scale: float, size: float) -> None:
    torch.manual_seed(3)
    codes = torch.randint(0, 256, (16, 128), dtype=torch.uint8)
    scales = torch.full((16, 2, 2), scale).half()
    values = dequantise(codes, scales, 8, 64, torch.float32).double()
    x = torch.rand(2, 128) * size
    found = multiply(x, codes, scales, bits=8, group_size=64, kernel="compiled")
    assert error_of(found, x.double() @ values.T) < LARGEST_ERROR[torch.float32]


def test_zeros_give_the_bias(vectors: int) -> None:
    codes, scales, _ = packed(10, 64, 4, 32)
    bias = torch.randn(10)
    found = multiply(
        torch.zeros(3, 64), codes, scales, bits=4, group_size=32, bias=bias, kernel="compiled"
    )
    assert torch.equal(found, bias.expand(3, 10))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 33), (12, 1), (64, 1000)])
def test_products_of_16_bit_weights(
    vectors: int, shape: tuple[int, int], kind: torch.dtype
) -> None:
    torch.manual_seed(4)
    out, inputs = shape
    weight = (torch.randn(out, inputs + 3) * 0.02).to(kind)[:, :inputs]
    bias = torch.randn(out).to(kind)
    for rows in ROWS:
        x = torch.randn(rows, inputs).to(kind)
        exact = x.double() @ weight.double().T + bias.double()
        found = skinny_linear(x, weight, bias)
        assert error_of(found, exact) < LARGEST_ERROR[kind], rows


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
def test_unpacking_equals_pytorchs(vectors: int, bits: int, kind: torch.dtype) -> None:
    for group in (32, 64, 256):
        codes, scales, _ = packed(30, 512, bits, group)
        found = unpack(codes, scales, bits, group, kind)
        exact = dequantise(codes, scales, bits, group, kind)
        close = torch.finfo(kind).eps * exact.abs().max().double()
        assert float((found.double() - exact.double()).abs().max()) <= close


@pytest.mark.parametrize("rows", [3, 100])
def test_every_way_gives_the_same_product(rows: int) -> None:
    torch.manual_seed(5)
    codes, scales, values = packed(1100, 4096, 4, 64)
    x, bias = torch.randn(rows, 4096), torch.randn(1100)
    exact = x.double() @ values.T + bias.double()
    for kernel in KERNELS:
        found = multiply(x, codes, scales, bits=4, group_size=64, bias=bias, kernel=kernel)
        assert error_of(found, exact) < LARGEST_ERROR[torch.float32]
    found = by_unpacking(x, codes, scales, bits=4, group_size=64, bias=bias)
    assert error_of(found, exact) < 1e-6


def test_an_unknown_group_size_is_multiplied_by_unpacking_or_refused() -> None:
    codes, scales, values = packed(8, 96, 8, 24)
    x = torch.randn(2, 96)
    found = multiply(x, codes, scales, bits=8, group_size=24)
    assert error_of(found, x.double() @ values.T) < 1e-6
    with pytest.raises(ValueError, match=r"groups of 24.*Set dtype.kernel=auto"):
        multiply(x, codes, scales, bits=8, group_size=24, kernel="compiled")


def test_without_a_compiler_pytorch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: "no C++ compiler was found")
    codes, scales, values = packed(8, 64, 4, 32)
    x = torch.randn(2, 64)
    found = multiply(x, codes, scales, bits=4, group_size=32)
    assert error_of(found, x.double() @ values.T) < 1e-6
    with pytest.raises(ValueError, match="no C"):
        multiply(x, codes, scales, bits=4, group_size=32, kernel="compiled")
