"""Time products with packed weights on this machine, by whatever kernel a run would use here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zinfer.units import MIB

BITS = (8, 4)
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
        for rows in ROWS:
            inputs = torch.randn(rows, size, device=device).to(kind)

            def product(
                index: int, inputs: Any = inputs, matrices: Any = matrices, scales: Any = scales
            ) -> object:
                codes = matrices[index % len(matrices)]
                return multiply(inputs, codes, scales, bits=bits, group_size=GROUP_SIZE)

            seconds, spread = median_and_spread(
                samples_s(product, device, budget_s=BUDGET_S, least=2)
            )
            yield {
                "bits": bits,
                "dtype": dtype,
                "rows": rows,
                "weight_numel": size * size,
                "seconds": seconds,
                "spread": spread,
            }
