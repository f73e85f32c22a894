"""Load the compiled products of products.cpp, and describe one to them."""

from __future__ import annotations

import ctypes
from functools import cache, partial

import torch

from zinfer.machine.cpp_library import PRODUCTS
from zinfer.worker.libraries import KINDS, load_library


class Product(ctypes.Structure):
    """The struct Product of products.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weights", "scales", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "out", "group")),
        *((name, ctypes.c_int64) for name in ("x_stride", "weight_stride", "scale_stride")),
        *((name, ctypes.c_int32) for name in ("bits", "kind", "threads", "activation_bits")),
    ]


library = partial(load_library, PRODUCTS)
"""Return the compiled kernel, or why there is none."""


@cache
def packed_rows(activation_bits: int) -> int:
    """Return up to how many rows packed weights are multiplied packed here; 0 without kernel."""
    lib = library()
    if isinstance(lib, str):
        return 0
    lib.zinfer_packed_rows.restype = ctypes.c_int64
    return int(lib.zinfer_packed_rows(activation_bits))


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x with each row's values side by side, copied only where they are not."""
    return x if x.stride(1) == 1 else x.contiguous()


def like(
    bias: torch.Tensor | None, x: torch.Tensor, part: slice | None = None
) -> torch.Tensor | None:
    """Return the bias, or a part of it, in the type of x."""
    if bias is None:
        return None
    return (bias if part is None else bias[part]).to(x.dtype).contiguous()


def product_of(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    bits: int = 16,
    group_size: int = 0,
    activation_bits: int = 16,
) -> Product:
    """Describe one product: rows x of [rows, in] with weights of [out, ...], into y."""
    return Product(
        x=x.data_ptr(),
        weights=weights.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        rows=x.shape[0],
        inputs=x.shape[1],
        out=weights.shape[0],
        group=group_size,
        x_stride=x.stride(0),
        weight_stride=weights.stride(0),
        scale_stride=0 if scales is None else scales.stride(0),
        bits=bits,
        kind=KINDS[x.dtype],
        threads=torch.get_num_threads(),
        activation_bits=activation_bits,
    )
