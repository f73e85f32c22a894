"""What this machine says of itself: GPUs, processor, memory under cgroups, locked memory, disks. Without torch.

Each fact is one function that takes the root of the file system it reads (/proc, /sys/fs/cgroup), or the text of nvidia-smi, so that tests
feed it the texts of other machines. A number that cannot be found is None.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zinfer.config import HardwareConfig
from zinfer.units import GIB, KIB, MIB

ROOT = Path("/")
NVIDIA_SMI_TIMEOUT_S = 5.0
NVIDIA_SMI_FIELDS = (
    "index", "uuid", "name", "memory.total", "memory.free", "compute_cap", "power.limit", "driver_version",
    "clocks.max.sm", "clocks.max.memory", "mig.mode.current",
)  # fmt: skip
NO_GPU_EXIT_CODES = (6, 9, 12)
"""nvidia-smi: no devices, no driver, no NVML library. Any other failure is a GPU that does not work. Source: man nvidia-smi."""
CAP_IPC_LOCK = 14
"""Bit of the capability that lifts the limit on locked memory. Source: linux/capability.h."""


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


# The accelerator


def usable_gpus(config: HardwareConfig) -> list[Gpu]:
    """The GPUs that a worker will see, none for the CPU accelerator.

    Raises:
        ValueError: accelerator=cuda without a GPU or without a torch that can use it, or a GPU that is there but does not answer.
    """
    if config.accelerator == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible_gpus(nvidia_gpus(), visible)
    torch_cuda = torch_cuda_version()
    if config.accelerator == "cuda" and not gpus:
        raise ValueError(
            "hardware.accelerator=cuda, but nvidia-smi lists no GPU here "
            f"(CUDA_VISIBLE_DEVICES is {'not set' if visible is None else repr(visible)}). "
            "Type hardware.accelerator=cpu to run on the CPU"
        )
    if config.accelerator == "cuda" and torch_cuda is None:
        raise ValueError(
            "hardware.accelerator=cuda, but the installed torch is built for the CPU only. "
            "Type pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128, or hardware.accelerator=cpu"
        )
    return gpus if torch_cuda is not None else []


def nvidia_gpus() -> list[Gpu]:
    """Every GPU that nvidia-smi lists; none where there is no nvidia-smi or no driver.

    Raises:
        ValueError: nvidia-smi fails in another way, or hangs: running on the CPU instead would measure the wrong device.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        done = subprocess.run(
            [command, f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"nvidia-smi did not answer within {NVIDIA_SMI_TIMEOUT_S:.0f} s: a GPU is there but does not work. "
            "Type hardware.accelerator=cpu to run without it"
        ) from None
    if done.returncode in NO_GPU_EXIT_CODES:
        return []
    if done.returncode != 0:
        said = (done.stdout or done.stderr).strip().splitlines()
        raise ValueError(
            f"nvidia-smi failed with exit code {done.returncode}: {said[0] if said else 'no message'}. "
            "Type hardware.accelerator=cpu to run without the GPU"
        )
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """Lines of NVIDIA_SMI_FIELDS, comma separated, without header and units. Memory is in MiB, power in watts, clocks in MHz."""
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
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order: indices or (abbreviated) UUIDs, up to the first entry that names none.

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
    """float16 from capability 7.0 (DeepSpeed refuses it below), bfloat16 from 8.0: older GPUs only emulate it, which is not worth timing.

    Sources: deepspeed/accelerator/cuda_accelerator.py is_fp16_supported; torch.cuda.is_bf16_supported(including_emulation=False).
    """
    if compute_capability is None:
        return ("float32", "float16", "bfloat16")
    float16 = ("float16",) if compute_capability >= (7, 0) else ()
    bfloat16 = ("bfloat16",) if compute_capability >= (8, 0) else ()
    return ("float32", *float16, *bfloat16)


def torch_cuda_version() -> str | None:
    """CUDA (or ROCm) version that the installed torch is built for, None for a CPU build. Read from its version.py, not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    version = _read(Path(next(iter(spec.submodule_search_locations))) / "version.py")
    built_for = re.search(r"^(?:cuda|hip)\b[^=\n]*=\s*'([^']+)'", version, re.MULTILINE)
    return built_for[1] if built_for else None


# The processor and host memory


def cpu_model_name(root: Path = ROOT) -> str | None:
    """As /proc/cpuinfo names it; None where it does not (many Arm machines)."""
    found = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else None


def cpu_flags(root: Path = ROOT) -> frozenset[str]:
    """Instruction set extensions of the first core: `flags` on x86, `Features` on Arm."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def cpu_dtypes(flags: frozenset[str]) -> tuple[str, ...]:
    """Types of DeepSpeed's CPU accelerator: float32 and bfloat16 always, float16 where oneDNN computes in it.

    oneDNN wants AVX512-FP16 (with its bf16 and vnni companions), or AVX-VNNI-INT8 with AVX-NE-CONVERT, or Arm's half precision.
    Sources: oneDNN src/cpu/platform.cpp has_data_type_support, src/cpu/x64/cpu_isa_traits.hpp; torch.ops.mkldnn._is_mkldnn_fp16_supported.
    """
    avx512 = {"avx512_fp16", "avx512_bf16", "avx512_vnni", "avx_vnni"} <= flags
    avx2 = {"avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert"} <= flags
    arm = {"fphp", "asimdhp"} <= flags
    return ("float32", "bfloat16", "float16") if avx512 or avx2 or arm else ("float32", "bfloat16")


def host_total_bytes(root: Path = ROOT) -> int | None:
    """Memory of the machine, or the smallest limit of the cgroups around this process."""
    return least(_meminfo_bytes(root, "MemTotal"), *(group.limit_bytes for group in memory_cgroups(root)))


def host_available_bytes(root: Path = ROOT) -> int | None:
    """What can be allocated without swapping: MemAvailable, or less where a cgroup, at any level up the tree, leaves less."""
    return least(_meminfo_bytes(root, "MemAvailable"), *(group.available_bytes for group in memory_cgroups(root)))


def host_cores(root: Path = ROOT) -> int:
    """Cores this process may keep busy: its affinity, and the whole cores of the smallest cgroup CPU quota (at least one)."""
    allowed = len(os.sched_getaffinity(0))
    quotas = [quota for quota in cpu_quotas(root) if quota is not None]
    return max(1, min([allowed, *(int(quota) for quota in quotas)]))


@dataclass(frozen=True, kw_only=True)
class MemoryCgroup:
    """One level of the cgroup tree that limits memory."""

    limit_bytes: int
    used_bytes: int
    """Without the page cache, which the kernel gives back on demand."""

    @property
    def available_bytes(self) -> int:
        """What the limit leaves."""
        return max(0, self.limit_bytes - self.used_bytes)


def memory_cgroups(root: Path = ROOT) -> list[MemoryCgroup]:
    """Every cgroup around this process that limits memory, v2 (memory.max and memory.high) and v1 (memory.limit_in_bytes)."""
    groups = []
    for folder in cgroup_folders("memory", root):
        limits = [_integer(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        used = least(_integer(folder / "memory.current"), _integer(folder / "memory.usage_in_bytes"))
        limit = least(*limits)
        if limit is None or used is None or limit >= 1 << 60:  # v1 says "no limit" with a number near 2**63
            continue
        cache = sum(int(size) for size in re.findall(r"^(?:total_)?(?:in)?active_file (\d+)$", _memory_stat(folder), re.MULTILINE))
        groups.append(MemoryCgroup(limit_bytes=limit, used_bytes=max(0, used - cache)))
    return groups


def cpu_quotas(root: Path = ROOT) -> list[float | None]:
    """Cores that each cgroup around this process allows, v2 (cpu.max) and v1 (cpu.cfs_quota_us); None for no limit."""
    quotas: list[float | None] = []
    for folder in cgroup_folders("cpu", root):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
        limited = quota.isdecimal() and period.isdecimal() and int(period) > 0
        quotas.append(int(quota) / int(period) if limited else None)
    return quotas


def cgroup_folders(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Folders of the cgroups that this process is in, innermost first, for the v1 controller and for the unified v2 tree.

    A container may see its own cgroup as the root of the tree: the process's path is then not below the mount, and the mount is the group.
    """
    paths = dict(_process_cgroups(root))
    for mount in mounts(root):
        v1 = mount.filesystem == "cgroup" and controller in mount.super_options.split(",")
        if not v1 and mount.filesystem != "cgroup2":
            continue
        path = paths.get(controller if v1 else "")
        if path is None:
            continue
        top = root / mount.mount_point.lstrip("/")
        inside = os.path.relpath(path, mount.mounted_folder)
        here = top if inside.startswith("..") or not (top / inside).is_dir() else top / inside
        while True:
            yield here
            if here == top or top not in here.parents:
                break
            here = here.parent


def _process_cgroups(root: Path) -> Iterator[tuple[str, str]]:
    """Controller ('' for v2) and path of each line of /proc/self/cgroup: `4:memory:/docker/1f`, `0::/user.slice`."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(",") if number != "0" else [""]:
            yield controller, path


def memlock_limit_bytes(root: Path = ROOT) -> int | None:
    """`ulimit -l`; None when there is no limit, as for root: CAP_IPC_LOCK lifts it, though not inside a user namespace."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return None
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", _read(root / "proc/self/status"), re.MULTILINE)
    lifted = effective is not None and bool(int(effective[1], 16) >> CAP_IPC_LOCK & 1)
    initial_namespace = _read(root / "proc/self/uid_map").split() == ["0", "0", "4294967295"]
    return None if lifted and initial_namespace else soft


# The disk


@dataclass(frozen=True, kw_only=True)
class Mount:
    """One line of /proc/self/mountinfo. Source: man 5 proc_pid_mountinfo."""

    mount_point: str
    mounted_folder: str
    """Folder of the file system that is the root of this mount."""
    filesystem: str
    device: str
    super_options: str


def mounts(root: Path = ROOT) -> Iterator[Mount]:
    """Every mount that this process sees, in the order in which they were made."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, after = left.split(), right.split(" ")
        if len(fields) >= 5 and len(after) >= 3:
            yield Mount(
                mount_point=_unescape(fields[4]),
                mounted_folder=_unescape(fields[3]),
                filesystem=after[0],
                device=_unescape(after[1]),
                super_options=after[2],
            )


def mount_of(path: Path, root: Path = ROOT) -> Mount | None:
    """The mount that holds `path` (which need not exist yet): the longest mount point above it, the latest where several share it."""
    real = existing_parent(path).resolve()
    holding = [mount for mount in mounts(root) if real.is_relative_to(mount.mount_point)]
    longest = max((len(mount.mount_point) for mount in holding), default=0)
    return next((mount for mount in reversed(holding) if len(mount.mount_point) == longest), None)


def filesystem_of(path: Path, root: Path = ROOT) -> str | None:
    """Name of the file system of `path`: ext4, xfs, overlay, tmpfs, nfs4, ..."""
    mount = mount_of(path, root)
    return mount.filesystem if mount else None


def disk_bytes(path: Path) -> tuple[int, int]:
    """Free (for this user) and total bytes of the file system that `path` is, or will be, on."""
    status = os.statvfs(existing_parent(path))
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def existing_parent(path: Path) -> Path:
    """`path` itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


# Reading


def _read(path: Path) -> str:
    """Text of a small system file, empty where there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _integer(path: Path) -> int | None:
    """A file that holds one number; None where it holds `max` or does not exist."""
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _number(text: str) -> float | None:
    """nvidia-smi's number; None for [N/A], [Not Supported], [Insufficient Permissions]."""
    try:
        return float(text)
    except ValueError:
        return None


def least(*values: int | None) -> int | None:
    """The smallest of those that are known."""
    return min((value for value in values if value is not None), default=None)


def _meminfo_bytes(root: Path, name: str) -> int | None:
    found = re.search(rf"^{name}:\s*(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * KIB if found else None


def _memory_stat(folder: Path) -> str:
    """The lines of memory.stat that count the whole subtree: in v1 those named total_*."""
    text = _read(folder / "memory.stat")
    totals = "\n".join(line for line in text.splitlines() if line.startswith("total_"))
    return totals or text


def _unescape(text: str) -> str:
    r"""Spaces and the like are octal in mountinfo: `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def rounded_gib(count: int | None) -> int | None:
    """Whole GiB, for naming machines."""
    return None if count is None else round(count / GIB)
