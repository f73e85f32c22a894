"""Measure this machine's processor, memory, link and disk, without running a model.

Matrices are taken in turn from a set that is larger than the processor's caches, as the layers of
a model are. Every number is a median.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from zinfer.config import RunConfig
from zinfer.job.calibration import calibrated_dtypes
from zinfer.job.events import EventLog
from zinfer.job.files import KERNELS_FILE
from zinfer.job.folder import own_swap_folder
from zinfer.job.records import write_json
from zinfer.machine import native_ops
from zinfer.machine.hardware import detect_hardware
from zinfer.machine.huge_pages import into_huge_pages
from zinfer.plan.own_products import MOST_ROWS
from zinfer.units import MIB
from zinfer.worker.device_attention import (
    attention_flops,
    attention_read,
    device_attention_times,
)
from zinfer.worker.imports import import_everything
from zinfer.worker.kv_cache.rates import host_attention_times, packing_times, unpacking_times
from zinfer.worker.quantised.rates import BITS, packed_times

ROWS = (1, 2, 3, 4, 8, 16, 64, 256, 1024)
SQUARE_SIZES = (64, 256, 512, 1024, 2048)
WIDE_SHAPES = ((512, 2048), (512, 16384))
"""(K, N) of output heads, which see the last token of each row only."""
WIDE_ROWS = (1, 4, 16, 64)
COLD_BYTES = 96 * MIB
"""Larger than the last-level cache of most processors' cores."""
KERNEL_BUDGET_S = 0.02
KERNEL_ROUNDS = 2
"""How often each shape has its turn; the fastest turn counts.

A neighbour on the same processor slows everything for a second or so.
"""
DEQUANTISE_SIZES = (64, 256, 1024, 2048, 4096)
DEQUANTISE_GROUP = 64
"""Elements with one scale, as in dtype=int8 and dtype=int4."""
COPY_BYTES = 128 * MIB
NVME_FILE_BYTES = 256 * MIB
NVME_POINTS = ((MIB, 16, 1), (MIB, 16, 4), (MIB, 64, 4), (8 * MIB, 16, 4))
"""(block bytes, queue depth, intra_op_parallelism); the second is what zero=tuned uses."""
NVME_READS = 2


def kernels_task(config: RunConfig, job_dir: Path, events: EventLog) -> None:
    """Measure everything, in the order of the progress line, into JOB_DIR/kernels.json.

    The file that is written and read for NVMe lies in the job's swap folder.
    """
    import_everything()
    found: dict[str, Any] = {"imported_rss_bytes": _resident_bytes()}
    import torch

    torch.set_grad_enabled(False)
    assert config.offload.nvme_path is not None, "every calibration measures a disk"
    hardware = detect_hardware(config.hardware, None, 1)
    device = torch.device("cpu" if hardware.device_kind == "cpu" else "cuda:0")
    dtypes = calibrated_dtypes(hardware.device_dtypes)
    events.phase("memory bandwidth")
    found |= memory_rates(device)
    events.phase("matrix products")
    found |= matrix_products(dtypes, device, events)
    events.phase("dequantisation")
    found["dequantise"] = [
        row for dtype in dtypes for bits in (8, 4) for row in dequantise_times(bits, dtype, device)
    ]
    events.phase("packed products")
    found["packed"] = [
        row for dtype in dtypes for bits in BITS for row in packed_times(bits, dtype, device)
    ]
    events.phase("attention")
    found["attention"] = {dtype: attention_read(dtype, device) for dtype in dtypes}
    found["device_attention"] = [
        row for dtype in dtypes for row in device_attention_times(dtype, device)
    ]
    found["attention_flops"] = {dtype: attention_flops(dtype, device) for dtype in dtypes}
    events.phase("attention on the host")
    found["host_attention"] = [row for dtype in dtypes for row in host_attention_times(dtype)]
    found["host_packing"] = [row for dtype in dtypes for row in packing_times(dtype)]
    if device.type == "cpu":  # an accelerator unpacks by itself: not measured
        found["host_unpacking"] = [row for dtype in dtypes for row in unpacking_times(dtype)]
    events.phase("NVMe")
    native_ops.adopt(native_ops.all_ops())
    found |= nvme_rates(own_swap_folder(config.offload.nvme_path, job_dir), events)
    write_json(job_dir / KERNELS_FILE, found)
    events.write("result", status="ok", metrics={})


def matrix_products(dtypes: Iterable[str], device: Any, events: EventLog) -> dict[str, Any]:
    """Time every shape in every dtype, in turn, and keep the fastest turn of each.

    Returns:
        `kernels` by PyTorch, and `own_kernels`: a few rows of 16 bits by ours, on a processor.
    """
    import torch

    from zinfer.worker.quantised import native
    from zinfer.worker.skinny.product import SIXTEEN_BITS, own_linear

    linear = torch.nn.functional.linear
    has_ours = device.type == "cpu" and not isinstance(native.library(), str)
    kinds = {name: getattr(torch, name) for name in dtypes}
    points = [(dtype, shape) for dtype in kinds for shape in _shapes()]
    pools = {
        name: torch.randn(COLD_BYTES // kind.itemsize, dtype=kind, device=device)
        for name, kind in kinds.items()
    }
    rounds: list[list[dict[str, Any]]] = [[] for _ in range(KERNEL_ROUNDS)]
    own_rounds: list[list[dict[str, Any]]] = [[] for _ in range(KERNEL_ROUNDS)]
    for done in range(KERNEL_ROUNDS * len(points)):
        dtype, (k, n, wide) = points[done % len(points)]
        pool, turn = pools[dtype], done // len(points)
        rounds[turn] += kernel_times(dtype, k, n, wide, pool, linear)
        if has_ours and pool.dtype in SIXTEEN_BITS:
            own_rounds[turn] += kernel_times(dtype, k, n, wide, pool, own_linear, MOST_ROWS)
        events.progress(done + 1, KERNEL_ROUNDS * len(points), "shapes")
    return {"kernels": _fastest(rounds), "own_kernels": _fastest(own_rounds)}


def _fastest(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the fastest turn of each product."""
    return [min(times, key=lambda row: row["seconds"]) for times in zip(*rounds, strict=True)]


def _resident_bytes() -> int:
    """Return this process's memory now. Source: proc(5), the second number of statm, in pages."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _shapes() -> Iterator[tuple[int, int, bool]]:
    """Yield (K, N, whether it is an output head)."""
    yield from ((size, size, False) for size in SQUARE_SIZES)
    yield from ((k, n, True) for k, n in WIDE_SHAPES)


def samples_s(
    run: Callable[[int], object], device: Any, *, budget_s: float, least: int = 3
) -> list[float]:
    """Call `run` with 1, 2, 3, ... until the budget is spent; return the seconds of each call.

    One call with 0 goes before and does not count.
    """
    import torch

    def now_s() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    run(0)
    taken: list[float] = []
    started_s = now_s()
    while len(taken) < least or (now_s() - started_s < budget_s and len(taken) < 1000):
        before_s = now_s()
        run(len(taken) + 1)
        taken.append(now_s() - before_s)
    return taken


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """Return the median, and half the interquartile range over it."""
    middle = statistics.median(values)
    if len(values) < 4:
        return middle, (max(values) - min(values)) / 2 / middle
    low, _, high = statistics.quantiles(values, n=4)
    return middle, (high - low) / 2 / middle


def rate(amount: float, seconds: list[float]) -> dict[str, float]:
    """Return the amount per second with its spread."""
    middle, spread = median_and_spread(seconds)
    return {"median": amount / middle, "spread": spread}


def memory_rates(device: Any) -> dict[str, Any]:
    """Read and copy host memory; on a GPU also its own memory and the link, in bytes per second.

    The link is measured from pageable and from page-locked host memory.
    """
    import torch

    host = torch.device("cpu")
    source = torch.ones(COPY_BYTES // 4, dtype=torch.float32)
    target = torch.empty_like(source)
    found: dict[str, Any] = {
        "host_read": rate(COPY_BYTES, samples_s(lambda _: source.sum(), host, budget_s=0.5)),
        "host_copy": rate(
            2 * COPY_BYTES, samples_s(lambda _: target.copy_(source), host, budget_s=0.5)
        ),
        "device_read": None,
        "host_to_device_pageable": None,
        "host_to_device_pinned": None,
        "device_to_host_pinned": None,
    }
    if device.type != "cpu":
        there, pinned = source.to(device), source.pin_memory()
        found["device_read"] = rate(
            COPY_BYTES, samples_s(lambda _: there.sum(), device, budget_s=0.3)
        )
        found["host_to_device_pageable"] = rate(
            COPY_BYTES, samples_s(lambda _: there.copy_(source), device, budget_s=0.5)
        )
        found["host_to_device_pinned"] = rate(
            COPY_BYTES,
            samples_s(lambda _: there.copy_(pinned, non_blocking=True), device, budget_s=0.5),
        )
        found["device_to_host_pinned"] = rate(
            COPY_BYTES,
            samples_s(lambda _: pinned.copy_(there, non_blocking=True), device, budget_s=0.5),
        )
    return found


def kernel_times(
    dtype: str,
    k: int,
    n: int,
    wide: bool,
    pool: Any,
    multiply: Callable[[Any, Any], object],
    most_rows: int = ROWS[-1],
) -> Iterator[dict[str, Any]]:
    """Time [rows, K] x [K, N] for each number of rows, one matrix of the pool after another.

    Args:
        multiply: functional.linear, or another that takes the same.
        most_rows: numbers of rows above are left out.
    """
    import torch

    weights = [
        pool[start : start + k * n].view(n, k) for start in range(0, len(pool) - k * n + 1, k * n)
    ][:256]
    for rows in (rows for rows in (WIDE_ROWS if wide else ROWS) if rows <= most_rows):
        inputs = torch.randn(1, rows, k, device=pool.device).to(pool.dtype)

        def product(index: int, inputs: Any = inputs) -> object:
            return multiply(inputs, weights[index % len(weights)])

        seconds, spread = median_and_spread(
            samples_s(product, pool.device, budget_s=KERNEL_BUDGET_S, least=2)
        )
        yield {
            "dtype": dtype,
            "rows": rows,
            "weight_numel": k * n,
            "wide": wide,
            "seconds": seconds,
            "spread": spread,
        }


def dequantise_times(bits: int, dtype: str, device: Any) -> Iterator[dict[str, Any]]:
    """Time DeepSpeed's unpacking of square matrices, one of the pool after another.

    Yields nothing for float16 on a GPU, where DeepSpeed has a kernel that must be compiled first.
    """
    import torch
    from deepspeed.inference.quantization.utils import DeQuantizer

    kind = getattr(torch, dtype)
    if device.type != "cpu" and kind is torch.float16:
        return
    unpack = DeQuantizer(
        {"num_bits": bits, "group_size": DEQUANTISE_GROUP, "group_dim": 1, "symmetric": False}, kind
    ).dequantize
    pool = torch.ones(COLD_BYTES, dtype=torch.uint8, device=device)
    for size in DEQUANTISE_SIZES:
        packed = size * size * bits // 8
        weights = [
            pool[start : start + packed].view(size, -1)
            for start in range(0, COLD_BYTES - packed + 1, packed)
        ][:256]
        scale = torch.ones(size, size // DEQUANTISE_GROUP, 1, dtype=kind, device=device)

        def dequantise(index: int, weights: Any = weights, scale: Any = scale) -> object:
            return unpack(weights[index % len(weights)], scale, scale)

        seconds, spread = median_and_spread(samples_s(dequantise, device, budget_s=KERNEL_BUDGET_S))
        yield {
            "bits": bits,
            "dtype": dtype,
            "weight_numel": size * size,
            "seconds": seconds,
            "spread": spread,
        }


def nvme_rates(folder: Path, events: EventLog) -> dict[str, Any]:
    """Write and read one file through DeepSpeed's aio handle, which opens it with O_DIRECT."""
    import torch
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from zinfer.machine import disk

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"zinfer-calibrate-{os.getpid()}"
    page_cache = _page_cache(folder)
    rows = []
    try:
        for done, (block, depth, parallelism) in enumerate(NVME_POINTS):
            handle = (
                AsyncIOBuilder()
                .load(verbose=False)
                .aio_handle(block, depth, False, True, parallelism)
            )
            buffer = handle.new_cpu_locked_tensor(
                NVME_FILE_BYTES, torch.empty(0, dtype=torch.uint8)
            )
            into_huge_pages(buffer.data_ptr(), buffer.nbytes)  # as the engine does
            written = [_timed(handle.sync_pwrite, buffer, str(file))] if done < 2 else []
            read = [_timed(handle.sync_pread, buffer, str(file)) for _ in range(NVME_READS)]
            for operation, seconds in (("write", written), ("read", read)):
                if seconds:
                    point = {
                        "operation": operation,
                        "block_bytes": block,
                        "queue_depth": depth,
                        "intra_op_parallelism": parallelism,
                    }
                    rows.append({**point, "rate": rate(NVME_FILE_BYTES, seconds)})
            handle.free_cpu_locked_tensor(buffer)
            events.progress(done + 1, len(NVME_POINTS), "settings")
    finally:
        file.unlink(missing_ok=True)
    return {
        "nvme": rows,
        "nvme_page_cache": page_cache,
        "nvme_path_filesystem": disk.filesystem_of(folder),
        "nvme_free_bytes": shutil.disk_usage(folder).free,
    }


def _timed(call: Callable[..., object], *arguments: object) -> float:
    started_s = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started_s


def _page_cache(folder: Path) -> str:
    """Return `bypassed` where the file system takes O_DIRECT, else why these are not its rates."""
    probe = folder / f".zinfer-direct-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_RDWR | os.O_DIRECT))
        return "bypassed"
    except OSError as error:
        return f"used: O_DIRECT is refused ({error.strerror}), so these may be rates of memory"
    finally:
        probe.unlink(missing_ok=True)
