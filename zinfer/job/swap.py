"""The folder on local disk that one attempt of a job swaps weights to, and its removal.

Its owners, driver and worker, hold a shared lock on OWNER_FILE for as long as they live; the
kernel releases it however they end. Who wants to remove a folder of others first takes the lock
for itself. A process id says nothing here: containers and hosts that share a disk count their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import IO

from pydantic.dataclasses import dataclass

from zinfer.job.records import STRICT, read_record

PREFIX = "zinfer-swap-"
CLAIM_PREFIX = ".zinfer-claim-"
OWNER_FILE = "owner.json"
DEFAULT_FOLDER = "swap"
"""nvme_path where none is given: this folder inside the job's own."""
ONE_KERNEL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "tmpfs"})
"""File systems that one kernel alone has mounted, so that its locks are all the locks there are."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Owner:
    """owner.json. Only `id`, `boot` and `locked` decide; the rest is for people."""

    id: str
    boot: str
    """The kernel's boot id; empty where it has none."""
    locked: bool
    """Whether the file system has locks."""
    host: str
    pid: int
    job_dir: str


class Life(StrEnum):
    """Judgement on the owner of a swap folder."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


def swap_folder(nvme_path: str, attempt: str) -> Path:
    """Return the attempt's own folder: the same for driver, worker and who cleans up after both."""
    return Path(nvme_path).expanduser().absolute() / f"{PREFIX}{attempt}"


@contextlib.contextmanager
def claimed_swap_folder(nvme_path: str, attempt: str, job_dir: Path) -> Iterator[Path]:
    """Make the attempt's folder and own it until the end of the block. Does not remove it.

    The folder gets its name only when its lock is held, so nobody ever finds it without.

    Raises:
        OSError: nvme_path cannot be created or written to, or the attempt has a folder already.
    """
    folder = swap_folder(nvme_path, attempt)
    folder.parent.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=CLAIM_PREFIX, dir=folder.parent))
    try:
        with (made / OWNER_FILE).open("w") as lock:
            locked = _lock(lock, fcntl.LOCK_SH)
            owner = Owner(
                id=attempt,
                boot=boot_id(),
                locked=locked,
                host=os.uname().nodename,
                pid=os.getpid(),
                job_dir=str(job_dir.absolute()),
            )
            json.dump(asdict(owner), lock)
            lock.flush()
            made.rename(folder)
            yield folder
    finally:
        shutil.rmtree(made, ignore_errors=True)  # there only where it never became the folder


@contextlib.contextmanager
def held_swap_folder(folder: Path) -> Iterator[None]:
    """Own a folder that the driver has claimed, beside the driver, until the end of the block.

    Raises:
        OSError: it is gone.
    """
    with (folder / OWNER_FILE).open("r") as lock:
        _lock(lock, fcntl.LOCK_SH)
        yield


def remove_swap_folder(folder: Path, job_dir: Path) -> bool:
    """Delete the job's own folder, and nvme_path where it is the job's default one and empty now.

    Returns whether the folder is gone.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent == job_dir.absolute() / DEFAULT_FOLDER:
        with contextlib.suppress(OSError):  # something else is in it
            folder.parent.rmdir()
    return not folder.exists()


@dataclass(frozen=True, kw_only=True)
class Swept:
    """Folders of others found under an nvme_path: removed, and left alone."""

    removed: tuple[Path, ...]
    unknown: tuple[Path, ...]
    """Nobody can say whether their owner lives."""


def remove_orphaned_swap_folders(nvme_path: str, filesystem: str | None) -> Swept:
    """Delete folders whose owner is dead (SIGKILL, power loss). Never follows a link.

    Args:
        filesystem: type of the file system of nvme_path; None where it is not known.
    """
    removed, unknown = [], []
    for folder in sorted(Path(nvme_path).expanduser().absolute().glob(f"{PREFIX}*")):
        if folder.is_symlink() or not folder.is_dir():
            continue
        with judged(folder, filesystem) as life:
            if life is Life.DEAD:
                shutil.rmtree(folder, ignore_errors=True)
            gone = not folder.exists()
        if life is Life.DEAD and gone:
            removed.append(folder)
        elif life is not Life.ALIVE and not gone:
            unknown.append(folder)
    return Swept(removed=tuple(removed), unknown=tuple(unknown))


@contextlib.contextmanager
def judged(folder: Path, filesystem: str | None) -> Iterator[Life]:
    """Say whether the folder's owner lives; while the block runs, no one else can take a dead one.

    A free lock proves a death only where this kernel would see the lock: on a file system of one
    kernel, or where the owner had the same boot.
    """
    try:
        lock = (folder / OWNER_FILE).open("r")
    except OSError:
        yield Life.UNKNOWN
        return
    with lock:
        owner = read_record(folder / OWNER_FILE, Owner)
        try:
            locked = _lock(lock, fcntl.LOCK_EX)
        except BlockingIOError:
            yield Life.ALIVE
            return
        mine = os.fstat(lock.fileno()).st_uid == os.geteuid()
        if (
            owner is None
            or not (locked and owner.locked and mine)
            or f"{PREFIX}{owner.id}" != folder.name
        ):
            yield Life.UNKNOWN
        elif filesystem in ONE_KERNEL or (owner.boot and owner.boot == boot_id()):
            yield Life.DEAD
        else:
            yield Life.UNKNOWN


def _lock(file: IO[str], kind: int) -> bool:
    """Take a lock without waiting. False where the file system has none.

    Raises:
        BlockingIOError: somebody else has it.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def boot_id() -> str:
    """Return the kernel's id of this boot, or an empty text where it gives none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
