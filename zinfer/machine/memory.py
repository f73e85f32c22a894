"""Measure host memory: total, available, limited by cgroups, and what may be page-locked."""

from __future__ import annotations

import re
import resource
from dataclasses import dataclass
from pathlib import Path

from zinfer.machine.cgroups import cgroup_folders
from zinfer.machine.reading import ROOT, least, read_integer, read_text
from zinfer.units import GIB, KIB

CAP_IPC_LOCK = 14
"""Bit of the capability that lifts the limit on locked memory. Source: linux/capability.h."""


def host_total_bytes(root: Path = ROOT) -> int | None:
    """Return the machine's memory, or the smallest limit of the cgroups around this process."""
    return least(
        _meminfo_bytes(root, "MemTotal"), *(group.limit_bytes for group in memory_cgroups(root))
    )


def host_available_bytes(root: Path = ROOT) -> int | None:
    """Return the bytes that can be allocated without swapping.

    That is MemAvailable, or less where a cgroup at any level up the tree leaves less.
    """
    return least(
        _meminfo_bytes(root, "MemAvailable"),
        *(group.available_bytes for group in memory_cgroups(root)),
    )


@dataclass(frozen=True, kw_only=True)
class MemoryCgroup:
    """One level of the cgroup tree that limits memory."""

    limit_bytes: int
    used_bytes: int
    """Without the page cache, which the kernel gives back on demand."""

    @property
    def available_bytes(self) -> int:
        """Bytes that the limit leaves."""
        return max(0, self.limit_bytes - self.used_bytes)


def memory_cgroups(root: Path = ROOT) -> list[MemoryCgroup]:
    """List the cgroups around this process that limit memory.

    Read memory.max and memory.high of v2, memory.limit_in_bytes of v1.
    """
    groups = []
    for folder in cgroup_folders("memory", root):
        limits = [
            read_integer(folder / name)
            for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
        ]
        used = least(
            read_integer(folder / "memory.current"), read_integer(folder / "memory.usage_in_bytes")
        )
        limit = least(*limits)
        if (
            limit is None or used is None or limit >= 1 << 60
        ):  # v1 says "no limit" with a number near 2**63
            continue
        cache = sum(
            int(size)
            for size in re.findall(
                r"^(?:total_)?(?:in)?active_file (\d+)$", _memory_stat(folder), re.MULTILINE
            )
        )
        groups.append(MemoryCgroup(limit_bytes=limit, used_bytes=max(0, used - cache)))
    return groups


def memlock_limit_bytes(root: Path = ROOT) -> int | None:
    """Read `ulimit -l`. None: no limit, as for root.

    CAP_IPC_LOCK lifts the limit, though not inside a user namespace.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return None
    effective = re.search(
        r"^CapEff:\s*([0-9a-f]+)$", read_text(root / "proc/self/status"), re.MULTILINE
    )
    lifted = effective is not None and bool(int(effective[1], 16) >> CAP_IPC_LOCK & 1)
    initial_namespace = read_text(root / "proc/self/uid_map").split() == ["0", "0", "4294967295"]
    return None if lifted and initial_namespace else soft


def _meminfo_bytes(root: Path, name: str) -> int | None:
    found = re.search(rf"^{name}:\s*(\d+) kB$", read_text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * KIB if found else None


def _memory_stat(folder: Path) -> str:
    """Pick the lines of memory.stat that count the whole subtree: in v1 those named total_*."""
    text = read_text(folder / "memory.stat")
    totals = "\n".join(line for line in text.splitlines() if line.startswith("total_"))
    return totals or text


def rounded_gib(count: int | None) -> int | None:
    """Return the whole GiB, for naming machines."""
    return None if count is None else round(count / GIB)
