"""Multiply packed weights by their addresses, so that a product of one row costs little Python.

Nothing here holds a weight: ZeRO-3 may free it after each use, and give it another address.
"""

from __future__ import annotations

import ctypes

import torch

from zinfer.worker.libraries import KINDS
from zinfer.worker.quantised import native
from zinfer.worker.quantised.kernel import GROUP_SIZES
from zinfer.worker.quantised.native import Product, packed_rows

WITHOUT_LIMIT = 1 << 62


class DirectProduct:
    """The products with one packed weight: all that stays the same from use to use."""

    def __init__(
        self,
        *,
        inputs: int,
        outputs: int,
        matrices: int,
        bits: int,
        group_size: int,
        activation_bits: int,
        most_rows: int,
    ) -> None:
        """Describe a weight of `matrices` times [outputs, inputs], packed one after the other."""
        self._inputs, self._outputs, self._most_rows = inputs, outputs, most_rows
        code_stride, groups = inputs * bits // 8, inputs // group_size
        self._codes_of_one, self._scales_of_one = outputs * code_stride, outputs * groups * 4
        self._all_codes = matrices * self._codes_of_one
        self._numbers = (outputs, group_size, inputs, code_stride, 2 * groups, bits)
        self._activation_bits = activation_bits

    def __call__(
        self, x: torch.Tensor, packed: torch.Tensor, number: int, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Multiply x [..., in] with matrix `number`; None where the general way has to.

        Args:
            packed: the whole weight as `Packing` lays it out.
        """
        shape, dtype = x.shape, x.dtype
        rows = x.numel() // self._inputs
        lib = native.library()
        if (
            not 0 < rows <= self._most_rows
            or shape[-1] != self._inputs
            or dtype not in KINDS
            or isinstance(lib, str)
            or not (x.is_cpu and packed.is_cpu and x.is_contiguous() and packed.is_contiguous())
            or not (bias is None or (bias.dtype == dtype and bias.is_contiguous()))
        ):
            return None
        y = x.new_empty((*shape[:-1], self._outputs))
        start = packed.data_ptr()
        product = Product(
            x.data_ptr(),
            start + number * self._codes_of_one,
            start + self._all_codes + number * self._scales_of_one,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows,
            self._inputs,
            *self._numbers,
            KINDS[dtype],
            torch.get_num_threads(),
            self._activation_bits,
        )
        refused = lib.zinfer_packed_product(ctypes.byref(product))
        assert refused == 0, "sizes are checked by direct_product"
        return y


def direct_product(
    *,
    inputs: int,
    outputs: int,
    matrices: int,
    bits: int,
    group_size: int,
    activation_bits: int,
    route: str,
) -> DirectProduct | None:
    """Return the direct products with a packed weight; None where the kernel has none.

    Args:
        route: as dtype.kernel.
    """
    if route not in ("auto", "compiled") or group_size not in GROUP_SIZES or inputs % group_size:
        return None
    return DirectProduct(
        inputs=inputs,
        outputs=outputs,
        matrices=matrices,
        bits=bits,
        group_size=group_size,
        activation_bits=activation_bits,
        most_rows=packed_rows(activation_bits) if route == "auto" else WITHOUT_LIMIT,
    )
