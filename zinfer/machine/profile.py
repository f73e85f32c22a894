"""Look up what `task=calibrate` measured of one machine, between the points that it measured."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import exp, log
from typing import TypeVar

from zinfer.machine.measured import (
    ANY_FAMILY,
    DequantiseTime,
    DeviceAttentionTime,
    DeviceSeconds,
    FamilyCost,
    HostAttentionTime,
    KernelTime,
    LoadCost,
    Mode,
    ModeCost,
    NvmeRate,
    PackedTime,
    PackingTime,
    Rate,
    StreamCost,
)

PROFILE_VERSION = 5
"""Raised when what is measured, or what a field means, changes. Older profiles are not read."""
Kind = TypeVar("Kind", bound=Hashable)
NOTICED_SLOWDOWN = 1.25
"""A machine this much slower or faster than it was, when calibrated or in another run, is named."""


@dataclass(frozen=True, kw_only=True)
class CalibrationProfile:
    """One machine, with one number of threads in each rank. Unknown is None or absent."""

    version: int = PROFILE_VERSION
    created: str
    fingerprint: str
    threads: int
    device_kind: str
    device_name: str
    packages: dict[str, str] = field(default_factory=dict)
    seconds: float
    """How long measuring took."""
    host_read: Rate
    host_copy: Rate
    device_read: Rate | None
    """None where device memory is host memory."""
    host_to_device_pageable: Rate | None
    host_to_device_pinned: Rate | None
    device_to_host_pinned: Rate | None
    kernels: tuple[KernelTime, ...]
    """By PyTorch."""
    own_kernels: tuple[KernelTime, ...] = ()
    """A few rows of 16 bits by our kernel, on a processor. Empty in older profiles."""
    dequantise: tuple[DequantiseTime, ...] = ()
    packed: tuple[PackedTime, ...] = ()
    """Empty in profiles of before there was such a kernel: then it is not predicted."""
    device_attention: tuple[DeviceAttentionTime, ...] = ()
    """Empty in older profiles: then `attention` and `host_copy` are taken."""
    host_attention: tuple[HostAttentionTime, ...] = ()
    """Empty in older profiles: then shares of `host_read` are taken."""
    host_packing: tuple[PackingTime, ...] = ()
    """Empty in older profiles: then packing is not predicted."""
    host_unpacking: tuple[PackingTime, ...] = ()
    """From where codes live into a slot of kv_cache=host. Empty in older profiles: then it counts
    as a copy."""
    attention: dict[str, Rate]
    """dtype -> bytes of keys and values that a decode step's attention reads in a second."""
    attention_flops: dict[str, Rate]
    """dtype -> operations a second of a prefill's attention."""
    nvme: tuple[NvmeRate, ...] = ()
    nvme_path_filesystem: str | None = None
    nvme_free_bytes: int | None = None
    nvme_page_cache: str | None = None
    """'bypassed' (O_DIRECT), or why it is used."""
    families: tuple[FamilyCost, ...] = ()
    modes: tuple[ModeCost, ...] = ()
    disturbance: float = 1.0
    """Usual over calmest run of the same job: what others on this machine add.

    Every prediction is multiplied by it.
    """
    yardstick_s: float | None = None
    """Seconds of a run's yardstick at the time, the median of all jobs."""
    cold_factor: float = 1.0
    """Fixed costs and products of few rows grow by this where no cache holds the weights."""
    stream: StreamCost | None = None
    load: dict[str, LoadCost] = field(default_factory=dict)
    """Offload target, or resident -> what loading costs."""
    imported_rss_bytes: int
    """Resident memory of a fresh worker that has imported everything."""
    growth_bytes: dict[str, int] = field(default_factory=dict)
    """Offload target, or resident -> what a run of a model without size adds to that."""
    left_out: tuple[str, ...] = ()
    """What calibrate.budget_s left no time for, in words."""

    @property
    def nvme_read_bytes_per_s(self) -> float | None:
        """Return the best read rate of those measured."""
        return max((row.rate.median for row in self.nvme if row.operation == "read"), default=None)

    def flops_per_s(self, dtype: str) -> float | None:
        """Return the best rate of matrix products in this dtype."""
        rates = [
            2 * row.rows * row.weight_numel / row.seconds
            for row in self.kernels
            if row.dtype == dtype
        ]
        return max(rates, default=None)

    def kernel_s(
        self, dtype: str, rows: float, weight_numel: int, *, wide: bool = False
    ) -> float | None:
        """Return seconds of one matrix product; None for a dtype that was not measured.

        Between measured points interpolate in logarithms; beyond the last use its rate.
        """
        return _product_s(self._kernel_tables.get((dtype, wide)), rows, weight_numel)

    def own_kernel_s(
        self, dtype: str, rows: float, weight_numel: int, *, wide: bool = False
    ) -> float | None:
        """Return seconds of one matrix product by our kernel for a few rows; None: not measured."""
        return _product_s(self._own_kernel_tables.get((dtype, wide)), rows, weight_numel)

    def packed_s(
        self, bits: int, dtype: str, rows: float, weight_numel: int, activation_bits: int = 16
    ) -> float | None:
        """Return seconds of one product with a packed matrix; None: it was not measured.

        Products with activations of 8 bits that were not measured count as those of 16.
        """
        tables = self._packed_tables
        table = tables.get((bits, dtype, activation_bits), tables.get((bits, dtype, 16)))
        return _product_s(table, rows, weight_numel)

    def host_attention_s(
        self, bits: int, dtype: str, shared_by: float, kv_bytes: float
    ) -> float | None:
        """Return seconds of one layer's attention on the host; None: it was not measured.

        The measured number of query heads for each KV head that is nearest, as a ratio, counts.
        """
        found = [row for row in self.host_attention if (row.bits, row.dtype) == (bits, dtype)]
        if not found or kv_bytes <= 0:
            return 0.0 if found else None
        return _interpolate(
            [(row.kv_bytes, row.seconds) for row in _as_shared(found, shared_by)], kv_bytes
        )

    def device_attention_s(
        self, dtype: str, shared_by: float, kv_bytes: float
    ) -> DeviceSeconds | None:
        """Return what one layer's decode attention on the device takes.

        None: it was not measured. The number of query heads counts as in host_attention_s.
        """
        found = [row for row in self.device_attention if row.dtype == dtype]
        if not found or kv_bytes <= 0:
            return DeviceSeconds(grow_s=0.0, attend_s=0.0, slot_s=0.0) if found else None
        rows = _as_shared(found, shared_by)

        def at(seconds: Callable[[DeviceAttentionTime], float]) -> float:
            return _interpolate([(row.kv_bytes, seconds(row)) for row in rows], kv_bytes)

        return DeviceSeconds(
            grow_s=at(lambda row: row.grow_s),
            attend_s=at(lambda row: row.attend_s),
            slot_s=at(lambda row: row.attend_s if row.slot_s is None else row.slot_s),
        )

    def packing_s(self, bits: int, dtype: str, values: float) -> float:
        """Return seconds of packing so many values into codes; 0 where it was not measured."""
        return _packing_s(self.host_packing, bits, dtype, values) or 0.0

    def unpacking_s(self, bits: int, dtype: str, values: float) -> float | None:
        """Return seconds of unpacking so many codes into a slot; None: it was not measured."""
        return _packing_s(self.host_unpacking, bits, dtype, values)

    @cached_property
    def _kernel_tables(self) -> dict[tuple[str, bool], Table]:
        """Sort the kernels once: (dtype, wide) -> rising rows, each with rising (weights, seconds).

        A plan of a model with many experts asks hundreds of times.
        """
        return _tables(((row.dtype, row.wide), row) for row in self.kernels)

    @cached_property
    def _own_kernel_tables(self) -> dict[tuple[str, bool], Table]:
        """Sort the products by our own kernel the same way."""
        return _tables(((row.dtype, row.wide), row) for row in self.own_kernels)

    @cached_property
    def _packed_tables(self) -> dict[tuple[int, str, int], Table]:
        """Sort products with packed matrices once: (bits, dtype, activation bits) -> the same."""
        return _tables(((row.bits, row.dtype, row.activation_bits), row) for row in self.packed)

    def dequantise_s(self, bits: int, dtype: str, weight_numel: int) -> float | None:
        """Return seconds of unpacking one matrix, interpolated as kernel_s does.

        None where these bits were not measured in this dtype.
        """
        points = sorted(
            (row.weight_numel, row.seconds)
            for row in self.dequantise
            if (row.bits, row.dtype) == (bits, dtype)
        )
        return _interpolate(points, weight_numel) if points else None

    def family_cost(self, model_type: str, dtype: str) -> FamilyCost | None:
        """Return the cost of this family, else of any; None for a dtype that was not measured."""
        found = {cost.model_type: cost for cost in self.families if cost.dtype == dtype}
        return found.get(model_type) or found.get(ANY_FAMILY)

    def mode_cost(self, mode: Mode, dtype: str) -> ModeCost | None:
        """Return the cost of this mode; None where it was not measured."""
        return next((cost for cost in self.modes if (cost.mode, cost.dtype) == (mode, dtype)), None)


Attended = TypeVar("Attended", HostAttentionTime, DeviceAttentionTime)


def _as_shared(rows: Sequence[Attended], shared_by: float) -> list[Attended]:
    """Return, by rising bytes, those whose query heads for each KV head are nearest as a ratio."""
    nearest = min({row.shared_by for row in rows}, key=lambda by: abs(log(by / shared_by)))
    found = [row for row in rows if row.shared_by == nearest]
    return sorted(found, key=lambda row: row.kv_bytes)


def _packing_s(rows: Iterable[PackingTime], bits: int, dtype: str, values: float) -> float | None:
    """Return seconds of so many values; None where these bits were not measured in this dtype."""
    points = sorted(
        (row.values, row.seconds) for row in rows if (row.bits, row.dtype) == (bits, dtype)
    )
    if not points:
        return None
    return _interpolate(points, values) if values > 0 else 0.0


Table = list[tuple[int, list[tuple[int, float]]]]
"""Rising rows, each with rising (elements of the matrix, seconds)."""


def _tables(
    measured: Iterable[tuple[Kind, KernelTime | PackedTime]],
) -> dict[Kind, Table]:
    """Sort measured products by their kind, rows and size."""
    found: dict[Kind, dict[int, list[tuple[int, float]]]] = {}
    for kind, row in measured:
        times = found.setdefault(kind, {}).setdefault(row.rows, [])
        times.append((row.weight_numel, row.seconds))
    return {
        kind: [(rows, sorted(times)) for rows, times in sorted(table.items())]
        for kind, table in found.items()
    }


def _product_s(table: Table | None, rows: float, weight_numel: int) -> float | None:
    """Return seconds of a product of so many rows, from a table; None where there is none."""
    if not table:
        return None
    by_rows = [(measured, _interpolate(times, weight_numel)) for measured, times in table]
    return _interpolate(by_rows, max(rows, by_rows[0][0]))


def _interpolate(points: Sequence[tuple[int, float]], x: float) -> float:
    """Return y at x through points that are sorted by x.

    Between points, and before the first, follow straight lines in logarithms. Beyond the last, y
    grows in proportion to x.
    """
    if x >= points[-1][0]:
        return points[-1][1] * x / points[-1][0]
    index = max(1, bisect_right([point[0] for point in points], x))
    (x0, y0), (x1, y1) = points[index - 1], points[min(index, len(points) - 1)]
    if x1 == x0:
        return y0
    share = (log(x) - log(x0)) / (log(x1) - log(x0))
    return exp(log(y0) + share * (log(y1) - log(y0)))
