"""Describe disks: the mount and file system of a path, free and total bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zinfer.machine.reading import ROOT, read_text


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
    """Return every mount that this process sees, in the order in which they were made."""
    for line in read_text(root / "proc/self/mountinfo").splitlines():
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
    """Find the mount that holds `path`, which need not exist yet.

    It is the longest mount point above the path, and the latest where several share it.
    """
    real = existing_parent(path).resolve()
    holding = [mount for mount in mounts(root) if real.is_relative_to(mount.mount_point)]
    longest = max((len(mount.mount_point) for mount in holding), default=0)
    return next((mount for mount in reversed(holding) if len(mount.mount_point) == longest), None)


def filesystem_of(path: Path, root: Path = ROOT) -> str | None:
    """Name the file system of `path`: ext4, xfs, overlay, tmpfs, nfs4, ..."""
    mount = mount_of(path, root)
    return mount.filesystem if mount else None


def disk_bytes(path: Path) -> tuple[int, int]:
    """Return free (to this user) and total bytes of the file system of `path`, existing or not."""
    status = os.statvfs(existing_parent(path))
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def existing_parent(path: Path) -> Path:
    """Return `path` itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _unescape(text: str) -> str:
    r"""Decode spaces and the like, which are octal in mountinfo: `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
