"""Store numbers in 8 or 4 bits, in groups along the head dimension.

Each group of a head vector has a scale and a minimum in float16: value = scale * code + minimum.
Groups never span two tokens, so a token is appended without touching the others.
Two 4-bit codes share a byte: byte j of a group of g values holds value j in its low half and value
j + g/2 in its high half. The kernel in decode_attention.cpp reads the same layout, and the one in
pack_codes.cpp writes it: bit for bit what the operators here give.
"""

from __future__ import annotations

import torch

from zinfer.worker.kv_cache import packer

LARGEST_HALF = 65504.0
SMALLEST_SCALE = 2.0**-24
"""The smallest number above zero in float16."""


def quantise(
    values: torch.Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    compiled: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round values to codes.

    Args:
        values: [..., dim] in any floating type.
        bits: 8 or 4.
        group_size: values that share a scale; divides dim.
        symmetric: zero is the code in the middle, 2^(bits-1), and the minimum follows from it.
        compiled: use our C++ kernel where it can pack these; False: PyTorch's operators.

    Returns:
        Codes as bytes [..., dim * bits / 8], and scales with minima [..., dim / group_size, 2] in
        float16.
    """
    if not compiled or packer.unsupported(values, group_size) is not None:
        return quantise_with_torch(values, bits, group_size, symmetric=symmetric)
    *lead, dim = values.shape
    codes = torch.empty(*lead, dim * bits // 8, dtype=torch.uint8)
    scales = torch.empty(*lead, dim // group_size, 2, dtype=torch.float16)
    packer.pack_into(values, codes, scales, bits=bits, group_size=group_size, symmetric=symmetric)
    return codes, scales


def quantise_into(
    values: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    group_size: int,
    *,
    compiled: bool = True,
) -> None:
    """Round values to codes as `quantise` does, into tensors of any strides between tokens."""
    if compiled and packer.unsupported(values, group_size) is None:
        packer.pack_into(values, codes, scales, bits=bits, group_size=group_size, symmetric=False)
        return
    made = quantise_with_torch(values, bits, group_size)
    codes.copy_(made[0])
    scales.copy_(made[1])


def quantise_with_torch(
    values: torch.Tensor, bits: int, group_size: int, *, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round values to codes with PyTorch's operators, on any device. Arguments as `quantise`."""
    groups = values.float().unflatten(-1, (-1, group_size))
    steps = (1 << bits) - 1
    least = groups.amin(-1, keepdim=True).clamp(-LARGEST_HALF, LARGEST_HALF).half().float()
    least = least + 0.0  # no negative zero
    most = groups.amax(-1, keepdim=True)
    if symmetric:
        middle = 1 << (bits - 1)
        reach = torch.maximum(-groups.amin(-1, keepdim=True) / middle, most / (middle - 1))
        scale = _half_scale(reach, LARGEST_HALF / middle)
        least = -scale * middle
    else:
        scale = _half_scale((most - least) / steps, LARGEST_HALF)
    codes = ((groups - least) / scale).round_().clamp_(0, steps).to(torch.uint8)
    if bits == 4:
        half = group_size // 2
        codes = codes[..., :half] | (codes[..., half:] << 4)
    return codes.flatten(-2), torch.cat([scale, least], -1).half()


def _half_scale(scale: torch.Tensor, largest: float) -> torch.Tensor:
    """Round scales to float16, so that codes are chosen with what will be stored."""
    return scale.clamp(SMALLEST_SCALE, largest).half().float()


def dequantise(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Turn codes back into values [..., dim] of `dtype`. The inverse of `quantise`."""
    if bits == 4:
        packed = codes.unflatten(-1, (-1, group_size // 2))
        groups = torch.cat([packed & 15, packed >> 4], -1)
    else:
        groups = codes.unflatten(-1, (-1, group_size))
    values = torch.addcmul(scales[..., 1:].float(), groups.float(), scales[..., :1].float())
    return values.flatten(-2).to(dtype)
