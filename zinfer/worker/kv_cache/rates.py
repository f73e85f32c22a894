"""Time decode attention on the host, packing and unpacking of codes, as a run does them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from zinfer.units import MIB
from zinfer.worker.kv_cache.codes import quantise, quantise_into
from zinfer.worker.kv_cache.kernel import HostAttention, Rows, Scoring
from zinfer.worker.kv_cache.memory import Memory
from zinfer.worker.kv_cache.store import Format, Shape, Stored

BITS = (16, 8, 4)
SHARED_BY = (1, 8)
"""Query heads for each KV head: as in multi-head attention, and as most shared ones have."""
HEAD_DIM, GROUP_SIZE = 128, 64
QUERY_HEADS = 16
SIZES = ((1, 64), (1, 2048), (4, 2048))
"""(rows, tokens): what a call costs, a short layer, and one beyond the processor's caches."""
COLD_BYTES = 96 * MIB
"""Larger than the last-level cache of most processors' cores."""
WEIGHT_SIZE = 1024
"""Rows and columns of the matrix that is multiplied before each call, as a layer's products are."""
BUDGET_S, MOST_COPIES = 0.05, 48
PACKED_TOKENS = ((1, 1), (16, 1), (4, 256))
"""(rows, tokens) that are packed: new tokens of a decode step, and a prompt."""
UNPACKED_TOKENS = ((1, 64), (1, 512), (4, 512), (8, 1024))
"""(rows, tokens) that are unpacked: a short layer, one that caches hold with its floats, one beyond
them, and one whose allocations the C library returns to the system each time: 1, 1, 2, 9 ns each.
"""
MOST_LAYERS = 12


def host_attention_times(dtype: str) -> Iterator[dict[str, Any]]:
    """Time one layer's attention for each way of storing keys and values.

    A matrix product goes before each call and is not timed: attention alone, in a loop, finds its
    buffers and threads warmer than a step leaves them.

    Yields:
        The fields of a machine.measured.HostAttentionTime.
    """
    from zinfer.worker.calibrate_kernels import median_and_spread

    kind = getattr(torch, dtype)
    weight = torch.randn(WEIGHT_SIZE, WEIGHT_SIZE, dtype=torch.float32).to(kind)
    for bits in BITS:
        for shared_by in SHARED_BY:
            for rows, tokens in SIZES:
                pairs = _copies(rows, QUERY_HEADS // shared_by, tokens, bits, kind)
                query = torch.randn(rows, QUERY_HEADS, HEAD_DIM).to(kind)
                seconds, spread = median_and_spread(_in_place_s(query, pairs, tokens, weight))
                yield {
                    "bits": bits,
                    "dtype": dtype,
                    "shared_by": shared_by,
                    "kv_bytes": sum(map(_bytes, pairs[0])),
                    "seconds": seconds,
                    "spread": spread,
                }


def packing_times(dtype: str) -> Iterator[dict[str, Any]]:
    """Time how long one layer's keys, or values, take to become codes in their place.

    Yields:
        The fields of a machine.measured.PackingTime.
    """
    from zinfer.worker.calibrate_kernels import samples_s

    cpu = torch.device("cpu")
    for bits in BITS[1:]:
        for rows, tokens in PACKED_TOKENS:
            shape = (rows, tokens, QUERY_HEADS, HEAD_DIM)
            made = torch.randn(shape).to(getattr(torch, dtype)).transpose(1, 2)
            place = quantise(made, bits, GROUP_SIZE)

            def pack(_: int, made: Any = made, place: Any = place, bits: int = bits) -> None:
                codes, scales = place
                quantise_into(made, codes, scales, bits, GROUP_SIZE)

            yield _packing_time(made, bits, samples_s(pack, cpu, budget_s=BUDGET_S / 2))


def unpacking_times(dtype: str) -> Iterator[dict[str, Any]]:
    """Time how long one layer's keys, or values, take to be unpacked into a slot.

    As kv_cache=host does: layers take turns, so that none is found in the processor's caches
    unless it would be in a step, and two slots take turns too.

    Yields:
        The fields of a machine.measured.PackingTime.
    """
    from zinfer.worker.calibrate_kernels import samples_s

    kind, cpu = getattr(torch, dtype), torch.device("cpu")
    for bits in BITS[1:]:
        for rows, tokens in UNPACKED_TOKENS:
            shape = Shape(batch=rows, heads=QUERY_HEADS, capacity=tokens, dim=HEAD_DIM)
            how = Format(bits=bits, group_size=GROUP_SIZE)
            made = torch.randn(rows, QUERY_HEADS, tokens, HEAD_DIM).to(kind)
            count = max(2, min(MOST_LAYERS, COLD_BYTES // (made.numel() * bits // 8)))
            layers = [
                Stored(Memory(pin=False), shape, kind, how, tokens_first=True) for _ in range(count)
            ]
            for layer in layers:
                layer.write(made, 0, torch.Tensor.copy_)
            slots = [torch.zeros(tokens, rows, QUERY_HEADS, HEAD_DIM, dtype=kind) for _ in range(2)]

            def unpack(turn: int, layers: Any = layers, slots: Any = slots) -> None:
                slot = slots[turn % 2]
                layers[turn % len(layers)].read(0, len(slot), slot)

            yield _packing_time(made, bits, samples_s(unpack, cpu, budget_s=BUDGET_S))


def _packing_time(values: torch.Tensor, bits: int, seconds: list[float]) -> dict[str, Any]:
    """Return the fields of a machine.measured.PackingTime."""
    from zinfer.worker.calibrate_kernels import median_and_spread

    middle, spread = median_and_spread(seconds)
    return {
        "bits": bits,
        "dtype": str(values.dtype).removeprefix("torch."),
        "values": values.numel(),
        "seconds": middle,
        "spread": spread,
    }


def _copies(
    rows: int, kv_heads: int, tokens: int, bits: int, kind: torch.dtype
) -> list[tuple[Rows, Rows]]:
    """Make pairs of keys and values that are more together than the caches hold."""
    plain = torch.randn(rows, kv_heads, tokens, HEAD_DIM)
    codes, scales = (plain.to(kind), None) if bits == 16 else quantise(plain, bits, GROUP_SIZE)
    one = Rows(
        data=codes.contiguous(),
        scales=None if scales is None else scales.contiguous(),
        bits=bits,
        group_size=0 if bits == 16 else GROUP_SIZE,
    )
    count = max(2, min(MOST_COPIES, COLD_BYTES // (2 * _bytes(one))))
    return [(_copy(one), _copy(one)) for _ in range(count)]


def _copy(rows: Rows) -> Rows:
    scales = None if rows.scales is None else rows.scales.clone()
    return Rows(data=rows.data.clone(), scales=scales, bits=rows.bits, group_size=rows.group_size)


def _bytes(rows: Rows) -> int:
    return rows.data.nbytes + (0 if rows.scales is None else rows.scales.nbytes)


def _in_place_s(
    query: torch.Tensor, pairs: list[tuple[Rows, Rows]], tokens: int, weight: torch.Tensor
) -> list[float]:
    """Return the seconds of each call until the budget is spent; the first does not count."""
    attention, how = HostAttention(), Scoring(scale=HEAD_DIM**-0.5)
    hidden = torch.randn(query.shape[0], WEIGHT_SIZE).to(weight.dtype)
    taken: list[float] = []
    started_s = time.perf_counter()
    for index in range(1000):
        torch.nn.functional.linear(hidden, weight)
        before_s = time.perf_counter()
        attention.attend(query, *pairs[index % len(pairs)], tokens, how)
        taken.append(time.perf_counter() - before_s)
        if len(taken) > 3 and time.perf_counter() - started_s > BUDGET_S:
            break
    return taken[1:]
