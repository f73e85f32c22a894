"""Describe the disk that weights are swapped to, and warn where it is none that people mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zinfer.machine import disk
from zinfer.units import format_bytes

NETWORK = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "9p", "virtiofs", "gpfs", "beegfs",
    "fuse.sshfs",
})  # fmt: skip
"""File systems whose reads cross a network, or a virtual machine's border."""


@dataclass(frozen=True, kw_only=True)
class DiskDescription:
    """Where a path is."""

    text: str
    """File system, device, mount point and free bytes, for people."""
    filesystem: str | None
    mount_point: str | None
    warnings: tuple[str, ...]


def describe_disk(path: Path) -> DiskDescription:
    """Describe the disk of `path`, which need not exist yet."""
    path = path.expanduser().absolute()
    free, _ = disk.disk_bytes(path)
    mount = disk.mount_of(path)
    if mount is None:
        return DiskDescription(
            text=f"file system unknown, {format_bytes(free)} free",
            filesystem=None,
            mount_point=None,
            warnings=(),
        )
    text = (
        f"{mount.filesystem} on {mount.device}, mounted at {mount.mount_point}, "
        f"{format_bytes(free)} free"
    )
    warning = unlike_nvme(mount.filesystem, mount.mount_point)
    said = () if warning is None else (f"offload.nvme_path={path}: {warning}",)
    return DiskDescription(
        text=text, filesystem=mount.filesystem, mount_point=mount.mount_point, warnings=said
    )


def unlike_nvme(filesystem: str, mount_point: str) -> str | None:
    """Say why this is hardly the local NVMe disk that offload=nvme is meant for, or None."""
    if filesystem in ("tmpfs", "ramfs"):
        return f"{filesystem} keeps files in memory, so no disk is measured and host memory fills"
    if filesystem == "overlay":
        return "an overlay is a container's own layer, not a disk. Mount a local disk into it"
    if filesystem in NETWORK:
        return f"{filesystem} is reached over a network or a virtual machine's border"
    if mount_point == "/":
        return "this is the disk of the operating system. Set a folder on the disk to be measured"
    return None
