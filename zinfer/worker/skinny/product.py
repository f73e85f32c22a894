"""Multiply a few rows with 16-bit weights, which PyTorch's linear does slowly on many processors.

Our own C++ kernel (quantised/products.cpp) reads each weight once. docs/quantised.md has
measurements.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch.nn import functional

from zinfer.machine.processor import cpu_flags
from zinfer.worker.quantised import native
from zinfer.worker.quantised.kernel import Kernel
from zinfer.worker.quantised.native import in_rows, like, product_of

SKINNY_ROWS = 32
"""Rows up to which our own product of 16-bit weights is faster than PyTorch's."""


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kernel: Kernel = "auto",
) -> torch.Tensor:
    """Multiply x [rows, in] with the transpose of weight [out, in] of the same type.

    Args:
        kernel: which way; "auto" takes the compiled kernel up to SKINNY_ROWS rows of 16 bits,
            except on processors with matrix units of their own, which have not been measured.

    Returns:
        [rows, out] in the type of x, accumulated in float32.
    """
    lib = native.library() if kernel in ("auto", "compiled") else ""
    suits = (
        isinstance(lib, ctypes.CDLL)
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.device.type == "cpu"
        and weight.stride(1) == 1
        and x.shape[0] > 0
        and (kernel == "compiled" or (x.shape[0] <= SKINNY_ROWS and skinny_wins()))
    )
    if not suits:
        return functional.linear(x, weight, bias)
    assert isinstance(lib, ctypes.CDLL), "checked by suits"
    x, bias = in_rows(x), like(bias, x)
    y = x.new_empty(x.shape[0], weight.shape[0])
    refused = lib.zinfer_skinny_product(ctypes.byref(product_of(x, weight, None, bias, y)))
    assert refused == 0, "types are checked above"
    return y


@cache
def skinny_wins() -> bool:
    """Tell whether our product of 16-bit weights is known to be faster on this processor."""
    lib = native.library()
    return isinstance(lib, ctypes.CDLL) and lib.zinfer_vector_bits() > 0 and not _matrix_units()


def _matrix_units() -> bool:
    return any(flag.startswith("amx") for flag in cpu_flags())
