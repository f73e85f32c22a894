"""The job folder: what the driver leaves there for the worker, and what both leave for people.

While a driver works on a folder it holds a lock on its DRIVER_LOCK, which the kernel releases however the driver ends, and a note of the
folder lies in the cache. So the next start of zinfer, wherever it is, finds the folders whose drivers were killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from zinfer.config import RunConfig, config_to_stored
from zinfer.job.files import DRIVER_LOCK, JOB_FILE
from zinfer.job.swap import process_start_ticks
from zinfer.paths import cache_dir

FolderKind = Literal["job", "sweep"]


def write_job(job_dir: Path, config: RunConfig) -> None:
    """Store the checked configuration, and which process is the driver."""
    pid = os.getpid()
    job: dict[str, Any] = {"driver_pid": pid, "driver_start_ticks": process_start_ticks(pid)}
    job |= {"working_directory": str(Path.cwd()), "config": config_to_stored(config)}
    write_json(job_dir / JOB_FILE, job, private=True)


def read_job_config(job_dir: Path) -> tuple[dict[str, Any], int, int | None]:
    """(configuration tree, the driver's pid, its start in clock ticks)."""
    job = json.loads((job_dir / JOB_FILE).read_text())
    return job["config"], job["driver_pid"], job["driver_start_ticks"]


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Whole or not at all: who reads it at the same moment, or after a kill, never finds half a document.

    Args:
        private: only its owner may read it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch(mode=0o600 if private else 0o666)
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """The document, or None where there is none or it was cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def driven(folder: Path, kind: FolderKind) -> Iterator[None]:
    """Hold the folder: until the end of the block, or of this process, its driver is alive."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(folder))
        note = _note_of(folder)
        with contextlib.suppress(
            OSError
        ):  # without a cache a killed driver's folder is found by nobody; the job runs all the same
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"folder": str(folder.resolve()), "kind": kind, **_machine()})
        yield
        note.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    with (folder / DRIVER_LOCK).open("a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
        (folder / DRIVER_LOCK).unlink(missing_ok=True)


def is_driven(folder: Path) -> bool:
    """Whether the process that holds this folder is alive, on this machine."""
    try:
        with (folder / DRIVER_LOCK).open("a" if (folder / DRIVER_LOCK).exists() else "r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def abandoned_folders() -> list[tuple[Path, FolderKind]]:
    """Folders of this machine whose driver was killed. Jobs come before the sweeps that they belong to."""
    here = _machine()
    found: list[tuple[Path, FolderKind]] = []
    for path in (cache_dir() / "running").glob("*.json"):
        note = read_json(path)
        if note is None or not {"folder", "kind", "host", "boot"} <= note.keys():
            continue
        folder = Path(note["folder"])
        if here["boot"] != note["boot"] and here["host"] != note["host"]:
            continue  # another machine that shares this home folder
        if not is_driven(folder):
            found.append((folder, note["kind"]))
    return sorted(found, key=lambda entry: entry[1])


def forget(folder: Path) -> None:
    """This folder needs no further care."""
    _note_of(folder).unlink(missing_ok=True)
    (folder / DRIVER_LOCK).unlink(missing_ok=True)


def _note_of(folder: Path) -> Path:
    token = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return cache_dir() / "running" / f"{token}.json"


def _machine() -> dict[str, str]:
    """Locks are seen by whoever shares the kernel: the boot names it, and the host says whose older boots are over."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return {"host": socket.gethostname(), "boot": boot}
