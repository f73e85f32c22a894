"""Time products of a few rows both ways, in turn, before a run begins.

Each product takes another piece of memory, as the layers of a model do: as much memory as the
model's own layers have, up to what no usual cache holds. So a small model is timed in the cache.
A calm turn of each way counts, the lower quartile: other work on the machine only adds, and the
fastest turn of all found its matrix in a cache. On a busy machine only the fastest says anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

from zinfer.plan.own_products import Shape, is_worth_it
from zinfer.units import MIB
from zinfer.worker.skinny.product import own_linear

COLD_BYTES = 96 * MIB
"""Larger than the last-level cache of most processors' cores."""
PART_BYTES = COLD_BYTES // 12
"""Of a larger matrix a part of its outputs is timed: their time grows in proportion."""
ROUNDS = 5
"""How often each shape has its turns. A neighbour on the processor slows all for a moment."""
BUDGET_S, LEAST, MOST = 0.006, 5, 200
"""Seconds for one shape in a round, and bounds of how often each way has its turn."""
CALM = 2.5
"""On a calm machine the median turn takes at most so many times as long as the fastest."""

Times = tuple[list[float], list[float]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Seconds of one shape's product, both ways: a calm turn, on a busy machine the fastest."""

    out: int
    inputs: int
    own_s: float
    torch_s: float
    is_calm: bool = True
    """The usual turn was not much slower. A choice of a busy moment is not kept."""

    @property
    def shape(self) -> Shape:
        """Return (out, in)."""
        return self.out, self.inputs

    @property
    def takes_ours(self) -> bool:
        """Tell if our kernel is faster by more than noise."""
        return is_worth_it(self.own_s, self.torch_s)

    def document(self) -> dict[str, Any]:
        """Return the fields and the decision as JSON values."""
        return {**asdict(self), "kernel": "compiled" if self.takes_ours else "torch"}


def trials(shapes: Mapping[Shape, int], rows: int, dtype: torch.dtype) -> list[Trial]:
    """Time every shape.

    Args:
        shapes: (out, in) -> how many layers have it.
        rows: of a decode step.
        dtype: of activations and weights.
    """
    model_numel = sum(out * inputs * count for (out, inputs), count in shapes.items())
    numel = min(model_numel, COLD_BYTES // dtype.itemsize)
    pool = torch.full((numel,), 0.01, dtype=dtype)
    times: dict[Shape, Times] = {shape: ([], []) for shape in sorted(shapes)}
    for _ in range(ROUNDS):
        for shape, (torch_s, own_s) in times.items():
            more_torch_s, more_own_s = timed_both(pool, *shape, rows)
            torch_s += more_torch_s
            own_s += more_own_s
    return [trial_of(shape, torch_s, own_s) for shape, (torch_s, own_s) in times.items()]


def trial_of(shape: Shape, torch_s: Sequence[float], own_s: Sequence[float]) -> Trial:
    """Summarise the seconds of all turns."""
    is_calm = all(statistics.median(each) <= CALM * min(each) for each in (torch_s, own_s))
    torch_turn_s, own_turn_s = (
        statistics.quantiles(each, n=4)[0] if is_calm else min(each) for each in (torch_s, own_s)
    )
    out, inputs = shape
    return Trial(out=out, inputs=inputs, own_s=own_turn_s, torch_s=torch_turn_s, is_calm=is_calm)


def timed_both(pool: torch.Tensor, out: int, inputs: int, rows: int) -> Times:
    """Time one shape both ways, in turn, with matrices that lie one after the other in a pool.

    Returns:
        Seconds of every turn by PyTorch, and by our kernel.
    """
    part = min(out, max(1, PART_BYTES // (inputs * pool.itemsize)), pool.numel() // inputs)
    size = part * inputs
    weights = [
        pool[start : start + size].view(part, inputs)
        for start in range(0, pool.numel() - size + 1, size)
    ]
    x = torch.ones(rows, 1, inputs, dtype=pool.dtype)
    taken_s: dict[Any, list[float]] = {functional.linear: [], own_linear: []}
    for multiply in taken_s:
        multiply(x, weights[0])
    turn, end_s = 0, time.perf_counter() + BUDGET_S
    while turn < 2 * LEAST or (turn < 2 * MOST and time.perf_counter() < end_s):
        for multiply, times_s in taken_s.items():
            before_s = time.perf_counter()
            multiply(x, weights[turn % len(weights)])
            times_s.append(time.perf_counter() - before_s)
            turn += 1
    torch_s, own_s = ([each * out / part for each in times_s] for times_s in taken_s.values())
    return torch_s, own_s
