"""Tell the lock file of a running op build from one that a killed build left behind.

torch takes `<op folder>/lock` around every build and every load of an op. It waits for the file
without end and without a word, and the file stays when its holder is killed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

UNSEEN_HOLDER_S = 1800.0
"""Seconds without a change in its folder after which a lock counts as left over.

Only for locks whose holder may not be visible from here."""

NETWORK_FILESYSTEMS = {
    "nfs",
    "nfs4",
    "lustre",
    "beegfs",
    "gpfs",
    "cifs",
    "ceph",
    "fuse.sshfs",
    "9p",
}


def is_left_over(lock: Path) -> bool:
    """Return whether the lock file is there and the build that took it is gone.

    A builder keeps the file open, and its compilers work in its folder, so /proc shows whether one
    is alive. The holder of another user's lock, or of one on a network file system, may not be
    visible. Such a lock needs UNSEEN_HOLDER_S of silence.
    """
    try:
        owner = lock.stat().st_uid
    except FileNotFoundError:
        return False
    if lock_holders(lock):
        return False
    if owner == os.geteuid() and filesystem_type(lock) not in NETWORK_FILESYSTEMS:
        return True
    return time.time() - _last_change_s(lock.parent) > UNSEEN_HOLDER_S


def lock_holders(lock: Path) -> list[int]:
    """Find processes that have the lock file open or work in its folder; not other users'."""
    lock = lock.resolve()
    processes = [process for process in Path("/proc").iterdir() if process.name.isdigit()]
    return [
        int(process.name)
        for process in processes
        if lock in _open_files(process) or lock.parent == _link(process / "cwd")
    ]


def _open_files(process: Path) -> set[Path | None]:
    try:
        return {_link(descriptor) for descriptor in (process / "fd").iterdir()}
    except OSError:  # it ended meanwhile, or belongs to someone else
        return set()


def _link(link: Path) -> Path | None:
    try:
        return Path(os.readlink(link))
    except OSError:
        return None


def filesystem_type(path: Path) -> str:
    """Return the type of the path's file system, from /proc/mounts; "" if it is unreadable."""
    try:
        rows = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    resolved = path.resolve()
    holding = [(mount, kind) for mount, kind in rows if resolved.is_relative_to(mount)]
    return max(holding, key=lambda row: len(row[0]))[1] if holding else ""


def _last_change_s(folder: Path) -> float:
    """Return the time of the newest change in the folder, in seconds since the epoch."""
    return max(entry.stat().st_mtime for entry in [folder, *folder.iterdir()])
