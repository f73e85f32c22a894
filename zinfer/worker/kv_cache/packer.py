"""Pack values into codes with our own C++ kernel, straight into the place where they live.

It gives the bits that codes.quantise_with_torch gives, in one pass: PyTorch's operators make ten
passes over float32 copies of the values.
"""

from __future__ import annotations

import ctypes
from functools import partial

import torch

from zinfer.machine.cpp_library import PACK_CODES
from zinfer.worker.libraries import KINDS, load_library

GROUP_MULTIPLE, LARGEST_GROUP = 16, 1024
Strides = ctypes.c_int64 * 3


class _Packing(ctypes.Structure):
    """The struct Packing of pack_codes.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "codes", "scales")),
        *((name, ctypes.c_int64) for name in ("outer", "middle", "inner", "dim", "group")),
        *((name, Strides) for name in ("value_strides", "code_strides", "scale_strides")),
        *((name, ctypes.c_int32) for name in ("kind", "bits", "symmetric", "threads")),
    ]


library = partial(load_library, PACK_CODES)
"""Return the compiled packer, or why there is none."""


def unsupported(values: torch.Tensor, group_size: int) -> str | None:
    """Say why the compiled packer cannot pack values [..., dim]; None where it can."""
    if values.device.type != "cpu":
        return f"values are on {values.device.type}"
    if values.dtype not in KINDS:
        return f"values are {values.dtype}"
    if group_size % GROUP_MULTIPLE or group_size > LARGEST_GROUP:
        return f"groups of {group_size} are no multiple of {GROUP_MULTIPLE} up to {LARGEST_GROUP}"
    if values.dim() > 4 or values.stride(-1) != 1:
        return "values do not lie in rows"
    lib = library()
    return lib if isinstance(lib, str) else None


def pack_into(
    values: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
) -> None:
    """Pack values [..., dim], up to three dimensions before the last, where `unsupported` is None.

    Args:
        codes: uint8 [..., dim * bits / 8], with any strides but the last.
        scales: float16 [..., dim / group_size, 2]: scale and minimum, these together.
    """
    lib = library()
    assert isinstance(lib, ctypes.CDLL), lib
    assert values.shape[:-1] == codes.shape[:-1] == scales.shape[:-2]
    assert codes.stride(-1) == scales.stride(-1) == 1 and scales.stride(-2) == 2
    missing = 4 - values.dim()
    outer, middle, inner = (1,) * missing + tuple(values.shape[:-1])

    def strides(tensor: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
        return Strides(*(0,) * missing, *tensor.stride()[: values.dim() - 1])

    packing = _Packing(
        values=values.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        outer=outer,
        middle=middle,
        inner=inner,
        dim=values.shape[-1],
        group=group_size,
        value_strides=strides(values),
        code_strides=strides(codes),
        scale_strides=strides(scales),
        kind=KINDS[values.dtype],
        bits=bits,
        symmetric=symmetric,
        threads=torch.get_num_threads(),
    )
    if lib.zinfer_pack_codes(ctypes.byref(packing)) != 0:
        raise ValueError(f"the packer refused groups of {group_size} in {values.shape[-1]} values")
