"""Describe the processor: name, instruction sets, usable cores, types it computes in."""

from __future__ import annotations

import os
import re
from pathlib import Path

from zinfer.machine.cgroups import cgroup_folders
from zinfer.machine.reading import ROOT, read_text


def cpu_model_name(root: Path = ROOT) -> str | None:
    """Return the processor's name in /proc/cpuinfo; None on many Arm machines, which give none."""
    found = re.search(
        r"^(?:model name|Model|cpu model)\s*:\s*(.+)$",
        read_text(root / "proc/cpuinfo"),
        re.MULTILINE,
    )
    return found[1].strip() if found else None


def cpu_flags(root: Path = ROOT) -> frozenset[str]:
    """Return the extensions of the first core: `flags` on x86, `Features` on Arm."""
    found = re.search(
        r"^(?:flags|Features)\s*:\s*(.+)$", read_text(root / "proc/cpuinfo"), re.MULTILINE
    )
    return frozenset(found[1].split()) if found else frozenset()


MATRIX_SETS = {
    "amx_bf16": "amx",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "avx_ne_convert": "avx_ne_convert",
    "bf16": "bf16",
    "asimdhp": "fp16",
}
"""Flag of /proc/cpuinfo -> how it is called here: sets that multiply 16-bit floats, or help to."""
WIDEST_VECTORS = ("avx512f", "avx2", "avx", "sve", "asimd")
"""Vector sets from the widest on; a processor is named by the first that it has."""
BFLOAT16_ARITHMETIC = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Flags of processors that multiply bfloat16 numbers.

Source: oneDNN src/cpu/x64/cpu_isa_traits.hpp, src/cpu/aarch64/cpu_isa_traits.hpp.
"""


def instruction_sets(flags: frozenset[str]) -> str | None:
    """Name the sets that decide how fast matrices multiply: 'avx512f, avx512_bf16', 'avx2 only'.

    None: /proc/cpuinfo lists no flags.
    """
    if not flags:
        return None
    widest = next((name for name in WIDEST_VECTORS if name in flags), "no vectors")
    special = [name for flag, name in MATRIX_SETS.items() if flag in flags]
    return ", ".join([widest, *special]) if special else f"{widest} only"


def emulated_dtypes(flags: frozenset[str]) -> tuple[str, ...]:
    """Return the types that the processor emulates. Empty where no flags are known."""
    return ("bfloat16",) if flags and not flags & BFLOAT16_ARITHMETIC else ()


def cpu_description(root: Path = ROOT) -> str | None:
    """Describe it: 'AMD EPYC 9R14 (avx512f, avx512_bf16)'. None: nothing is known of it."""
    name, sets = cpu_model_name(root), instruction_sets(cpu_flags(root))
    return name if sets is None else f"{name or 'CPU'} ({sets})"


def cpu_dtypes(flags: frozenset[str]) -> tuple[str, ...]:
    """List dtypes of DeepSpeed's CPU accelerator; float16 only where oneDNN computes in it.

    oneDNN wants AVX512-FP16 (with its bf16 and vnni companions), or AVX-VNNI-INT8 with
    AVX-NE-CONVERT, or Arm's half precision.
    Sources: oneDNN src/cpu/platform.cpp has_data_type_support, src/cpu/x64/cpu_isa_traits.hpp;
    torch.ops.mkldnn._is_mkldnn_fp16_supported.
    """
    avx512 = {"avx512_fp16", "avx512_bf16", "avx512_vnni", "avx_vnni"} <= flags
    avx2 = {"avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert"} <= flags
    arm = {"fphp", "asimdhp"} <= flags
    return ("float32", "bfloat16", "float16") if avx512 or avx2 or arm else ("float32", "bfloat16")


def host_cores(root: Path = ROOT) -> int:
    """Count the cores this process may keep busy.

    That is its affinity, or the whole cores of the smallest cgroup CPU quota (at least one).
    """
    allowed = len(os.sched_getaffinity(0))
    quotas = [quota for quota in cpu_quotas(root) if quota is not None]
    return max(1, min([allowed, *(int(quota) for quota in quotas)]))


def cpu_quotas(root: Path = ROOT) -> list[float | None]:
    """List the cores that each cgroup around this process allows; None for no limit.

    Read cpu.max of v2, cpu.cfs_quota_us of v1.
    """
    quotas: list[float | None] = []
    for folder in cgroup_folders("cpu", root):
        quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = (
                read_text(folder / "cpu.cfs_quota_us").strip(),
                read_text(folder / "cpu.cfs_period_us").strip(),
            )
        limited = quota.isdecimal() and period.isdecimal() and int(period) > 0
        quotas.append(int(quota) / int(period) if limited else None)
    return quotas
