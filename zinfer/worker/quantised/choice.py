"""Say before a run what multiplies its packed weights, and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zinfer.config import ConfigError, RunConfig
from zinfer.model.quantisable import stored_bits
from zinfer.model.spec import ModelSpec
from zinfer.plan.products import ROWS_PACKED_ON_GPU
from zinfer.worker.quantised import gpu, native

Shared = Callable[[Any], list[Any]]
"""Hands a value to all ranks, and returns those of all, in their order."""


@dataclass(frozen=True, kw_only=True)
class PackedChoice:
    """A way to multiply a few rows with packed weights."""

    kernel: Literal["compiled", "triton", "torch", "unpack", "mixed"]
    """compiled: ours in C++. torch and unpack: PyTorch, after unpacking. mixed: not on all ranks.
    """
    why: str
    seconds: float = 0.0
    """Time that the kernel's trial took."""

    def sentence(self) -> str:
        """Say it."""
        ways = {
            "compiled": "zinfer's compiled kernel multiplies packed weights",
            "triton": "zinfer's Triton kernel multiplies packed weights",
            "mixed": "on some ranks zinfer's Triton kernel multiplies packed weights",
        }
        return f"{ways.get(self.kernel, 'PyTorch unpacks packed weights at each use')} ({self.why})"

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"kernel": self.kernel, "why": self.why}


def packed_choice(
    config: RunConfig, spec: ModelSpec, device: torch.device, share: Shared
) -> PackedChoice | None:
    """Find out for this run. Every rank must call it. None: it has no packed weights of ours.

    Raises:
        ConfigError: dtype.kernel=compiled, and there is no such kernel here.
    """
    if config.quantiser != "zinfer":
        return None
    route = config.dtype.kernel
    if route in ("torch", "unpack"):
        return PackedChoice(kernel=route, why=f"dtype.kernel={route}")
    started_s = time.perf_counter()
    on_cpu = device.type == "cpu"
    reasons = share(_no_cpu_kernel() if on_cpu else _no_gpu_kernel(config, spec, device))
    lacking = [reason for reason in reasons if reason]
    if lacking and route == "compiled":
        raise ConfigError([f"dtype.kernel=compiled: {lacking[0]}. Set dtype.kernel=auto"])
    if len(lacking) == len(reasons):
        return PackedChoice(kernel="torch", why=lacking[0], seconds=_since(started_s))
    if lacking:
        return PackedChoice(kernel="mixed", why=lacking[0], seconds=_since(started_s))
    if on_cpu:
        why = "dtype.kernel=compiled" if route == "compiled" else "compiled for this processor"
        return PackedChoice(kernel="compiled", why=why)
    rows = "all" if route == "compiled" else f"up to {ROWS_PACKED_ON_GPU}"
    why = f"for {rows} rows; in a trial it gave the unpacked product"
    return PackedChoice(kernel="triton", why=why, seconds=_since(started_s))


def _since(started_s: float) -> float:
    return time.perf_counter() - started_s


def _no_cpu_kernel() -> str:
    """Say why this rank has no compiled kernel; "": it has."""
    found = native.library()
    return found if isinstance(found, str) else ""


def _no_gpu_kernel(config: RunConfig, spec: ModelSpec, device: torch.device) -> str:
    """Try Triton's kernel with every number of bits that the model is stored in."""
    dtype = getattr(torch, spec.dtype)
    used = {stored_bits(parameter, config.dtype) for parameter in spec.parameters} - {None}
    reasons = (
        gpu.refused(device, dtype, bits, config.dtype.group_size)
        for bits in sorted(filter(None, used))
    )
    return next(filter(None, reasons), "")
