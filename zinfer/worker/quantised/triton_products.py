"""Multiply a few rows with packed weights on a GPU, by a kernel in Triton.

A program makes a few outputs. It goes along their rows of weights, a block of groups at a time, and
reads each byte once; the next two blocks are on their way meanwhile. With one row of x, values are
multiplied one by one. With more, the GPU's matrix units multiply; they take at least sixteen rows.
Sums are in float32.

gpu.py imports this module where Triton is installed. CUDA builds of torch bring it along.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zinfer.worker.quantised.native import like

WARPS = 4
"""Of a program: 128 threads."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A part of the weights and of x that a program works on at a time."""

    rows: int
    """Of x."""
    outputs: int
    groups: int
    """Of each row of weights."""

    @classmethod
    def of(cls, rows: int, bits: int, group_size: int, dtype: torch.dtype) -> Block:
        """Choose it for so many rows of x in `dtype`. All sizes are powers of two.

        One row: 512 bytes of a row of weights are four cache lines, and 4 KiB of codes are two
        loads of sixteen bytes for each thread. A weight of 4096 outputs is 512 programs, about four
        for each of an H100's 132 multiprocessors. With three blocks each, 6 MB are on their way.
        That is more than the 2 MB that arrive at 3.35 TB/s in 600 ns, about the time of one load.

        More rows: tiles as small as matrix units take, so that there are many programs. All values
        fit the registers and 99 KB of shared memory, as GPUs of compute capability 8.6 have them.
        float32 takes twice as much of both, so sixteen rows at a time.

        Sources: Little's law; NVIDIA's H100 data sheet; CUDA C++ Programming Guide, "Device Memory
        Accesses" and "Technical Specifications per Compute Capability".
        """
        if rows == 1:
            return cls(rows=1, outputs=8, groups=512 * 8 // (group_size * bits))
        if rows <= 16 or dtype == torch.float32:
            return cls(rows=16, outputs=16, groups=256 // group_size)
        if rows <= 32:
            return cls(rows=32, outputs=32, groups=256 // group_size)
        return cls(rows=64, outputs=32, groups=128 // group_size)


def multiply(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply x [rows, in] with a packed weight. Arguments and result as those of kernel.multiply.

    Codes and scales must be contiguous, and the group size 32, 64 or 128.
    """
    rows, (out, groups) = x.shape[0], scales.shape[:2]
    y = x.new_empty(rows, out)
    if y.numel() == 0:
        return y
    block = Block.of(rows, bits, group_size, x.dtype)
    has_bias, addend = bias is not None, like(bias, x)
    if scales.data_ptr() % 4:  # a gathered weight may begin anywhere
        scales = scales.clone()
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _product[triton.cdiv(out, block.outputs), triton.cdiv(rows, block.rows)](
            x.contiguous(), codes, scales.view(torch.int32), addend if has_bias else y, y,
            rows, out, groups, int(has_bias),
            BITS=bits, GROUP=group_size, ROWS=block.rows, OUTPUTS=block.outputs,
            GROUPS=block.groups, num_warps=WARPS,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows", "out", "groups", "has_bias"])
def _product(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    bias,
    y,
    rows,
    out,
    groups,
    has_bias,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Make OUTPUTS outputs of ROWS rows; a block of codes is [OUTPUTS, GROUPS, BYTES]."""
    BYTES: tl.constexpr = GROUP * BITS // 8
    first_output, first_row = tl.program_id(0) * OUTPUTS, tl.program_id(1) * ROWS
    output, row, byte = tl.arange(0, OUTPUTS), tl.arange(0, ROWS), tl.arange(0, BYTES)
    has_output, has_row = first_output + output < out, first_row + row < rows
    codes += first_output.to(tl.int64) * groups * BYTES
    scales += first_output.to(tl.int64) * groups
    x += first_row.to(tl.int64) * groups * GROUP
    y += first_row.to(tl.int64) * out + first_output
    if ROWS == 1:
        total = tl.zeros([OUTPUTS, GROUPS, BYTES], tl.float32)
    else:
        total = tl.zeros([GROUPS, OUTPUTS, ROWS], tl.float32)
    for first_group in tl.range(0, groups, GROUPS, num_stages=3):
        group = first_group + tl.arange(0, GROUPS)
        has_group = group < groups
        place = output[:, None, None] * groups + group[None, :, None]
        is_there = has_output[:, None, None] & has_group[None, :, None]
        packed = tl.load(codes + place * BYTES + byte[None, None, :], is_there, 0)
        pair = tl.load(scales + place, is_there, 0)
        scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        least = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        value = x + group[:, None, None] * GROUP + byte[None, :, None]
        value += row[None, None, :] * groups * GROUP
        is_value = has_group[:, None, None] & has_row[None, None, :]
        if BITS == 8:
            total = _added(total, packed, scale, least, tl.load(value, is_value, 0.0), ROWS)
        else:  # value j of a group is in the low half of byte j, value j + BYTES in the high half
            total = _added(total, packed & 15, scale, least, tl.load(value, is_value, 0.0), ROWS)
            value += BYTES
            total = _added(total, packed >> 4, scale, least, tl.load(value, is_value, 0.0), ROWS)
    sums = tl.sum(tl.sum(total, 2), 1)[:, None] if ROWS == 1 else tl.sum(total, 0)
    addend = tl.load(bias + first_output + output, has_output & (has_bias != 0), 0.0)
    sums += addend.to(tl.float32)[:, None]
    place_of_sum = y + row[None, :] * out + output[:, None]
    tl.store(place_of_sum, sums.to(y.dtype.element_ty), has_output[:, None] & has_row[None, :])


@triton.jit
def _added(total, codes, scale, least, x, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add products of codes [OUTPUTS, GROUPS, BYTES] with x [GROUPS, BYTES, ROWS]."""
    weights = codes.to(tl.float32) * scale + least
    if ROWS == 1:
        total += weights * tl.permute(x.to(tl.float32), (2, 0, 1))
    else:
        weights = tl.permute(weights.to(x.dtype), (1, 0, 2))
        total = tl.dot(weights, x, total, input_precision="ieee")
    return total
