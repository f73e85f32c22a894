"""Packed products on a real GPU: our Triton kernel against float64, and in whole runs.

tests/worker/quantised/test_triton_products.py has the small tables, and takes the GPU where one is.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.gpu_runs import BATCH, MODEL, zinfer
from zinfer.worker.kv_cache.codes import dequantise
from zinfer.worker.quantised import gpu
from zinfer.worker.quantised.kernel import multiply

CUDA = torch.device("cuda:0")
LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Norm of the error over the result's."""


@pytest.fixture(autouse=True)
def new_enough() -> None:
    """Skip on GPUs without the matrix units that Triton uses."""
    if torch.cuda.get_device_capability(CUDA) < gpu.LEAST_CAPABILITY:
        pytest.skip("needs a GPU of compute capability 8.0 or later")


@pytest.mark.parametrize("kind", list(LARGEST_ERROR))
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (8, 64), (4, 64), (4, 128)])
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 11_008), (50_272, 2048)])
def test_matrices_of_real_models(
    shape: tuple[int, int], bits: int, group: int, kind: torch.dtype
) -> None:
    out, inputs = shape
    random = torch.Generator(CUDA).manual_seed(0)
    codes = torch.randint(
        0, 256, (out, inputs * bits // 8), generator=random, dtype=torch.uint8, device=CUDA
    )
    scale = torch.rand(out, inputs // group, generator=random, device=CUDA) + 0.5
    scales = torch.stack([scale, scale * -(2.0 ** (bits - 1))], -1).half()
    values = dequantise(codes, scales, bits, group, torch.float32).double()
    for rows in (1, 2, 8, 16, 32, 64, 100):
        x = torch.randn(rows, inputs, generator=random, device=CUDA).to(kind)
        exact = x.double() @ values.T
        found = multiply(x, codes, scales, bits=bits, group_size=group, kernel="compiled").double()
        assert float((found - exact).norm() / exact.norm()) < LARGEST_ERROR[kind], rows


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_multiplies_packed_and_says_so(
    bits: int, offload: str, tmp_path: Path, built_ops: list[str]
) -> None:
    common = (*MODEL, *BATCH, f"dtype=int{bits}", "dtype.compute=float32", f"offload={offload}")
    ours, unpacked = (
        zinfer(tmp_path, *common, f"dtype.kernel={kernel}") for kernel in ("auto", "torch")
    )
    assert (ours["packed"]["kernel"], unpacked["packed"]["kernel"]) == ("triton", "torch"), ours
    assert ours["generated"]["token_ids"] == unpacked["generated"]["token_ids"]
