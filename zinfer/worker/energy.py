"""Measure the energy of the timed generations: a GPU's by NVML, the host's by RAPL.

Both are counters that only grow, so two readings and their difference are enough. They count
everything on the device or socket, other processes included. What cannot be read is None, with
the reason.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.machine.reading import ROOT, read_integer, read_text

if TYPE_CHECKING:
    import torch

POWERCAP = "sys/class/powercap"
"""Source: the kernel's Documentation/power/powercap/powercap.rst. AMD's sockets are there too."""
PACKAGE, DRAM = "package", "dram"
"""Zones that are counted: a socket, and its memory, which the socket's counter leaves out.

`core` and `uncore` are parts of a package; `psys` has everything once more.
"""
NVML_LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules of the timed generations, of one rank. None: not known."""

    device_j: float | None = None
    """The rank's GPU; None on a CPU."""
    host_j: float | None = None
    """All sockets and their memory; 0 for ranks that share the host with the one that counts it."""
    reasons: tuple[str, ...] = ()
    """Why a number is not known."""


@dataclass(frozen=True)
class Zone:
    """One counter of RAPL."""

    folder: Path
    range_j: float
    """The counter begins again at zero after so much."""

    def joules(self) -> float | None:
        """Read the counter; None where this user may not."""
        counted = read_integer(self.folder / "energy_uj")
        return None if counted is None else counted / 1e6


class Meter:
    """Adds up the energy between `start` and `stop`, any number of times."""

    def __init__(
        self,
        device: torch.device,
        root: Path = ROOT,
        nvml: Callable[[], Any] = lambda: ctypes.CDLL(NVML_LIBRARY),
    ) -> None:
        self._reasons: list[str] = []
        self._zones = self._host_zones(root) if os.environ.get("LOCAL_RANK", "0") == "0" else []
        self._shares_host = os.environ.get("LOCAL_RANK", "0") != "0"
        self._gpu = None
        if device.type == "cuda":
            try:
                self._gpu = GpuCounter(nvml(), gpu_uuid(device))
            except (OSError, AttributeError, NvmlError) as error:
                self._reasons.append(f"the GPU's energy is not known: {error}")
        self._device_j = self._host_j = 0.0
        self._started: tuple[float | None, list[float | None]] | None = None

    def start(self) -> None:
        """Read the counters before a generation."""
        self._started = self._read()

    def stop(self) -> None:
        """Add what was used since `start`."""
        assert self._started is not None, "start comes first"
        (gpu_before, zones_before), (gpu, zones) = self._started, self._read()
        if gpu is not None and gpu_before is not None:
            self._device_j += gpu - gpu_before
        for zone, before, after in zip(self._zones, zones_before, zones, strict=True):
            if before is not None and after is not None:
                used = after - before
                self._host_j += used if used >= 0 else used + zone.range_j

    def energy(self) -> Energy:
        """Return the sums."""
        return Energy(
            device_j=self._device_j if self._gpu is not None else None,
            host_j=self._host_j if self._zones or self._shares_host else None,
            reasons=tuple(self._reasons),
        )

    def _read(self) -> tuple[float | None, list[float | None]]:
        gpu = self._gpu.joules() if self._gpu is not None else None
        return gpu, [zone.joules() for zone in self._zones]

    def _host_zones(self, root: Path) -> list[Zone]:
        """Find the sockets and their memory; none, and a reason, where they cannot be read."""
        zones = host_zones(root)
        if not zones:
            self._reasons.append(
                "the host's energy is not known: this kernel shows no RAPL package in "
                f"/{POWERCAP} (virtual machines have none)"
            )
        elif any(zone.joules() is None for zone in zones):
            self._reasons.append(
                f"the host's energy is not known: /{POWERCAP}/*/energy_uj cannot be read by this "
                f"user. Try sudo chmod -R a+r /{POWERCAP}/intel-rapl:*"
            )
            return []
        return zones


def host_zones(root: Path = ROOT) -> list[Zone]:
    """List RAPL's counters that together are the host: packages, and the memory beside them.

    intel-rapl-mmio shows the same packages a second time and is left out.
    """
    found = []
    for folder in sorted((root / POWERCAP).glob("intel-rapl:*")):
        kind = read_text(folder / "name").strip()
        if kind.partition("-")[0] in (PACKAGE, DRAM):
            found.append(Zone(folder, (read_integer(folder / "max_energy_range_uj") or 0) / 1e6))
    return found


class NvmlError(Exception):
    """NVML does not know a GPU's energy."""


class GpuCounter:
    """The energy counter of one GPU, since its driver was loaded.

    Source: NVML API, nvmlDeviceGetTotalEnergyConsumption, in millijoules, from Volta on.
    """

    def __init__(self, library: Any, uuid: str) -> None:
        self._library = library
        self._handle = ctypes.c_void_p()
        self._must(library.nvmlInit_v2(), "NVML does not start")
        found = library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._handle))
        self._must(found, f"NVML knows no GPU {uuid}")
        self.joules()

    def joules(self) -> float:
        """Read the counter. Raises NvmlError where the GPU has none, as a slice of one (MIG)."""
        value = ctypes.c_ulonglong()
        code = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(value))
        self._must(code, "this GPU has no energy counter")
        return value.value / 1000

    @staticmethod
    def _must(code: int, problem: str) -> None:
        if code != 0:
            raise NvmlError(f"{problem} (NVML error {code})")


def gpu_uuid(device: torch.device) -> str:
    """Name a GPU as NVML does: `GPU-` and its UUID."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
