"""Ask the kernel and torch for this process's peak memory, and for its bytes on disks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Peak use of one rank's process. Metrics sums it over the ranks."""

    peak_host_rss_bytes: int
    """Resident set at its highest (VmHWM), everything of the process included."""
    mlocked_bytes: int
    """Page-locked at the end of the run (VmLck)."""
    huge_page_bytes: int | None
    """Memory without a file that lay in huge pages at the end of the run.

    Source: AnonHugePages of /proc/self/smaps_rollup.
    """
    nvme_read_bytes: int | None
    """Read from block devices while generating; page-cache hits are not in it.

    Source: read_bytes of /proc/self/io.
    """
    nvme_written_bytes: int | None
    """Written to block devices since the process began: the swap files, while loading.

    Source: write_bytes of /proc/self/io. What waits in the page cache counts too.
    """
    peak_device_allocated_bytes: int | None
    """By torch's allocator; None on a device that is host memory."""
    peak_device_reserved_bytes: int | None
    """By torch's allocator; None on a device that is host memory."""


def memory_use(device: torch.device, read_before: int | None) -> MemoryUse:
    """Measure this process now.

    Args:
        read_before: `block_read_bytes()` from before the generation.
    """
    import torch

    read_now = block_read_bytes()
    on_gpu = device.type != "cpu"
    return MemoryUse(
        peak_host_rss_bytes=_proc_bytes("status", "VmHWM") or 0,
        mlocked_bytes=_proc_bytes("status", "VmLck") or 0,
        huge_page_bytes=_proc_bytes("smaps_rollup", "AnonHugePages"),
        nvme_read_bytes=None if read_now is None or read_before is None else read_now - read_before,
        nvme_written_bytes=_proc_number("io", "write_bytes"),
        peak_device_allocated_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        peak_device_reserved_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else None,
    )


def block_read_bytes() -> int | None:
    """Return the bytes that this process caused to be read from block devices.

    None where the kernel does not say. Source: proc(5), read_bytes of /proc/self/io.
    """
    return _proc_number("io", "read_bytes")


def _proc_bytes(file: str, field: str) -> int | None:
    """Read a size of /proc/self/status or smaps_rollup; the kernel gives kB of 1024 bytes."""
    found = _proc_number(file, field)
    return None if found is None else found * 1024


def _proc_number(file: str, field: str) -> int | None:
    try:
        lines = Path("/proc/self", file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(field + ":")), None)
