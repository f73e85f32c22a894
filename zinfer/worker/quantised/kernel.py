"""Multiply activations with packed weights.

The packed layout is that of kv_cache/codes.py, in groups along the input dimension.
A few rows are multiplied packed, by our own C++ kernel: it reads each weight once and is as fast
as memory. With many rows arithmetic is the limit. Where PyTorch's is faster, weights are unpacked,
a part at a time, and PyTorch multiplies. docs/quantised.md has the measurements.
A GPU's few rows are multiplied packed by a kernel in Triton (gpu.py).
"""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch.nn import functional

from zinfer.plan.products import ROWS_PACKED_ON_GPU
from zinfer.worker.kv_cache.codes import dequantise
from zinfer.worker.libraries import KINDS
from zinfer.worker.quantised import gpu, native
from zinfer.worker.quantised.native import in_rows, like, product_of

Kernel = Literal["auto", "compiled", "torch", "unpack"]
"""Ways to multiply, as `dtype.kernel` names them.

`auto` takes the compiled kernel where it suits: ours in C++, or on a GPU in Triton. `torch` unpacks
with PyTorch, because PyTorch's own packed products take other schemes (docs/quantised.md). `unpack`
makes a plain matrix, compiled where that is possible, however few rows there are.
"""
GPU = "cuda"
"""The type of device whose packed products are Triton's. Tests let a processor stand in."""
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
UNPACKED_NUMEL = 1 << 22
"""Weights that are unpacked at a time: they stay in the cache until they are multiplied."""


def multiply(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None = None,
    kernel: Kernel = "auto",
    activation_bits: int = 16,
) -> torch.Tensor:
    """Multiply x with the transpose of a packed weight, and add the bias.

    The compiled kernel rounds activations to 16-bit integers: its error is at most
    sum |w| * max |x| / 65278 over each sixteen groups, less than the rounding of a bfloat16 result.
    With 8 bits it is at most sum |w| * max |x| / 254 over each group.
    It gives NaN for a row that has a NaN or an infinity.

    Args:
        x: [rows, in] in float32, bfloat16 or float16.
        codes: uint8 [out, in * bits / 8].
        scales: float16 [out, in / group_size, 2]: scale and minimum of each group.
        bits: 8 or 4.
        group_size: inputs that share a scale.
        bias: [out] or None.
        kernel: which way; "auto" takes the compiled kernel up to `native.packed_rows`, on a GPU up
            to ROWS_PACKED_ON_GPU.
        activation_bits: 16 or 8; only where the compiled kernel multiplies packed weights.

    Returns:
        [rows, out] in the type of x.

    Raises:
        ValueError: kernel="compiled" and the compiled kernel cannot multiply these.
    """
    if x.device.type == GPU:
        return _on_gpu(x, codes, scales, bits, group_size, bias, kernel)
    problem = "" if kernel == "torch" else unsupported(x, codes, scales, bits, group_size)
    if problem and kernel == "compiled":
        raise ValueError(f"dtype.kernel=compiled: {problem}. Set dtype.kernel=auto")
    if problem or kernel == "torch":
        return by_unpacking(x, codes, scales, bits=bits, group_size=group_size, bias=bias)
    lib = native.library()
    assert isinstance(lib, ctypes.CDLL), "checked by unsupported"
    if kernel == "unpack" or (
        kernel == "auto" and x.shape[0] > native.packed_rows(activation_bits)
    ):
        return _by_parts(lib, x, codes, scales, bits, group_size, bias)
    y = x.new_empty(x.shape[0], codes.shape[0])
    if y.numel() == 0:
        return y
    x, bias = in_rows(x), like(bias, x)
    product = product_of(
        x, codes, scales, bias, y,
        bits=bits, group_size=group_size, activation_bits=activation_bits,
    )  # fmt: skip
    refused = lib.zinfer_packed_product(ctypes.byref(product))
    assert refused == 0, "sizes are checked by unsupported"
    return y


def _on_gpu(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
    kernel: Kernel,
) -> torch.Tensor:
    """Multiply a few rows by the kernel in Triton where it proves itself, and others unpacked."""
    is_few = kernel == "compiled" or (kernel == "auto" and x.shape[0] <= ROWS_PACKED_ON_GPU)
    problem = gpu.refused(x.device, x.dtype, bits, group_size) if is_few else ""
    if problem and kernel == "compiled":
        raise ValueError(f"dtype.kernel=compiled: {problem}. Set dtype.kernel=auto")
    if problem or not is_few:
        return by_unpacking(x, codes, scales, bits=bits, group_size=group_size, bias=bias)
    return gpu.kernel().multiply(x, codes, scales, bits=bits, group_size=group_size, bias=bias)


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
    lib = native.library()
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
        y[:, part] = functional.linear(x, weight, like(bias, x, part))
    return y


def unpack(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Turn packed weights into values [out, in] of `dtype`, compiled where that is possible."""
    inputs = codes.shape[1] * 8 // bits
    weight = torch.empty(codes.shape[0], inputs, dtype=dtype, device=codes.device)
    problem = unsupported(weight, codes, scales, bits, group_size)
    lib = native.library()
    if problem or not isinstance(lib, ctypes.CDLL):
        return dequantise(codes, scales, bits, group_size, dtype)
    product = product_of(weight, codes, scales, None, weight, bits=bits, group_size=group_size)
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
        product = product_of(
            buffer, some, scales[part], None, buffer, bits=bits, group_size=group_size
        )
        refused = lib.zinfer_unpack(ctypes.byref(product))
        assert refused == 0, "sizes are checked by unsupported"
        y[:, part] = functional.linear(x, buffer, like(bias, x, part))
    return y


def _parts(out: int, inputs: int) -> list[slice]:
    step = max(32, UNPACKED_NUMEL // max(1, inputs))
    return [slice(start, min(out, start + step)) for start in range(0, out, step)]
