"""Say what became of a job's folder while the job ran: deleted, replaced, full, or read-only.

The folder is held open, so that its number is given to no other folder meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from zinfer.units import format_bytes

PROBE_BYTES = 65536
"""Written to learn whether anything can be; a disk with less room than this is full."""
ANOTHER_FOLDER = "set hydra.run.dir (of a sweep: hydra.sweep.dir)"


class FolderState(StrEnum):
    """State of a folder, seen from whoever began to work in it."""

    THERE = "there"
    GONE = "gone"
    """Nothing has its name any more."""
    REPLACED = "replaced"
    """Another folder, or something else, has its name."""
    FULL = "full"
    UNWRITABLE = "unwritable"


@dataclass(frozen=True)
class FolderEnd:
    """State of a job's folder when the job was over, with the words for it."""

    state: FolderState = FolderState.THERE
    problem: str | None = None
    """A sentence and what to do, without a full stop; None where the folder is there."""


def open_folder(folder: Path) -> int | None:
    """Return a descriptor of the folder, or None where it cannot be opened."""
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None


def folder_end(folder: Path, descriptor: int | None) -> FolderEnd:
    """Look at the folder now.

    Args:
        descriptor: of the folder as it was at the start; None where it was not to be opened.
    """
    gone = "Leave the folder alone until the job has ended, and run the job again"
    try:
        found = os.stat(folder)
    except OSError:
        said = f"the job's folder {folder} was deleted while the job ran. {gone}"
        return FolderEnd(FolderState.GONE, said)
    if descriptor is not None and not os.path.samestat(found, os.fstat(descriptor)):
        said = f"another folder took the place of {folder} while the job ran. {gone}"
        return FolderEnd(FolderState.REPLACED, said)
    return _writable(folder)


def _writable(folder: Path) -> FolderEnd:
    """Write a little into the folder, and say what hinders it."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        return _unwritable(folder, error)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return FolderEnd()


def _unwritable(folder: Path, error: OSError) -> FolderEnd:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FolderEnd(
            FolderState.FULL,
            f"the disk of the job's folder {folder} is full{_left(folder)}. "
            f"Free some of it, or {ANOTHER_FOLDER} to a folder on another disk",
        )
    return FolderEnd(
        FolderState.UNWRITABLE,
        f"nothing can be written to the job's folder {folder} ({error.strerror}). "
        f"Make it writable, or {ANOTHER_FOLDER} to a folder that you may write to",
    )


def _left(folder: Path) -> str:
    """Return the bytes that are left for this user, in brackets; empty where not known."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return ""
    return f" ({format_bytes(status.f_bavail * status.f_frsize)} left)"
