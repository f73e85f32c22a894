"""Multiply activations with packed weights, or skinny activations with 16-bit weights.

The packed layout is that of kv_cache/codes.py, in groups along the input dimension.
A few rows are multiplied packed, by our own C++ kernel: it reads each weight once and is as fast
as memory. From PACKED_ROWS on arithmetic is the limit: weights are unpacked, a part at a time, and
PyTorch multiplies. docs/quantised.md has the measurements.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal

import torch
from torch.nn import functional

from zinfer.machine.cpp_library import PRODUCTS, CannotBuild, build_library
from zinfer.machine.processor import cpu_flags
from zinfer.worker.kv_cache.codes import dequantise

Kernel = Literal["auto", "compiled", "torch", "unpack"]
"""Ways to multiply, as `dtype.kernel` names them.

`auto` takes the compiled kernel where it suits; `torch` unpacks with PyTorch, because PyTorch's own
packed products take other schemes (docs/quantised.md); `unpack` makes a plain matrix, compiled
where that is possible, however few rows there are.
"""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
PACKED_ROWS = 64
"""Rows up to which packed weights are multiplied packed."""
SKINNY_ROWS = 32
"""Rows up to which our own product of 16-bit weights is faster than PyTorch's."""
UNPACKED_NUMEL = 1 << 22
"""Weights that are unpacked at a time: they stay in the cache until they are multiplied."""


class _Product(ctypes.Structure):
    """The struct Product of products.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weights", "scales", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "out", "group")),
        *((name, ctypes.c_int64) for name in ("x_stride", "weight_stride", "scale_stride")),
        *((name, ctypes.c_int32) for name in ("bits", "kind", "threads")),
    ]


@cache
def library() -> ctypes.CDLL | str:
    """Load the compiled kernel, compiling it the first time. Where it cannot be, say why."""
    try:
        return ctypes.CDLL(str(build_library(PRODUCTS)))
    except (CannotBuild, OSError) as error:
        return str(error)


def multiply(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None = None,
    kernel: Kernel = "auto",
) -> torch.Tensor:
    """Multiply x with the transpose of a packed weight, and add the bias.

    The compiled kernel rounds activations to 16-bit integers: its error is at most
    sum |w| * max |x| / 65534 over each sixteen groups, less than the rounding of a bfloat16 result.
    It gives NaN for a row that has a NaN or an infinity.

    Args:
        x: [rows, in] in float32, bfloat16 or float16.
        codes: uint8 [out, in * bits / 8].
        scales: float16 [out, in / group_size, 2]: scale and minimum of each group.
        bits: 8 or 4.
        group_size: inputs that share a scale.
        bias: [out] or None.
        kernel: which way; "auto" takes the compiled kernel up to PACKED_ROWS rows.

    Returns:
        [rows, out] in the type of x.

    Raises:
        ValueError: kernel="compiled" and the compiled kernel cannot multiply these.
    """
    problem = "" if kernel == "torch" else unsupported(x, codes, scales, bits, group_size)
    if problem and kernel == "compiled":
        raise ValueError(f"dtype.kernel=compiled: {problem}. Set dtype.kernel=auto")
    if problem or kernel == "torch":
        return by_unpacking(x, codes, scales, bits=bits, group_size=group_size, bias=bias)
    lib = library()
    assert isinstance(lib, ctypes.CDLL), "checked by unsupported"
    if kernel == "unpack" or (x.shape[0] > PACKED_ROWS and kernel == "auto"):
        return _by_parts(lib, x, codes, scales, bits, group_size, bias)
    y = x.new_empty(x.shape[0], codes.shape[0])
    if y.numel() == 0:
        return y
    x, bias = _in_rows(x), _like(bias, x)
    product = _product(x, codes, scales, bias, y, bits=bits, group_size=group_size)
    refused = lib.zinfer_packed_product(ctypes.byref(product))
    assert refused == 0, "sizes are checked by unsupported"
    return y


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
    lib = library() if kernel in ("auto", "compiled") else ""
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
    x, bias = _in_rows(x), _like(bias, x)
    y = x.new_empty(x.shape[0], weight.shape[0])
    refused = lib.zinfer_skinny_product(ctypes.byref(_product(x, weight, None, bias, y)))
    assert refused == 0, "types are checked above"
    return y


@cache
def skinny_wins() -> bool:
    """Tell whether our product of 16-bit weights is known to be faster on this processor."""
    lib = library()
    return isinstance(lib, ctypes.CDLL) and lib.zinfer_vector_bits() > 0 and not _matrix_units()


def _matrix_units() -> bool:
    return any(flag.startswith("amx") for flag in cpu_flags())


def unsupported(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int
) -> str:
    """Say why the compiled kernel cannot multiply these; "" where it can."""
    if x.device.type != "cpu":
        return f"the compiled kernel runs on the processor, and x is on {x.device}"
    if x.dtype not in KINDS:
        return f"activations are {x.dtype}"
    if bits not in (4, 8) or group_size not in GROUP_SIZES:
        return f"{bits} bits in groups of {group_size}; the kernel has 4 and 8 bits, {GROUP_SIZES}"
    if codes.stride(-1) != 1 or scales.stride(-1) != 1 or scales.stride(-2) != 2:
        return "codes or scales do not lie row by row"
    inputs, groups = codes.shape[1] * 8 // bits, scales.shape[1]
    if x.shape[1] != inputs or groups * group_size != inputs:
        return f"x has {x.shape[1]} inputs, the codes {inputs}, the scales {groups * group_size}"
    lib = library()
    return lib if isinstance(lib, str) else ""


def by_unpacking(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Unpack the weight with PyTorch, some rows at a time. Arguments as those of `multiply`."""
    y = x.new_empty(x.shape[0], codes.shape[0])
    for part in _parts(codes.shape[0], x.shape[1]):
        weight = dequantise(codes[part], scales[part], bits, group_size, x.dtype)
        y[:, part] = functional.linear(x, weight, _like(bias, x, part))
    return y


def unpack(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Turn packed weights into values [out, in] of `dtype`, compiled where that is possible."""
    inputs = codes.shape[1] * 8 // bits
    weight = torch.empty(codes.shape[0], inputs, dtype=dtype, device=codes.device)
    problem = unsupported(weight, codes, scales, bits, group_size)
    lib = library()
    if problem or not isinstance(lib, ctypes.CDLL):
        return dequantise(codes, scales, bits, group_size, dtype)
    product = _product(weight, codes, scales, None, weight, bits=bits, group_size=group_size)
    refused = lib.zinfer_unpack(ctypes.byref(product))
    assert refused == 0, "sizes are checked by unsupported"
    return weight


def _by_parts(
    lib: ctypes.CDLL,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Unpack with the compiled kernel into one small buffer, again and again, and multiply."""
    y = x.new_empty(x.shape[0], codes.shape[0])
    buffer: torch.Tensor | None = None
    for part in _parts(codes.shape[0], x.shape[1]):
        some = codes[part]
        if buffer is None or buffer.shape[0] != some.shape[0]:
            buffer = x.new_empty(some.shape[0], x.shape[1])
        product = _product(
            buffer, some, scales[part], None, buffer, bits=bits, group_size=group_size
        )
        refused = lib.zinfer_unpack(ctypes.byref(product))
        assert refused == 0, "sizes are checked by unsupported"
        y[:, part] = functional.linear(x, buffer, _like(bias, x, part))
    return y


def _parts(out: int, inputs: int) -> list[slice]:
    step = max(32, UNPACKED_NUMEL // max(1, inputs))
    return [slice(start, min(out, start + step)) for start in range(0, out, step)]


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _like(
    bias: torch.Tensor | None, x: torch.Tensor, part: slice | None = None
) -> torch.Tensor | None:
    if bias is None:
        return None
    return (bias if part is None else bias[part]).to(x.dtype).contiguous()


def _product(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    bits: int = 16,
    group_size: int = 0,
) -> _Product:
    return _Product(
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
    )
