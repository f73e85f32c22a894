"""Describe what a number depends on besides the configuration.

That is: versions, commits, processor, GPU and its driver, disk, limits.

Package versions come from installed metadata; nothing is imported. The host's name is hashed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zinfer
from zinfer.config import RunConfig
from zinfer.job.outcome import Json
from zinfer.machine import disk, gpu, memory, processor, reading
from zinfer.machine.gpu import Gpu
from zinfer.redact import redact

PACKAGES = (
    "torch", "transformers", "deepspeed", "accelerate", "tokenizers", "safetensors", "gguf",
    "numpy", "ninja",
    "hydra-core", "omegaconf", "pydantic", "mlflow", "mlflow-skinny", "sqlalchemy",
)  # fmt: skip
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY", "LD_PRELOAD", "MALLOC_CONF",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF", "DS_ACCELERATOR", "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip
"""Environment variables that change speed; those that are set are recorded."""
GIT_TIMEOUT_S = 5.0
SOURCE_SUFFIXES = (".py", ".yaml")
PACKAGE_FOLDER = Path(__file__).parents[1]


def environment(config: RunConfig, nvme_path: Path | None, gpus: list[Gpu] | None = None) -> Json:
    """Describe everything about this machine and installation that can move a number.

    Args:
        gpus: those already listed, to save asking again.
    """
    checkout, working_directory = git_states(PACKAGE_FOLDER.parent, Path.cwd())
    if gpus is None:
        gpus = gpu.usable_gpus(config.hardware) if config.hardware.name == "detect" else []
    found: Json = {
        "zinfer": {
            "version": zinfer.__version__,
            "commit": checkout.commit,
            "dirty": checkout.dirty,
        },
        "working_directory": {"commit": working_directory.commit, "dirty": working_directory.dirty},
        "packages": package_versions(),
        "python": platform.python_version(),
        "os": operating_system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "host_hash": hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12],
        "cpu": {
            "model": processor.cpu_model_name(),
            "instruction_sets": processor.instruction_sets(processor.cpu_flags()),
            "cores": os.cpu_count(),
            "usable_cores": processor.host_cores(),
            "governor": cpu_governor(),
        },
        "host_total_bytes": memory.host_total_bytes(),
        "host_available_bytes": memory.host_available_bytes(),
        "gpus": [gpu_facts(gpu) for gpu in gpus],
        "disk": disk_facts(nvme_path) if nvme_path else None,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "ulimits": ulimits(),
        "container": container_facts(),
    }
    return redact(found)


def hardware_fingerprint(env: Json) -> str:
    """Name the hardware by 12 hexadecimal digits: alike machines have the same.

    The disk of nvme_path is not in it: runs with NVMe are compared with runs without.
    """
    decisive = {
        "cpu": env["cpu"]["model"],
        "instruction_sets": env["cpu"]["instruction_sets"],
        "cores": env["cpu"]["usable_cores"],
        "host_gib": memory.rounded_gib(env["host_total_bytes"]),
        "gpus": [gpu["name"] for gpu in env["gpus"]],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


# Software


def package_versions() -> Json:
    """Return the installed versions by name; packages that are not installed are absent."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True, kw_only=True)
class GitState:
    """Describe a checkout; None where there is none (installed from a wheel, no git)."""

    commit: str | None = None
    dirty: bool | None = None
    """True where the commit does not reproduce the run.

    Tracked files differ from it, or there are .py and .yaml files that git does not know.
    """


def git_states(checkout: Path, working_directory: Path) -> tuple[GitState, GitState]:
    """Describe zinfer's own checkout, and the repository that the user stands in.

    The second is empty when it is the same. Both are asked side by side.

    Only the first looks at untracked files: the user's repository may hold millions.
    """
    here = _start_git(checkout, untracked="all") if _is_checkout(checkout) else None
    elsewhere = (
        None
        if here and working_directory.is_relative_to(checkout)
        else _start_git(working_directory, untracked="no")
    )
    return _git_state(here), _git_state(elsewhere)


def _is_checkout(folder: Path) -> bool:
    """Return whether zinfer runs from its repository and not from inside somebody else's."""
    return (folder / ".git").exists() and (folder / "pyproject.toml").exists()


def _start_git(folder: Path, untracked: str) -> subprocess.Popen[str] | None:
    """Start `git status` without touching the index: other git commands may be running."""
    try:
        return subprocess.Popen(
            ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch",
             f"--untracked-files={untracked}", "--", ":/"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except OSError:
        return None


def _git_state(status: subprocess.Popen[str] | None) -> GitState:
    if status is None:
        return GitState()
    try:
        text, _ = status.communicate(timeout=GIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        status.kill()
        status.communicate()
        return GitState()
    if status.returncode != 0:
        return GitState()
    return parse_git_status(text)


def parse_git_status(text: str) -> GitState:
    """Parse `git status --porcelain=v2 --branch`.

    Lines are `# branch.oid HASH`, `1 .M ...` for changes, `? path` for untracked files.
    """
    lines = text.splitlines()
    oid = next((line.split()[2] for line in lines if line.startswith("# branch.oid ")), None)
    changed = any(line[:1] in ("1", "2", "u") for line in lines)
    untracked = any(
        line.startswith("? ") and line.rstrip('"').endswith(SOURCE_SUFFIXES) for line in lines
    )
    return GitState(commit=None if oid == "(initial)" else oid, dirty=changed or untracked)


def operating_system() -> str:
    """Return the system's own name, such as 'Debian GNU/Linux 12 (bookworm)'."""
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


# Machine


def gpu_facts(gpu: Gpu) -> Json:
    """Describe a GPU; power limit and clocks may be below what its name promises."""
    return {
        "name": gpu.name,
        "total_bytes": gpu.total_bytes,
        "compute_capability": ".".join(map(str, gpu.compute_capability))
        if gpu.compute_capability
        else None,
        "driver_version": gpu.driver_version,
        "power_limit_watts": gpu.power_limit_watts,
        "max_sm_clock_mhz": gpu.max_sm_clock_mhz,
        "max_memory_clock_mhz": gpu.max_memory_clock_mhz,
        "mig": gpu.mig,
    }


def cpu_governor(root: Path = reading.ROOT) -> str | None:
    """Read the frequency governor of the first core; None in most virtual machines."""
    try:
        return (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return None


def disk_facts(nvme_path: Path) -> Json:
    """Describe the file system that swapped weights will be on."""
    free, total = disk.disk_bytes(nvme_path)
    mount = disk.mount_of(nvme_path)
    return {
        "filesystem": mount.filesystem if mount else None,
        "device": mount.device if mount else None,
        "mount_point": mount.mount_point if mount else None,
        "total_bytes": total,
        "free_bytes": free,
    }


def ulimits() -> Json:
    """Return the soft limits of this process; None for unlimited."""
    names = {
        "memlock_bytes": resource.RLIMIT_MEMLOCK,
        "open_files": resource.RLIMIT_NOFILE,
        "address_space_bytes": resource.RLIMIT_AS,
    }
    limits = {name: resource.getrlimit(which)[0] for name, which in names.items()}
    return {name: None if soft == resource.RLIM_INFINITY else soft for name, soft in limits.items()}


def container_facts(root: Path = reading.ROOT) -> Json:
    """Describe the container or batch system around this, and what its cgroups allow."""
    quotas = [quota for quota in processor.cpu_quotas(root) if quota is not None]
    limits = [group.limit_bytes for group in memory.memory_cgroups(root)]
    return {
        "kind": container_kind(os.environ, root),
        "cpu_quota_cores": min(quotas, default=None),
        "memory_limit_bytes": min(limits, default=None),
    }


def container_kind(variables: Any, root: Path = reading.ROOT) -> str | None:
    """Return docker, podman, kubernetes or slurm; None outside of any that is known."""
    if "KUBERNETES_SERVICE_HOST" in variables:
        return "kubernetes"
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    return "slurm" if "SLURM_JOB_ID" in variables else None
