"""Multiply activations with packed weights, or skinny activations with 16-bit weights.

The packed layout is that of kv_cache/codes.py, in groups along the input dimension.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from zinfer.worker.kv_cache.codes import dequantise

UNPACKED_NUMEL = 1 << 24
"""Weights that are unpacked at a time: no second copy of a large matrix."""


def multiply(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply x with the transpose of a packed weight, and add the bias.

    Args:
        x: [rows, in] in float32, bfloat16 or float16.
        codes: uint8 [out, in * bits / 8].
        scales: float16 [out, in / group_size, 2]: scale and minimum of each group.
        bits: 8 or 4.
        group_size: inputs that share a scale.
        bias: [out] or None.

    Returns:
        [rows, out] in the type of x.
    """
    return by_unpacking(x, codes, scales, bits=bits, group_size=group_size, bias=bias)


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply x [rows, in] with the transpose of weight [out, in] of the same type."""
    return functional.linear(x, weight, bias)


def by_unpacking(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Unpack the weight, some rows at a time, and multiply. Arguments as those of `multiply`."""
    out = torch.empty(x.shape[0], codes.shape[0], dtype=x.dtype, device=x.device)
    step = max(1, UNPACKED_NUMEL // x.shape[1])
    for start in range(0, codes.shape[0], step):
        part = slice(start, start + step)
        weight = dequantise(codes[part], scales[part], bits, group_size, x.dtype)
        added = None if bias is None else bias[part].to(x.dtype)
        out[:, part] = functional.linear(x, weight, added)
    return out
