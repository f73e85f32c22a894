"""Time products with packed weights on this machine, by whatever kernel a run would use here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from zinfer.units import MIB

BITS = (8, 4)
ACTIVATION_BITS = (16, 8)
ROWS = (1, 2, 4, 8, 32, 256)
SQUARE_SIZES = (64, 256, 1024, 2048)
GROUP_SIZE = 64
"""Values that share a scale, as by default."""
COLD_BYTES = 96 * MIB
"""Larger than the last-level cache of most processors' cores."""
MOST_MATRICES = 256
BUDGET_S = 0.02


def packed_times(bits: int, dtype: str, device: Any) -> Iterator[dict[str, Any]]:
    """Time [rows, K] x [K, K] for each size and number of rows, one matrix after another.

    Yields:
        The fields of a machine.measured.PackedTime.
    """
    import torch

    from zinfer.worker.calibrate_kernels import median_and_spread, samples_s
    from zinfer.worker.quantised.kernel import multiply

    kind = getattr(torch, dtype)
    pool = torch.randint(0, 256, (COLD_BYTES,), dtype=torch.uint8, device=device)
    for size in SQUARE_SIZES:
        packed = size * size * bits // 8
        matrices = [
            pool[start : start + packed].view(size, -1)
            for start in range(0, COLD_BYTES - packed + 1, packed)
        ][:MOST_MATRICES]
        scales = torch.full((size, size // GROUP_SIZE, 2), 0.01, dtype=torch.float16, device=device)
        for rows, activation_bits in product(ROWS, activation_bits_of(device)):
            inputs = torch.randn(rows, size, device=device).to(kind)

            def run(
                index: int,
                inputs: Any = inputs,
                matrices: Any = matrices,
                scales: Any = scales,
                activation_bits: int = activation_bits,
            ) -> object:
                return multiply(
                    inputs, matrices[index % len(matrices)], scales,
                    bits=bits, group_size=GROUP_SIZE, activation_bits=activation_bits,
                )  # fmt: skip

            seconds, spread = median_and_spread(samples_s(run, device, budget_s=BUDGET_S, least=2))
            yield {
                "bits": bits,
                "dtype": dtype,
                "rows": rows,
                "weight_numel": size * size,
                "seconds": seconds,
                "spread": spread,
                "activation_bits": activation_bits,
            }


def activation_bits_of(device: Any) -> tuple[int, ...]:
    """Return the bits of activations that make a difference: a GPU rounds none."""
    return ACTIVATION_BITS if device.type == "cpu" else (16,)
