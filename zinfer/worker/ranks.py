"""Collect each rank's share of the result when the timing is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zinfer.worker.energy import Energy
from zinfer.worker.process_use import MemoryUse

if TYPE_CHECKING:
    from zinfer.worker.engines import Engine
    from zinfer.worker.kv_cache.session import KvUse
    from zinfer.worker.samples import Generation

RANK_METRICS = ("peak_host_rss_bytes", "peak_device_allocated_bytes")
"""Fields of MemoryUse that are also logged for each rank: a sum hides the rank that is full."""


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """One rank's share of the result."""

    memory: MemoryUse
    weight_stored_bytes: int
    kv_cache_bytes: int | None
    token_ids: tuple[tuple[int, ...], ...]
    """New tokens [rows of this rank][new_tokens]."""
    energy: Energy = field(default_factory=Energy)
    kv_use: KvUse | None = None
    """This rank's KV cache in host memory; None for one on the device."""
    streamed_bytes_per_step: float | None = None


def gather_over_ranks(
    engine: Engine, generation: Generation, memory: MemoryUse
) -> tuple[RankResult, ...]:
    """Collect the result of every rank, in the order of the ranks. Every rank must call it."""
    mine = RankResult(
        memory=memory,
        weight_stored_bytes=engine.weight_stored_bytes,
        kv_cache_bytes=generation.kv_cache_bytes,
        energy=generation.energy,
        kv_use=generation.kv_use,
        streamed_bytes_per_step=generation.streamed_bytes_per_step,
        token_ids=generation.token_ids,
    )
    return tuple(of_all_ranks(mine, engine.ranks))


def of_all_ranks(value: Any, ranks: int) -> list[Any]:
    """Return what each of so many ranks hands in, in their order. Every rank must call it."""
    everyone = [value] * ranks
    if ranks > 1:
        import torch.distributed

        torch.distributed.all_gather_object(everyone, value)
    return everyone


def rows_of_all(ranks: Sequence[RankResult]) -> list[tuple[int, ...]]:
    """Return the new tokens of all rows, in the order of the prompts."""
    return [row for rank in ranks for row in rank.token_ids]


def metrics_by_rank(ranks: Sequence[RankResult]) -> dict[str, float]:
    """Return the peak memory of each rank where there are several; Metrics has the totals."""
    if len(ranks) == 1:
        return {}
    peaks = {
        f"rank{number}_{name}": getattr(rank.memory, name)
        for number, rank in enumerate(ranks)
        for name in RANK_METRICS
    }
    return {name: value for name, value in peaks.items() if value is not None}
