"""The job folder: an attempt of its own for every use, and the lock that says who uses it now.

A folder may be used again (a fixed hydra.run.dir or hydra.sweep.dir). Each use begins an attempt:
what earlier ones left is moved to earlier/N, and the records of the new one carry its id.

While a driver works on a folder it holds a lock on its DRIVER_LOCK, which the kernel releases
however the driver ends, and a note of the folder lies in the cache. So a later start of zinfer,
wherever it is, finds the folders whose drivers were killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, ClassVar

from zinfer.config import ConfigError, RunConfig, config_to_stored
from zinfer.job.files import (
    DRIVER_LOCK,
    DRIVER_READY_FILE,
    EARLIER_FOLDER,
    ENVIRONMENT_FILE,
    EVENTS_FILE,
    JOB_FILE,
    KERNELS_FILE,
    NOT_LOGGED_FILE,
    PARENT_FILE,
    PLANS_FILE,
    RANK_EVENTS_FILE,
    RESULT_FILE,
    REUSED_FILE,
    STOP_FILE,
    SWEEP_FILE,
    WORKER_LOG,
    WORKERS_FILE,
)
from zinfer.job.folder_state import FolderEnd, folder_end, open_folder
from zinfer.job.processes import process_start_ticks
from zinfer.job.records import (
    FolderKind,
    FolderNote,
    JobRecord,
    read_record,
    write_json,
)
from zinfer.job.swap import boot_id, swap_folder
from zinfer.paths import cache_dir

JOB_FILES = (
    JOB_FILE, RESULT_FILE, REUSED_FILE, WORKER_LOG, EVENTS_FILE, RANK_EVENTS_FILE.format(rank="*"),
    DRIVER_READY_FILE, ENVIRONMENT_FILE, WORKERS_FILE, NOT_LOGGED_FILE, KERNELS_FILE, PARENT_FILE,
)  # fmt: skip
"""Files that an attempt of a job leaves behind, as glob patterns."""
SWEEP_FILES = (SWEEP_FILE, STOP_FILE, PARENT_FILE, PLANS_FILE)
"""Files that a sweep leaves behind beside its jobs' folders."""


class FolderInUse(ConfigError):
    """Another zinfer works on this folder at this moment."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            [
                f"{folder} is in use by another zinfer that still runs. Wait for its end, or set "
                "hydra.run.dir (of a sweep: hydra.sweep.dir) to another folder"
            ]
        )


class Held:
    """The folders that this process works on, with the attempt in each."""

    attempts: ClassVar[dict[Path, str]] = {}
    descriptors: ClassVar[dict[Path, int | None]] = {}
    """Each folder, open as it was at the start: a deleted one's number goes to no other."""


@contextlib.contextmanager
def attempt_in(folder: Path, kind: FolderKind = "job", jobs: Iterable[Path] = ()) -> Iterator[str]:
    """Hold the folder and begin an attempt in it: until the block's end its driver is alive.

    Inside another `attempt_in` of the same folder it is the same attempt.

    Args:
        jobs: for a sweep, folders of its jobs that are not directly in its own.

    Yields:
        The attempt's id.

    Raises:
        FolderInUse: another process holds the folder.
        OSError: the folder cannot be made or written to.
    """
    folder = folder.absolute()
    if folder in Held.attempts:
        yield Held.attempts[folder]
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        attempt = Held.attempts[folder] = begin_attempt(folder, kind, jobs)
        descriptor = Held.descriptors[folder] = open_folder(folder)
        try:
            _note(folder, kind)
            yield attempt
            forget(folder)
        finally:
            del Held.attempts[folder], Held.descriptors[folder]
            if descriptor is not None:
                os.close(descriptor)


def end_of(folder: Path) -> FolderEnd:
    """Say what became of the folder since this process began its attempt in it."""
    folder = folder.absolute()
    return folder_end(folder, Held.descriptors.get(folder))


def begin_attempt(folder: Path, kind: FolderKind = "job", jobs: Iterable[Path] = ()) -> str:
    """Move what earlier attempts left in the folder to earlier/N, and return a new attempt's id.

    Only files that zinfer writes are moved, never others: the folder may be anybody's.
    An attempt whose driver was killed is noted, so that its run is closed from earlier/N.
    """
    left = [path for name in JOB_FILES for path in folder.glob(name)]
    if kind == "sweep":
        left += [folder / name for name in SWEEP_FILES if (folder / name).exists()]
        inside = {path for path in folder.iterdir() if is_job_folder(path)}
        left += sorted(inside | {path for path in jobs if is_job_folder(path)})
    if left:
        earlier = _next_earlier(folder)
        for path in dict.fromkeys(left):
            target = earlier / path.absolute().relative_to(folder.absolute())
            target.parent.mkdir(parents=True, exist_ok=True)
            noted = _note_of(path).exists()
            os.replace(path, target)
            if noted:  # a job of the sweep whose driver was killed
                _note_of(path).unlink(missing_ok=True)
                _note(target, "job")
        if _note_of(folder).exists():
            _note(earlier, kind)
    return secrets.token_hex(8)


def is_job_folder(path: Path) -> bool:
    """Check that zinfer, or Hydra for it, made this folder for a job."""
    records = (JOB_FILE, RESULT_FILE, REUSED_FILE)
    return (
        path.is_dir()
        and not path.is_symlink()
        and path.name != EARLIER_FOLDER
        and any((path / name).is_file() for name in records)
    )


def attempt_folder(job_dir: Path, attempt: str) -> Path | None:
    """Return where the attempt's files are now: the folder itself, or one of its earlier/N."""
    for folder in (job_dir, *sorted((job_dir / EARLIER_FOLDER).glob("*"))):
        if (job := read_job(folder)) is not None and job.attempt == attempt:
            return folder
    return None


def _next_earlier(folder: Path) -> Path:
    """Make the next free earlier/N."""
    numbers = [
        int(path.name) for path in (folder / EARLIER_FOLDER).glob("*") if path.name.isdecimal()
    ]
    earlier = folder / EARLIER_FOLDER / str(max(numbers, default=0) + 1)
    earlier.mkdir(parents=True)
    return earlier


def write_job(job_dir: Path, config: RunConfig, attempt: str) -> None:
    """Store the checked configuration for the worker. Only the owner may read it."""
    pid = os.getpid()
    job = {
        "attempt": attempt,
        "driver_pid": pid,
        "driver_start_ticks": process_start_ticks(pid),
        "working_directory": str(Path.cwd()),
        "config": config_to_stored(config),
    }
    write_json(job_dir / JOB_FILE, job, private=True)


def own_swap_folder(nvme_path: str, job_dir: Path) -> Path:
    """Return the swap folder of the attempt that is in this job folder now.

    Raises:
        ValueError: the folder has no job.
    """
    job = read_job(job_dir)
    if job is None:
        raise ValueError(f"{job_dir / JOB_FILE} is not there, or is no job's record")
    return swap_folder(nvme_path, job.attempt)


def read_job(job_dir: Path) -> JobRecord | None:
    """Return the job of this folder, or None where it got no worker."""
    return read_record(job_dir / JOB_FILE, JobRecord)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    """Hold the folder's lock. On a file system without locks nobody is kept out.

    Raises:
        FolderInUse: another process has it.
    """
    path = folder / DRIVER_LOCK
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(folder) from None
        except OSError:
            pass
        if not _is_still(path, lock):  # its holder removed it between our opening and our lock
            raise FolderInUse(folder)
        yield lock
        with contextlib.suppress(OSError):  # the folder was deleted, or a file has its name
            path.unlink(missing_ok=True)


def _is_still(path: Path, file: IO[str]) -> bool:
    """Check that the path leads to this open file, and not to a later one of the same name."""
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except OSError:
        return False


@contextlib.contextmanager
def abandoned_folder_held(folder: Path) -> Iterator[bool]:
    """Keep other processes from caring for the same folder. False where one does already."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder))
            ours = True
        except FolderInUse:
            ours = False
        except FileNotFoundError:  # the folder was deleted
            ours = True
        yield ours


def is_driven(folder: Path) -> bool:
    """Check that the process that holds this folder is alive, on this machine."""
    try:
        with (folder / DRIVER_LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def abandoned_folders() -> list[tuple[Path, FolderKind]]:
    """Return folders of this machine whose driver was killed, jobs before their sweeps."""
    host, boot = socket.gethostname(), boot_id()
    found: list[tuple[Path, FolderKind]] = []
    for path in (cache_dir() / "running").glob("*.json"):
        note = read_record(path, FolderNote)
        if note is None or _note_of(Path(note.folder)) != path:
            continue
        if boot != note.boot and host != note.host:
            continue  # another machine that shares this home folder
        if not is_driven(Path(note.folder)):
            found.append((Path(note.folder), note.kind))
    return sorted(found, key=lambda entry: entry[1])


def other_jobs_at_work(attempt: str | None) -> int:
    """Count the jobs of this user and machine that have a worker now, other than this attempt."""
    host, boot, count = socket.gethostname(), boot_id(), 0
    for path in (cache_dir() / "running").glob("*.json"):
        note = read_record(path, FolderNote)
        if note is None or note.kind != "job" or (boot != note.boot and host != note.host):
            continue
        job = read_job(Path(note.folder))
        count += job is not None and job.attempt != attempt and is_driven(Path(note.folder))
    return count


def forget(folder: Path) -> None:
    """Remove the note of this folder: it needs no further care."""
    with contextlib.suppress(OSError):  # without a cache there is no note
        _note_of(folder).unlink(missing_ok=True)


def _note(folder: Path, kind: FolderKind) -> None:
    """Note the folder in the cache. Without a cache a killed driver's folder is found by nobody."""
    note = FolderNote(
        folder=str(folder.resolve()), kind=kind, host=socket.gethostname(), boot=boot_id()
    )
    with contextlib.suppress(OSError):
        _note_of(folder).parent.mkdir(parents=True, exist_ok=True)
        write_json(_note_of(folder), vars(note), private=True)


def _note_of(folder: Path) -> Path:
    token = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return cache_dir() / "running" / f"{token}.json"
