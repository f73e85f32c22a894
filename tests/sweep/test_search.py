"""Find the batch size with the highest throughput."""

from __future__ import annotations

import pytest

from zinfer.sweep.search import best_batch


@pytest.mark.parametrize(
    ("peak", "memory_ends_at", "step", "best", "most_trials"),
    [
        (10_000, 100, 1, 100, 12),
        (24, 10_000, 1, 24, 10),
        (1, 10_000, 1, 1, 3),
        (10_000, 100, 8, 96, 12),
        (10_000, 1, 1, 1, 3),
    ],
)
def test_the_best_batch_is_found_by_doubling_and_bisection(
    peak: int, memory_ends_at: int, step: int, best: int, most_trials: int
) -> None:
    """Throughput rises up to `peak` and falls after it; above `memory_ends_at` there is none."""

    def trial(size: int) -> float | None:
        return None if size > memory_ends_at else float(min(size, peak) - max(0, size - peak) * 0.5)

    tried = best_batch(trial, step, step, 4096, 16)
    found = max(
        (size for size in tried if tried[size] is not None), key=lambda size: tried[size] or 0.0
    )
    assert all(size % step == 0 for size in tried)
    assert abs(found - best) <= max(step, best / 8)
    assert len(tried) <= most_trials
