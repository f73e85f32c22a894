"""Time attention over a KV cache on the device, as transformers' own cache is grown and read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from zinfer.units import MIB

SHARED_BY = (1, 8)
"""Query heads for each KV head: as in multi-head attention, and as most shared ones have."""
KV_HEADS, HEAD_DIM = 12, 64
SIZES = ((1, 64), (4, 512), (16, 512), (24, 1024))
"""(rows, tokens): what a call costs, a layer that caches hold, one that they do not, and one whose
allocations the C library returns to the system each time (beyond 32 MB)."""
COLD_BYTES, MOST_LAYERS = 96 * MIB, 12
"""Layers take turns, so that each finds its keys and values where the layers before left them."""
BUDGET_S = 0.15


def device_attention_times(dtype: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time one layer's decode attention: growing the cache by a token, and attending to it.

    Growing copies the whole layer into a tensor that is a token longer, and leaves it in the
    processor's caches where it fits. Attention then finds it there: timed alone, over layers that
    take turns, it is half as fast.

    Yields:
        The fields of a machine.measured.DeviceAttentionTime.
    """
    from zinfer.worker.calibrate_kernels import median_and_spread

    kind = getattr(torch, dtype)
    for rows, tokens in SIZES:
        for shared_by in SHARED_BY:
            samples = _steps_s(rows, tokens, shared_by, kind, device)
            grow_s, _ = median_and_spread([grow_s for grow_s, _ in samples])
            attend_s, spread = median_and_spread([attend_s for _, attend_s in samples])
            slot_s, _ = median_and_spread(_slot_s(rows, tokens, shared_by, kind, device))
            yield {
                "dtype": dtype,
                "shared_by": shared_by,
                "kv_bytes": 2 * rows * KV_HEADS * tokens * HEAD_DIM * kind.itemsize,
                "grow_s": grow_s,
                "attend_s": attend_s,
                "spread": spread,
                "slot_s": slot_s,
            }


def _steps_s(
    rows: int, tokens: int, shared_by: int, kind: torch.dtype, device: torch.device
) -> list[tuple[float, float]]:
    """Return (growing, attending) seconds of each layer's turn until the budget is spent.

    The first turn of every layer does not count.
    """
    shape = (rows, KV_HEADS, tokens, HEAD_DIM)
    layer_bytes = 2 * rows * KV_HEADS * tokens * HEAD_DIM * kind.itemsize
    count = max(2, min(MOST_LAYERS, COLD_BYTES // layer_bytes))
    made = [torch.full(shape, 0.01, dtype=kind, device=device) for _ in range(2 * count)]
    layers = list(zip(made[::2], made[1::2], strict=True))
    query = torch.randn(rows, KV_HEADS, shared_by, HEAD_DIM, device=device).to(kind)
    new = torch.randn(rows, KV_HEADS, 1, HEAD_DIM, device=device).to(kind)
    attend = torch.nn.functional.scaled_dot_product_attention
    now_s = _clock_of(device)
    taken: list[tuple[float, float]] = []
    made.clear()
    started_s = now_s()
    while len(taken) < count + 3 or now_s() - started_s < BUDGET_S:
        index = len(taken) % count
        before_s = now_s()
        keys, values = (torch.cat([past, new], -2) for past in layers[index])
        layers[index] = (keys, values)
        grown_s = now_s()
        attend(query, keys, values)
        taken.append((grown_s - before_s, now_s() - grown_s))
        if len(taken) >= 1000:
            break
    return taken[count:]


def _slot_s(
    rows: int, tokens: int, shared_by: int, kind: torch.dtype, device: torch.device
) -> list[float]:
    """Return the seconds of each attention over a slot until the budget is spent.

    As kv_cache=host does: a layer's tokens are copied into one slot, [tokens, rows, heads, dim],
    while attention reads the other. The first turn of either slot does not count.
    """
    shape = (2, tokens, rows, KV_HEADS, HEAD_DIM)  # keys and values
    layer_bytes = 2 * rows * KV_HEADS * tokens * HEAD_DIM * kind.itemsize
    count = max(2, min(MOST_LAYERS, COLD_BYTES // layer_bytes))
    layers = [torch.full(shape, 0.01, dtype=kind, device=device) for _ in range(count)]
    slots = [torch.full(shape, 0.01, dtype=kind, device=device) for _ in range(2)]
    query = torch.randn(rows, KV_HEADS, shared_by, HEAD_DIM, device=device).to(kind)
    now_s = _clock_of(device)
    taken: list[float] = []
    started_s = now_s()
    while len(taken) < 5 or now_s() - started_s < BUDGET_S:
        turn = len(taken)
        slots[(turn + 1) % 2].copy_(layers[turn % count])
        keys, values = slots[turn % 2].movedim(1, 3)
        before_s = now_s()
        torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        taken.append(now_s() - before_s)
        if len(taken) >= 1000:
            break
    return taken[2:]


def _clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock that waits for the device."""

    def now_s() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now_s


def attention_read(dtype: str, device: torch.device) -> dict[str, float]:
    """Time one decode step's attention: bytes of keys and values per second."""
    from zinfer.worker.calibrate_kernels import rate, samples_s

    kind = getattr(torch, dtype)
    queries = torch.randn(4, 8, 1, 64, device=device).to(kind)
    pairs = [
        (
            torch.randn(4, 8, 512, 64, device=device).to(kind),
            torch.randn(4, 8, 512, 64, device=device).to(kind),
        )
        for _ in range(8)
    ]
    attend = torch.nn.functional.scaled_dot_product_attention
    seconds = samples_s(lambda index: attend(queries, *pairs[index % 8]), device, budget_s=0.2)
    return rate(2 * pairs[0][0].numel() * kind.itemsize, seconds)


def attention_flops(dtype: str, device: torch.device) -> dict[str, float]:
    """Time a prefill's attention: operations per second, all pairs of tokens counted."""
    from zinfer.worker.calibrate_kernels import rate, samples_s

    kind = getattr(torch, dtype)
    queries, keys, values = (torch.randn(2, 8, 128, 64, device=device).to(kind) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    seconds = samples_s(
        lambda _: attend(queries, keys, values, is_causal=True), device, budget_s=0.2
    )
    return rate(4 * 2 * 8 * 128 * 128 * 64, seconds)
