"""Products of a few rows with 16-bit weights, whatever their shapes and strides."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from zinfer.worker.quantised import native
from zinfer.worker.skinny.product import own_linear, skinny_linear, suits

KINDS = (torch.bfloat16, torch.float16)
LARGEST_ERROR = {torch.float16: 1e-3, torch.bfloat16: 3e-3}
"""Norm of the error over that of the result. bfloat16's own rounding is 2e-3."""


@pytest.fixture(autouse=True)
def _needs_the_kernel() -> None:
    if isinstance(reason := native.library(), str):
        pytest.skip(f"needs the compiled kernel: {reason}")


def assert_close(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: object) -> None:
    """Compare with the product in float64."""
    exact = x.double() @ weight.double().T
    if isinstance(bias, torch.Tensor):
        exact = exact + bias.double()
    assert found.dtype == x.dtype
    assert float((found.double() - exact).norm() / exact.norm()) < LARGEST_ERROR[x.dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("leading", [(1,), (3, 1), (2, 1, 2), (40, 1), (1, 5)])
@pytest.mark.parametrize(("out", "inputs"), [(1, 1), (5, 33), (130, 1000), (257, 64), (7, 9001)])
def test_results_are_those_of_the_product_in_float64(
    out: int, inputs: int, leading: tuple[int, ...], has_bias: bool, kind: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(out, inputs) * 0.05).to(kind)
    bias = torch.randn(out).to(kind) if has_bias else None
    x = torch.randn(*leading, inputs).to(kind)
    found = own_linear(x, weight, bias)
    assert found.shape == (*leading, out)
    assert_close(found, x, weight, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_weights_may_be_parts_of_larger_ones(kind: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 100).to(kind)[3:33, 5:70]
    every_other = torch.randn(4, 130).to(kind)[:, ::2]
    turned = torch.randn(65, 4).to(kind).T
    last_tokens = torch.randn(4, 7, 65).to(kind)[:, -1:]
    for x in (every_other, turned, last_tokens):
        assert_close(own_linear(x, weight), x, weight, None)


def test_a_bias_of_another_type_is_added_in_the_type_of_the_rows() -> None:
    torch.manual_seed(2)
    x, weight, bias = torch.randn(2, 64).bfloat16(), torch.randn(9, 64).bfloat16(), torch.randn(9)
    assert torch.equal(skinny_linear(x, weight, bias), skinny_linear(x, weight, bias.bfloat16()))


@pytest.mark.parametrize("inputs", [256, 2077])
def test_a_row_does_not_depend_on_the_rows_beside_it(inputs: int) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(13, inputs).bfloat16(), torch.randn(70, inputs).bfloat16()
    together = skinny_linear(x, weight)
    for row in range(13):
        assert torch.equal(skinny_linear(x[row : row + 1], weight)[0], together[row])


def test_pytorch_multiplies_what_the_kernel_does_not_take() -> None:
    torch.manual_seed(4)
    x, weight = torch.randn(2, 64), torch.randn(9, 64)
    by_columns = torch.randn(64, 9).bfloat16().T
    for rows, matrix in (
        (x, weight), (x.bfloat16(), by_columns), (x[:0].bfloat16(), weight.bfloat16()),
    ):  # fmt: skip
        assert not suits(rows, matrix)
        assert torch.equal(skinny_linear(rows, matrix), linear(rows, matrix))


def test_without_a_compiler_pytorch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: "no C++ compiler was found")
    x, weight = torch.randn(2, 64).bfloat16(), torch.randn(9, 64).bfloat16()
    assert torch.equal(skinny_linear(x, weight), linear(x, weight))
