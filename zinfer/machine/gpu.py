"""List the GPUs of this machine by nvidia-smi, without torch."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from zinfer.config import HardwareConfig
from zinfer.machine.reading import read_text
from zinfer.units import MIB

NVIDIA_SMI_TIMEOUT_S = 5.0
NVIDIA_SMI_FIELDS = (
    "index", "uuid", "name", "memory.total", "memory.free", "compute_cap",
    "power.limit", "driver_version",
    "clocks.max.sm", "clocks.max.memory", "mig.mode.current",
)  # fmt: skip
NO_GPU_EXIT_CODES = (6, 9, 12)
"""Exit codes of nvidia-smi for: no devices, no driver, no NVML library.

Any other failure is a GPU that does not work. Source: man nvidia-smi.
"""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One line of nvidia-smi; what it does not say ([N/A]) is None."""

    index: int
    uuid: str
    name: str
    total_bytes: int | None
    free_bytes: int | None
    compute_capability: tuple[int, int] | None
    power_limit_watts: float | None
    driver_version: str | None
    max_sm_clock_mhz: float | None
    max_memory_clock_mhz: float | None
    mig: bool = False


def usable_gpus(config: HardwareConfig) -> list[Gpu]:
    """List the GPUs that a worker will see; none for the CPU accelerator.

    Raises:
        ValueError: accelerator=cuda without a GPU or without a torch that can use it, a GPU that
            is there but does not answer, or a DS_ACCELERATOR that contradicts the configuration.
    """
    accelerator = chosen_accelerator(config)
    if accelerator == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible_gpus(nvidia_gpus(), visible)
    torch_cuda = torch_cuda_version()
    asked = "hardware.accelerator" if config.accelerator == "cuda" else "DS_ACCELERATOR"
    if accelerator == "cuda" and not gpus:
        raise ValueError(
            f"{asked}=cuda, but nvidia-smi lists no GPU here "
            f"(CUDA_VISIBLE_DEVICES is {'not set' if visible is None else repr(visible)}). "
            f"Set {asked}=cpu to run on the CPU"
        )
    if accelerator == "cuda" and torch_cuda is None:
        raise ValueError(
            f"{asked}=cuda, but the installed torch is built for the CPU only. "
            "Run pip install --force-reinstall torch "
            f"--index-url https://download.pytorch.org/whl/cu128, or set {asked}=cpu"
        )
    return gpus if torch_cuda is not None else []


def chosen_accelerator(config: HardwareConfig) -> str:
    """Return hardware.accelerator, or DS_ACCELERATOR where it is auto: `auto`, `cpu` or `cuda`.

    DeepSpeed obeys this variable of the environment, so the plan does too.

    Raises:
        ValueError: the variable contradicts hardware.accelerator, or names what zinfer cannot use.
    """
    forced = os.environ.get("DS_ACCELERATOR")
    if not forced or forced == config.accelerator:
        return config.accelerator
    if forced not in ("cpu", "cuda"):
        raise ValueError(
            f"DS_ACCELERATOR={forced} in the environment: zinfer runs on cpu and cuda. "
            "Unset DS_ACCELERATOR, or set it to cpu"
        )
    if config.accelerator != "auto":
        raise ValueError(
            f"hardware.accelerator={config.accelerator}, but DS_ACCELERATOR={forced} in the "
            f"environment. Set hardware.accelerator={forced}, or unset DS_ACCELERATOR"
        )
    return forced


def is_surely_cpu(config: HardwareConfig) -> bool:
    """Tell at once, without asking a driver, that a worker will compute on the processor."""
    asked = (config.accelerator, os.environ.get("DS_ACCELERATOR"))
    return "cpu" in asked or shutil.which("nvidia-smi") is None


def nvidia_gpus() -> list[Gpu]:
    """Return each GPU that nvidia-smi lists; none without nvidia-smi or a driver.

    Raises:
        ValueError: nvidia-smi fails in another way, or hangs. Running on the CPU instead would
            measure the wrong device.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        done = subprocess.run(
            [command, f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}",
             "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"nvidia-smi did not answer within {NVIDIA_SMI_TIMEOUT_S:.0f} s: "
            "a GPU is there but does not work. "
            "Set hardware.accelerator=cpu to run without it"
        ) from None
    if done.returncode in NO_GPU_EXIT_CODES:
        return []
    if done.returncode != 0:
        said = (done.stdout or done.stderr).strip().splitlines()
        raise ValueError(
            f"nvidia-smi failed with exit code {done.returncode}: "
            f"{said[0] if said else 'no message'}. "
            "Set hardware.accelerator=cpu to run without the GPU"
        )
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """Parse lines of NVIDIA_SMI_FIELDS, comma separated, without header and units.

    Memory is in MiB, power in watts, clocks in MHz.
    """
    gpus = []
    for values in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(values) != len(NVIDIA_SMI_FIELDS):
            continue  # "No devices were found"
        row = dict(zip(NVIDIA_SMI_FIELDS, (value.strip() for value in values), strict=True))
        total, free = _number(row["memory.total"]), _number(row["memory.free"])
        capability = re.fullmatch(r"(\d+)\.(\d+)", row["compute_cap"])
        gpus.append(
            Gpu(
                index=int(row["index"]),
                uuid=row["uuid"],
                name=row["name"],
                total_bytes=None if total is None else int(total * MIB),
                free_bytes=None if free is None else int(free * MIB),
                compute_capability=(int(capability[1]), int(capability[2])) if capability else None,
                power_limit_watts=_number(row["power.limit"]),
                driver_version=row["driver_version"] or None,
                max_sm_clock_mhz=_number(row["clocks.max.sm"]),
                max_memory_clock_mhz=_number(row["clocks.max.memory"]),
                mig=row["mig.mode.current"] == "Enabled",
            )
        )
    return gpus


def visible_gpus(gpus: list[Gpu], cuda_visible_devices: str | None) -> list[Gpu]:
    """Keep the GPUs that CUDA_VISIBLE_DEVICES names, in its order.

    Entries are indices or (abbreviated) UUIDs. The first one that names none ends the list.

    Source: CUDA C++ Programming Guide, "CUDA Environment Variables".
    A MIG entry names a slice of some GPU: the first one with slices stands for it.
    """
    if cuda_visible_devices is None:
        return gpus
    visible = []
    for entry in (part.strip() for part in cuda_visible_devices.split(",")):
        if entry.startswith("MIG-"):
            matches = [gpu for gpu in gpus if gpu.mig][:1]
        elif entry.isdecimal():
            matches = [gpu for gpu in gpus if gpu.index == int(entry)]
        else:
            matches = [gpu for gpu in gpus if len(entry) > 4 and gpu.uuid.startswith(entry)]
        if len(matches) != 1:
            break
        visible += matches
    return visible


def cuda_dtypes(compute_capability: tuple[int, int] | None) -> tuple[str, ...]:
    """List a GPU's dtypes: float16 from capability 7.0, bfloat16 from 8.0.

    DeepSpeed refuses float16 below 7.0. Older GPUs only emulate bfloat16, not worth timing.

    Sources: deepspeed/accelerator/cuda_accelerator.py is_fp16_supported;
    torch.cuda.is_bf16_supported(including_emulation=False).
    """
    if compute_capability is None:
        return ("float32", "float16", "bfloat16")
    float16 = ("float16",) if compute_capability >= (7, 0) else ()
    bfloat16 = ("bfloat16",) if compute_capability >= (8, 0) else ()
    return ("float32", *float16, *bfloat16)


def torch_cuda_version() -> str | None:
    """Read the CUDA (or ROCm) version of the installed torch from its version.py.

    None for a CPU build. torch is not imported.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    version = read_text(Path(next(iter(spec.submodule_search_locations))) / "version.py")
    built_for = re.search(r"^(?:cuda|hip)\b[^=\n]*=\s*'([^']+)'", version, re.MULTILINE)
    return built_for[1] if built_for else None


def _number(text: str) -> float | None:
    """Read nvidia-smi's number; None for [N/A], [Not Supported], [Insufficient Permissions]."""
    try:
        return float(text)
    except ValueError:
        return None
