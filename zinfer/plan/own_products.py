"""Say which products of a run may be made by our kernel for a few rows of 16-bit numbers.

PyTorch's linear reads 16-bit weights at a fraction of a processor's bandwidth when there are only
a few rows, as in a decode step. The worker measures both ways (worker/skinny); predictions take
both from the calibration.
"""

from __future__ import annotations

from collections import Counter

from zinfer.config import RunConfig
from zinfer.model.quantisable import stored_bits
from zinfer.model.spec import ModelSpec
from zinfer.plan.products import is_linear, weight_roles

SIXTEEN_BITS = ("bfloat16", "float16")
MOST_ROWS = 32
"""Rows up to which our kernel can be faster. With more, arithmetic is the limit, not reading."""
WORTH = 1.05
"""Our kernel is taken where it is at least so many times as fast. Less is noise."""

Shape = tuple[int, int]
"""(out, in) of a linear layer's weight."""


def own_rows(config: RunConfig, dtype: str) -> int:
    """Return the rows of a decode step that our kernel may multiply on a processor; 0: none.

    Args:
        dtype: type that the model computes in.
    """
    if not config.chooses_products or dtype not in SIXTEEN_BITS:
        return 0
    rows = config.batch.batch_size // (config.launcher.ranks * config.launcher.nodes)
    if config.dtype.kernel == "compiled":
        return rows
    return rows if config.dtype.kernel == "auto" and rows <= MOST_ROWS else 0


def is_worth_it(own_s: float, torch_s: float) -> bool:
    """Tell if our kernel is faster by more than noise."""
    return torch_s >= WORTH * own_s


def linear_shapes(spec: ModelSpec, config: RunConfig) -> Counter[Shape]:
    """Count the linear layers whose weights are not packed, by their shapes."""
    return Counter(
        (parameter.shape[0], parameter.shape[1])
        for role, parameter in weight_roles(spec)
        if is_linear(role, parameter) and stored_bits(parameter, config.dtype) is None
    )
