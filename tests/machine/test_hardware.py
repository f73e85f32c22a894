"""Facts about machines that are not this one, from the texts their kernels and drivers print."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zinfer.config import HardwareConfig
from zinfer.machine import disk, gpu, memory, processor
from zinfer.machine.gpu import Gpu, parse_nvidia_smi, visible_gpus
from zinfer.machine.hardware import detect_hardware
from zinfer.units import GIB, KIB, MIB

UNLIMITED_V1 = "9223372036854771712\n"
MEMINFO = (
    "MemTotal:       65536000 kB\nMemFree:         1024000 kB\n"
    "MemAvailable:   50000000 kB\nBuffers:           10000 kB\n"
)
CGROUP2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"

H100 = (
    "0, GPU-8932f937-d72c-4106-c12f-20bd9faed9f6, NVIDIA H100 80GB HBM3, 81559, 81076, 9.0, "
    "700.00, 570.86.15, 1980, 2619, Disabled\n"
)
TWO_A100 = (
    "0, GPU-aaaa1111-0000-0000-0000-000000000000, NVIDIA A100-SXM4-40GB, 40960, 40330, 8.0, "
    "400.00, 535.54.03, 1410, 1215, Disabled\n"
    "1, GPU-bbbb2222-0000-0000-0000-000000000000, NVIDIA A100-SXM4-40GB, 40960, 12000, 8.0, "
    "400.00, 535.54.03, 1410, 1215, Disabled\n"
)
LAPTOP = (
    "0, GPU-cccc, NVIDIA GeForce GTX 1650, 4096, 3900, 7.5, [N/A], 535.54.03, 2100, 4001, [N/A]\n"
)
SLICED = (
    "0, GPU-dddd, NVIDIA A100-SXM4-40GB, 40960, 40000, 8.0, 400.00, "
    "535.54.03, 1410, 1215, Enabled\n"
)


def file_system(root: Path, files: dict[str, str]) -> Path:
    """Return a file system with these files in /proc and /sys."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def nvidia_smi(
    folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, cuda: str | None = "12.8"
) -> None:
    """Make a machine whose nvidia-smi runs `script`, and whose torch is built for `cuda`."""
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu, "torch_cuda_version", lambda: cuda)


def says(text: str) -> str:
    return f"cat <<'END'\n{text}END"


# Memory and cores


def test_without_cgroups_memory_is_what_meminfo_says(tmp_path: Path) -> None:
    root = file_system(tmp_path, {"proc/meminfo": MEMINFO})
    assert memory.host_total_bytes(root) == 65536000 * KIB
    assert memory.host_available_bytes(root) == 50000000 * KIB


def test_a_slurm_step_has_what_the_smallest_cgroup_above_it_leaves(tmp_path: Path) -> None:
    """v2: the step has no limit; the job above it has 16 GiB, 6 in use, 2 of them page cache."""
    root = file_system(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0\n",
            "proc/self/mountinfo": CGROUP2_MOUNT,
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_0/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_0/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.max": f"{16 * GIB}\n",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.high": "max\n",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.current": f"{6 * GIB}\n",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.stat": (
                f"anon {4 * GIB}\ninactive_file {GIB}\nactive_file {GIB}\n"
            ),
            "sys/fs/cgroup/system.slice/memory.max": f"{48 * GIB}\n",
            "sys/fs/cgroup/system.slice/memory.current": f"{10 * GIB}\n",
        },
    )
    assert memory.host_total_bytes(root) == 16 * GIB
    assert memory.host_available_bytes(root) == 12 * GIB


def test_memory_high_is_a_limit_too(tmp_path: Path) -> None:
    root = file_system(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/user.slice\n",
            "proc/self/mountinfo": CGROUP2_MOUNT,
            "sys/fs/cgroup/user.slice/memory.max": f"{32 * GIB}\n",
            "sys/fs/cgroup/user.slice/memory.high": f"{8 * GIB}\n",
            "sys/fs/cgroup/user.slice/memory.current": f"{3 * GIB}\n",
        },
    )
    assert memory.host_available_bytes(root) == 5 * GIB


@pytest.mark.parametrize(
    ("cgroup", "mountinfo"),
    [
        ("0::/\n", CGROUP2_MOUNT),  # its own cgroup namespace
        (
            "0::/system.slice/docker-1f.scope\n",
            CGROUP2_MOUNT.replace(" / /sys", " /system.slice/docker-1f.scope /sys"),
        ),  # bind-mounted
        ("0::/../../kubepods.slice/pod_1\n", CGROUP2_MOUNT),  # moved out of its namespace
    ],
)
def test_a_container_sees_its_limit_at_the_mount(
    tmp_path: Path, cgroup: str, mountinfo: str
) -> None:
    root = file_system(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": cgroup,
            "proc/self/mountinfo": mountinfo,
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
        },
    )
    assert memory.host_total_bytes(root) == 4 * GIB
    assert memory.host_available_bytes(root) == 3 * GIB
    assert processor.cpu_quotas(root) == [1.5]
    assert processor.host_cores(root) == 1


CGROUP_V1 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": (
        "9:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f\n"
    ),
    "proc/self/mountinfo": (
        "32 31 0:29 /docker/1f /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
        "35 31 0:32 /docker/1f /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    ),
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
    "sys/fs/cgroup/memory/memory.stat": (
        f"inactive_file 5\nactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file 0\n"
    ),
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}


def test_a_cgroup_v1_limit_counts_the_whole_subtree(tmp_path: Path) -> None:
    limited = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
    }
    root = file_system(tmp_path, CGROUP_V1 | limited)
    assert memory.host_total_bytes(root) == 8 * GIB
    assert memory.host_available_bytes(root) == 6 * GIB
    assert processor.cpu_quotas(root) == [4.0]


def test_a_cgroup_v1_without_a_limit_limits_nothing(tmp_path: Path) -> None:
    unlimited = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
    }
    root = file_system(tmp_path, CGROUP_V1 | unlimited)
    assert memory.host_total_bytes(root) == 65536000 * KIB
    assert processor.cpu_quotas(root) == [None]


@pytest.mark.parametrize(
    ("capabilities", "uid_map", "unlimited"),
    [
        ("000001ffffffffff", "         0          0 4294967295\n", True),  # root
        (
            "00000000a80425fb",
            "         0          0 4294967295\n",
            False,
        ),  # root in docker: without CAP_IPC_LOCK
        (
            "000001ffffffffff",
            "         0       1000          1\n",
            False,
        ),  # root of a user namespace
        ("0000000000000000", "         0          0 4294967295\n", False),  # a user
    ],
)
def test_locked_memory_is_unlimited_only_for_the_real_root(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capabilities: str,
    uid_map: str,
    unlimited: bool,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 * MIB, 8 * MIB))
    root = file_system(
        tmp_path,
        {"proc/self/status": f"Name:\tx\nCapEff:\t{capabilities}\n", "proc/self/uid_map": uid_map},
    )
    assert memory.memlock_limit_bytes(root) == (None if unlimited else 8 * MIB)


# The processor


@pytest.mark.parametrize(
    ("name", "flags", "float16"),
    [
        (
            "Intel Sapphire Rapids",
            "avx2 avx512f avx512_vnni avx512_bf16 avx_vnni avx512_fp16 amx_bf16 amx_tile amx_int8",
            True,
        ),
        ("Intel Sierra Forest", "avx2 avx_vnni avx_vnni_int8 avx_ne_convert", True),
        ("Intel Ice Lake", "avx2 avx512f avx512_vnni", False),
        ("AMD EPYC 9004", "avx2 avx512f avx512_vnni avx512_bf16", False),
        ("AWS Graviton3", "fp asimd fphp asimdhp sve bf16 i8mm", True),
        ("Raspberry Pi 4", "fp asimd crc32 cpuid", False),
    ],
)
def test_the_cpu_computes_in_float16_where_onednn_does(
    name: str, flags: str, float16: bool
) -> None:
    dtypes = processor.cpu_dtypes(frozenset(flags.split()))
    assert ("float16" in dtypes) == float16, name
    assert {"float32", "bfloat16"} <= set(dtypes)


def test_cpuinfo_of_x86_and_arm_is_read(tmp_path: Path) -> None:
    intel = file_system(
        tmp_path / "intel",
        {
            "proc/cpuinfo": "processor\t: 0\n"
            "model name\t: Intel(R) Xeon(R) Gold 6330\nflags\t\t: fpu avx2\n"
        },
    )
    arm = file_system(
        tmp_path / "arm",
        {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp fphp asimdhp\nCPU part\t: 0xd40\n"},
    )
    assert processor.cpu_model_name(intel) == "Intel(R) Xeon(R) Gold 6330"
    assert processor.cpu_flags(intel) == {"fpu", "avx2"}
    assert processor.cpu_model_name(arm) is None
    assert "asimdhp" in processor.cpu_flags(arm)


# GPUs


def test_nvidia_smi_is_read() -> None:
    (gpu,) = parse_nvidia_smi(H100)
    assert gpu == Gpu(
        index=0,
        uuid="GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
        name="NVIDIA H100 80GB HBM3",
        total_bytes=81559 * MIB,
        free_bytes=81076 * MIB,
        compute_capability=(9, 0),
        power_limit_watts=700.0,
        driver_version="570.86.15",
        max_sm_clock_mhz=1980.0,
        max_memory_clock_mhz=2619.0,
    )


def test_what_nvidia_smi_does_not_know_is_none() -> None:
    (gpu,) = parse_nvidia_smi(LAPTOP)
    assert gpu.power_limit_watts is None
    assert gpu.total_bytes == 4 * GIB
    assert not gpu.mig
    assert parse_nvidia_smi("No devices were found\n") == []


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1]),
        ("", []),
        ("1", [1]),
        ("1,0", [1, 0]),
        ("0, 1", [0, 1]),
        ("0,-1,1", [0]),
        ("7", []),
        ("GPU-bbbb2222-0000-0000-0000-000000000000", [1]),
        ("GPU-bbbb", [1]),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_followed(visible: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in visible_gpus(parse_nvidia_smi(TWO_A100), visible)] == indices


@pytest.mark.parametrize(
    ("capability", "dtypes"),
    [
        ((6, 1), ("float32",)),
        ((7, 5), ("float32", "float16")),
        ((8, 0), ("float32", "float16", "bfloat16")),
        ((9, 0), ("float32", "float16", "bfloat16")),
    ],
)
def test_a_gpu_computes_natively_in_these_types(
    capability: tuple[int, int], dtypes: tuple[str, ...]
) -> None:
    assert gpu.cuda_dtypes(capability) == dtypes


def test_a_gpu_machine_is_planned_with_the_fullest_gpu_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, says(TWO_A100))
    one = detect_hardware(HardwareConfig(name="detect"), None)
    two = detect_hardware(HardwareConfig(name="detect"), None, ranks=2)
    assert (one.device_kind, one.device_name, one.device_count) == (
        "cuda",
        "NVIDIA A100-SXM4-40GB",
        2,
    )
    assert (one.device_total_bytes, one.device_free_bytes) == (40960 * MIB, 40330 * MIB)
    assert two.device_free_bytes == 12000 * MIB
    assert one.host_total_bytes == memory.host_total_bytes()


def test_the_memory_of_a_gpu_slice_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, says(SLICED))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5c89852c-d268-c3f3-1b07-005d5ae1dc3f")
    sliced = detect_hardware(HardwareConfig(name="detect"), None)
    assert sliced.device_kind == "cuda"
    assert sliced.device_total_bytes is None
    assert (
        detect_hardware(HardwareConfig(name="detect", device_bytes=5 * GIB), None).device_free_bytes
        == 5 * GIB
    )


@pytest.mark.parametrize("exit_code", gpu.NO_GPU_EXIT_CODES)
def test_an_nvidia_smi_without_a_gpu_means_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int
) -> None:
    nvidia_smi(tmp_path, monkeypatch, f"echo 'No devices were found'; exit {exit_code}")
    assert detect_hardware(HardwareConfig(name="detect"), None).device_kind == "cpu"
    with pytest.raises(ValueError, match=r"lists no GPU here.*Set hardware\.accelerator=cpu"):
        detect_hardware(HardwareConfig(name="detect", accelerator="cuda"), None)


def test_a_gpu_that_does_not_answer_is_refused_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(
        tmp_path,
        monkeypatch,
        "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
    )
    with pytest.raises(
        ValueError, match=r"exit code 18: Failed to initialize NVML.*Set hardware\.accelerator=cpu"
    ):
        detect_hardware(HardwareConfig(name="detect"), None)
    assert (
        detect_hardware(HardwareConfig(name="detect", accelerator="cpu"), None).device_kind == "cpu"
    )


def test_a_hanging_nvidia_smi_is_refused_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(gpu, "NVIDIA_SMI_TIMEOUT_S", 0.2)
    with pytest.raises(ValueError, match="did not answer"):
        detect_hardware(HardwareConfig(name="detect"), None)


def test_a_torch_for_the_cpu_does_not_see_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, says(H100), cuda=None)
    assert detect_hardware(HardwareConfig(name="detect"), None).device_kind == "cpu"
    with pytest.raises(ValueError, match="built for the CPU only"):
        detect_hardware(HardwareConfig(name="detect", accelerator="cuda"), None)


def test_the_installed_torch_says_what_it_is_built_for() -> None:
    torch = pytest.importorskip("torch")
    assert gpu.torch_cuda_version() == (torch.version.cuda or torch.version.hip)


# Disks


MOUNTS = (
    "27 1 254:0 / / rw - ext4 /dev/vda rw\n"
    "40 27 0:40 / /scratch rw - nfs4 server:/export rw\n"
    "41 40 259:1 / /scratch/local\\040disk rw - xfs /dev/nvme0n1 rw\n"
    "42 27 0:50 / /scratch2 rw - tmpfs tmpfs rw\n"
    "43 27 0:51 / /scratch2 rw - ext4 /dev/md0 rw\n"
)


@pytest.mark.parametrize(
    ("path", "filesystem"),
    [
        ("/scratch/x/y", "nfs4"),
        ("/scratch/local disk/swap", "xfs"),
        ("/scratch2", "ext4"),
        ("/scratching", "ext4"),
        ("/nowhere/at/all", "ext4"),
    ],
)
def test_the_file_system_is_that_of_the_longest_and_latest_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, filesystem: str
) -> None:
    monkeypatch.setattr(disk, "existing_parent", lambda path: path)
    root = file_system(tmp_path, {"proc/self/mountinfo": MOUNTS})
    assert disk.filesystem_of(Path(path), root) == filesystem


def test_a_path_that_does_not_exist_yet_is_on_its_parents_disk(tmp_path: Path) -> None:
    assert disk.existing_parent(tmp_path / "a" / "b") == tmp_path
    free, total = disk.disk_bytes(tmp_path / "a" / "b")
    assert 0 < free <= total


# Boxes


def test_this_machine_is_described_without_importing_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from zinfer.config import HardwareConfig\n"
        "from zinfer.machine.hardware import detect_hardware\n"
        "hardware = HardwareConfig(name='detect', accelerator='cpu')\n"
        f"box = detect_hardware(hardware, Path({str(tmp_path / 'new')!r}))\n"
        "assert box.host_total_bytes >= box.host_available_bytes > 0, box\n"
        "assert box.disk_total_bytes > 0 and box.disk_filesystem, box\n"
        "assert box.rates_source is None and box.nvme_read_bytes_per_s is None, box\n"
        "heavy = ('torch', 'transformers', 'deepspeed', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_sizes_given_by_the_user_cap_what_was_found() -> None:
    box = detect_hardware(
        HardwareConfig(name="detect", accelerator="cpu", host_bytes=GIB, nvme_read_bytes_per_s=2e9),
        Path("/tmp"),
    )
    assert box.host_total_bytes == box.host_available_bytes == box.device_free_bytes == GIB
    assert (box.nvme_read_bytes_per_s, box.rates_source) == (2e9, "hardware=detect")


def test_a_published_box_is_what_was_published() -> None:
    config = HardwareConfig(
        name="a6000-paper",
        source="a blog",
        device_name="NVIDIA A6000",
        device_bytes=48 * GIB,
        host_bytes=252 * GIB,
        device_flops_per_s={"float16": 154.8e12},
    )
    box = detect_hardware(config, None)
    assert (box.device_kind, box.device_name, box.device_count) == ("cuda", "NVIDIA A6000", 1)
    assert (box.device_free_bytes, box.host_available_bytes) == (48 * GIB, 252 * GIB)
    assert (
        box.disk_total_bytes is None
        and box.host_cores is None
        and box.nvme_read_bytes_per_s is None
    )
    assert box.source == box.rates_source == "a blog"


@pytest.mark.parametrize(
    ("accelerator", "forced", "chosen"),
    [
        ("auto", None, "auto"),
        ("auto", "cpu", "cpu"),
        ("auto", "cuda", "cuda"),
        ("cpu", "cpu", "cpu"),
        ("cpu", None, "cpu"),
        ("cpu", "cuda", "Set hardware.accelerator=cuda, or unset DS_ACCELERATOR"),
        ("cuda", "cpu", "Set hardware.accelerator=cpu, or unset DS_ACCELERATOR"),
        ("auto", "xpu", "zinfer runs on cpu and cuda"),
        ("cpu", "npu", "zinfer runs on cpu and cuda"),
    ],
)
def test_the_environment_chooses_the_accelerator_only_where_the_configuration_does_not(
    monkeypatch: pytest.MonkeyPatch, accelerator: Any, forced: str | None, chosen: str
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if forced:
        monkeypatch.setenv("DS_ACCELERATOR", forced)
    config = HardwareConfig(name="detect", accelerator=accelerator)
    if chosen in ("auto", "cpu", "cuda"):
        assert gpu.chosen_accelerator(config) == chosen
    else:
        with pytest.raises(ValueError, match="DS_ACCELERATOR") as refused:
            gpu.chosen_accelerator(config)
        assert chosen in str(refused.value)
