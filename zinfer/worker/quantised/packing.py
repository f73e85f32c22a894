"""Lay out a packed weight, pack one, and multiply with it.

Its bytes: the codes of all rows, then scale and minimum of all groups in float16. A row is one
output; experts follow one another, row by row. They are kept as bit patterns of the compute type:
DeepSpeed would silently cast other types when it swaps to NVMe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch.nn import functional

from zinfer.config import DtypeConfig
from zinfer.model.parameters import Parameter
from zinfer.model.quantisable import groups_of, packed_bytes
from zinfer.worker.kv_cache.codes import dequantise, quantise
from zinfer.worker.quantised import kernel
from zinfer.worker.quantised.direct import DirectProduct, direct_product

BLOCK_NUMEL = 1 << 20
"""Values that are packed at a time, so that their float32 copies stay small."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The layout of one packed weight."""

    shape: tuple[int, ...]
    """As the model has it: [out, in], or [experts, out, in]."""
    is_transposed: bool
    """The model has it as [in, out], or [experts, in, out]."""
    bits: int
    group_size: int
    symmetric: bool = False
    route: Literal["auto", "compiled", "torch", "unpack"] = "auto"
    """As dtype.kernel."""
    activation_bits: Literal[16, 8] = 16
    """As dtype.product_bits."""

    @classmethod
    def of(cls, parameter: Parameter, bits: int, dtype: DtypeConfig) -> Packing:
        """Lay out this parameter of a model."""
        return cls(
            shape=parameter.shape,
            is_transposed=parameter.is_transposed,
            bits=bits,
            group_size=dtype.group_size,
            symmetric=dtype.symmetric,
            route=dtype.kernel,
            activation_bits=dtype.product_bits,
        )

    @property
    def numel(self) -> int:
        """Return the weight's elements."""
        return math.prod(self.shape)

    @property
    def inputs(self) -> int:
        """Return the elements of a row."""
        return self.shape[-2 if self.is_transposed else -1]

    @property
    def outputs(self) -> int:
        """Return the rows of one matrix."""
        return self.shape[-1 if self.is_transposed else -2]

    @property
    def groups(self) -> int:
        """Return the groups of a row; the last one may be filled up."""
        return groups_of(self.inputs, self.group_size)

    @cached_property
    def direct(self) -> DirectProduct | None:
        """Return the products by address; None where the kernel has none."""
        return direct_product(
            inputs=self.inputs,
            outputs=self.outputs,
            matrices=self.numel // (self.inputs * self.outputs),
            bits=self.bits,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
            route=self.route,
        )

    @property
    def code_bytes(self) -> int:
        """Return the bytes of a row's codes."""
        return self.groups * self.group_size * self.bits // 8

    @property
    def bytes(self) -> int:
        """Return the bytes of all codes and scales."""
        return packed_bytes(self.numel, self.inputs, self.bits, self.group_size)

    def stored_numel(self, dtype: torch.dtype) -> int:
        """Return the elements of the parameter that holds the bytes."""
        return -(-self.bytes // dtype.itemsize)

    def stored(self, raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Turn the bytes of codes and scales into the parameter, filled up to whole elements."""
        assert raw.numel() == self.bytes, (raw.numel(), self.bytes)
        return functional.pad(raw, (0, -self.bytes % dtype.itemsize)).view(dtype)

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """View a packed weight as codes [rows, code_bytes] and scales [rows, groups, 2]."""
        rows = self.numel // self.inputs
        raw = packed.view(torch.uint8)
        end = rows * self.code_bytes
        scales = raw[end : self.bytes].view(torch.float16)
        return raw[:end].view(rows, self.code_bytes), scales.view(rows, self.groups, 2)

    def matrix(self, packed: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """View one matrix of several, such as an expert's, as codes and scales."""
        codes, scales = self.split(packed)
        part = slice(number * self.outputs, (number + 1) * self.outputs)
        return codes[part], scales[part]


def pack(
    weight: torch.Tensor, packing: Packing, dtype: torch.dtype, rows: range | None = None
) -> torch.Tensor:
    """Pack a weight of the model's shape into one dimension of `dtype`.

    Args:
        rows: packs only these; the bytes of others are left as they come.
    """
    packed = torch.empty(packing.stored_numel(dtype), dtype=dtype, device=weight.device)
    packed.view(torch.uint8)[packing.bytes :] = 0
    codes, scales = packing.split(packed)
    for part, block in row_blocks(weight, packing, rows):
        codes[part], scales[part] = quantise(
            block, packing.bits, packing.group_size, symmetric=packing.symmetric,
            compiled=packing.route in ("auto", "compiled"),
        )  # fmt: skip
    return packed


def row_blocks(
    weight: torch.Tensor, packing: Packing, chosen: range | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows of the packed layout and their values in float32, last groups filled up.

    They are filled with the row's last value, which leaves the group's range as it is.

    Args:
        chosen: yields only these rows, counted over all matrices.
    """
    matrices = weight.view(-1, *weight.shape[-2:])
    step = max(1, BLOCK_NUMEL // packing.inputs)
    missing = packing.groups * packing.group_size - packing.inputs
    for number, matrix in enumerate(matrices):
        rows = matrix.T if packing.is_transposed else matrix
        before = number * packing.outputs
        begin, end = 0, len(rows)
        if chosen is not None:
            begin, end = max(begin, chosen.start - before), min(end, chosen.stop - before)
        for start in range(begin, end, step):
            block = rows[start : min(start + step, end)].float()
            if missing:
                block = torch.cat([block, block[:, -1:].expand(-1, missing)], 1)
            first = before + start
            yield slice(first, first + len(block)), block


def unpack(packed: torch.Tensor, packing: Packing, dtype: torch.dtype) -> torch.Tensor:
    """Return all values in the model's shape, contiguous."""
    codes, scales = packing.split(packed)
    values = dequantise(codes, scales, packing.bits, packing.group_size, dtype)
    rows = values[:, : packing.inputs]
    if packing.is_transposed:
        rows = rows.reshape(-1, packing.outputs, packing.inputs).transpose(-1, -2)
    return rows.reshape(packing.shape).contiguous()


def product(
    x: torch.Tensor,
    packed: torch.Tensor,
    packing: Packing,
    bias: torch.Tensor | None = None,
    number: int = 0,
) -> torch.Tensor:
    """Multiply x [..., in] with one matrix, as nn.Linear does. Return [..., out].

    Args:
        number: which matrix, where there are several.
    """
    direct = packing.direct
    y = None if direct is None else direct(x, packed, number, bias)
    if y is not None:
        return y
    codes, scales = packing.matrix(packed, number)
    flat = x.reshape(-1, x.shape[-1])
    missing = packing.groups * packing.group_size - packing.inputs
    if missing:  # nothing is added by what fills a group up
        flat = functional.pad(flat, (0, missing))
    bits, group_size = packing.bits, packing.group_size
    if packing.route == "unpack":
        out = functional.linear(flat, dequantise(codes, scales, bits, group_size, x.dtype), bias)
    else:
        out = kernel.multiply(
            flat, codes, scales,
            bits=bits, group_size=group_size, bias=bias, kernel=packing.route,
            activation_bits=packing.activation_bits,
        )  # fmt: skip
    return out.view(*x.shape[:-1], out.shape[-1])


def rows_of(
    packed: torch.Tensor, packing: Packing, ids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the rows of an embedding [..., in]; only these are unpacked."""
    codes, scales = packing.split(packed)
    values = dequantise(codes[ids], scales[ids], packing.bits, packing.group_size, dtype)
    return values[..., : packing.inputs]


def rounding_fault(
    weight: torch.Tensor, packed: torch.Tensor, packing: Packing, rows: range | None = None
) -> str | None:
    """Say where a packed weight is further from its source than rounding allows; None: nowhere.

    The bound is half a step of the group, and what float16 makes of its minimum.

    Args:
        rows: looks only at these.
    """
    codes, scales = packing.split(packed)
    for part, block in row_blocks(weight, packing, rows):
        held = dequantise(
            codes[part], scales[part], packing.bits, packing.group_size, torch.float32
        )
        step, least = (each.float().abs() for each in scales[part].unbind(-1))
        steps = (1 << packing.bits) - 1
        slack = 2.0**-10 * (least + steps * step) + steps * 2.0**-24
        bound = (step / 2 + slack).repeat_interleave(packing.group_size, -1)
        wrong = (~((held - block).abs() <= bound)).nonzero()  # a NaN is wrong too
        if len(wrong):
            row, column = wrong[0].tolist()
            return (
                f"row {part.start + row}, column {column} holds {held[row, column]:g} "
                f"for {block[row, column]:g}"
            )
    return None
