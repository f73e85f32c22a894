"""Multiply packed weights on a GPU: packed where our Triton kernel proves itself, else unpacked.

Nobody has run the kernel on a GPU yet. So each process first tries it on small tensors of its own
scheme. A kernel that Triton cannot compile, or that gives other numbers, is not used.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from zinfer.worker.kv_cache.codes import dequantise

GROUP_SIZES = (32, 64, 128)
LEAST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU (Ampere, 2020). Triton 3.7 uses the matrix units of no earlier one."""
LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Norm of the trial's error over the result's. A wrong place or scale makes it about 1."""
TRIAL_ROWS, TRIAL_OUTPUTS = (1, 5, 20, 40), 37
"""One number of rows for each block of the kernel, and outputs that fill no last block."""


def kernel() -> Any:
    """Return the module of the kernel. Raises ImportError where Triton is not installed."""
    from zinfer.worker.quantised import triton_products

    return triton_products


@cache
def refused(device: torch.device, dtype: torch.dtype, bits: int, group_size: int) -> str:
    """Say why the kernel does not multiply such weights on this device; "" where it does.

    The first call tries it: some seconds, where Triton has not compiled the kernel before. A
    kernel that breaks the GPU's context ends the run; dtype.kernel=torch goes without the trial.
    """
    if group_size not in GROUP_SIZES or dtype not in LARGEST_ERROR:
        return f"the kernel has no groups of {group_size} with activations in {dtype}"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return "the GPU has compute capability {}.{}, and the kernel needs {}.{}".format(
                *capability, *LEAST_CAPABILITY
            )
    try:
        kernel()
    except ImportError as missing:
        return f"Triton is not installed ({missing})"
    try:
        error = largest_error(device, dtype, bits, group_size)
    except Exception as failure:  # whatever a compiler or a driver raises
        said = (str(failure).strip() or "no reason").splitlines()[-1]
        return f"the trial of Triton's kernel failed with {type(failure).__name__}: {said[:200]}"
    if not error <= LARGEST_ERROR[dtype]:
        return (
            f"in its trial Triton's kernel differs from the unpacked product by {error:.1g} of its "
            f"norm, and {LARGEST_ERROR[dtype]:g} is allowed"
        )
    return ""


def largest_error(device: torch.device, dtype: torch.dtype, bits: int, group_size: int) -> float:
    """Multiply small tensors packed and unpacked. Return the largest error over the norm."""
    triton_products = kernel()
    random = torch.Generator().manual_seed(0)
    errors = []
    for rows in TRIAL_ROWS:
        groups = 2 * triton_products.Block.of(rows, bits, group_size, dtype).groups + 1
        inputs = groups * group_size
        shape = (TRIAL_OUTPUTS, inputs * bits // 8)
        codes = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).to(device)
        scale = torch.rand(TRIAL_OUTPUTS, groups, generator=random) + 0.5
        scales = torch.stack([scale, scale * -(2.0 ** (bits - 1))], -1).half().to(device)
        x = torch.randn(rows, inputs, generator=random).to(device, dtype)
        bias = torch.randn(TRIAL_OUTPUTS, generator=random).to(device, dtype)
        values = dequantise(codes, scales, bits, group_size, torch.float32).double()
        exact = x.double() @ values.T + bias.double()
        found = triton_products.multiply(
            x, codes, scales, bits=bits, group_size=group_size, bias=bias
        )
        errors.append(float((found.double() - exact).norm() / exact.norm()))
    return max(errors, key=lambda error: (error != error, error))  # a NaN is the largest
