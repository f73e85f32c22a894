"""Multiply a few rows with 16-bit weights, which PyTorch's linear does slowly on many processors.

Our own C++ kernel (quantised/products.cpp) reads each weight once, straight through. Sums are in
float32, so a result differs from PyTorch's by its last bit now and then.
"""

from __future__ import annotations

import ctypes

import torch
from torch.nn import functional

from zinfer.worker.quantised import native
from zinfer.worker.quantised.native import in_rows, like, product_of

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply x [rows, in] with the transpose of weight [out, in], and add the bias.

    PyTorch multiplies what the kernel does not take: other types than 16 bits on both sides, other
    devices, and everything where there is no C++ compiler.

    Returns:
        [rows, out] in the type of x, accumulated in float32.
    """
    lib = native.library()
    if isinstance(lib, str) or not suits(x, weight):
        return functional.linear(x, weight, bias)
    x, bias = in_rows(x), like(bias, x)
    y = x.new_empty(x.shape[0], weight.shape[0])
    refused = lib.zinfer_skinny_product(ctypes.byref(product_of(x, weight, None, bias, y)))
    assert refused == 0, "types are checked by suits"
    return y


def own_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute functional.linear by our kernel: x is [..., in], the result [..., out]."""
    y = skinny_linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Tell if the kernel multiplies these."""
    return (
        x.dtype == weight.dtype
        and x.dtype in SIXTEEN_BITS
        and x.device.type == weight.device.type == "cpu"
        and weight.stride(1) == 1
        and x.numel() > 0
        and weight.shape[0] > 0
    )
