"""The folder on local disk that one job swaps weights to, and its removal in every ending."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

PREFIX = "zinfer-swap-"
OWNER_FILE = "owner.json"


def swap_folder(nvme_path: str, job_dir: Path) -> Path:
    """The job's own folder under nvme_path; the same for the driver, the worker and whoever cleans up after both."""
    token = hashlib.sha256(str(job_dir.resolve()).encode()).hexdigest()[:12]
    return Path(nvme_path).expanduser().absolute() / f"{PREFIX}{token}"


def claim_swap_folder(nvme_path: str, job_dir: Path) -> Path:
    """Make the folder and note whose it is.

    Raises:
        OSError: nvme_path cannot be created or written to.
    """
    folder = swap_folder(nvme_path, job_dir)
    folder.mkdir(parents=True, exist_ok=True)
    owner = {
        "pid": os.getpid(),
        "start_ticks": process_start_ticks(os.getpid()),
        "job_dir": str(job_dir.resolve()),
    }
    (folder / OWNER_FILE).write_text(json.dumps(owner))
    return folder


def remove_swap_folder(folder: Path) -> None:
    """Delete the job's folder, and nvme_path itself if it is the job's default folder and empty now."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.name == "swap":
        try:
            folder.parent.rmdir()
        except OSError:
            return  # another job's folder is in it, or it is not ours


def process_start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, which with the pid identifies it; None when there is no such process.

    Source: proc(5), field 22 of /proc/PID/stat.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def is_alive(pid: int, start_ticks: int | None) -> bool:
    """Whether that very process, not a later one with its number, still runs."""
    now = process_start_ticks(pid)
    return now is not None and (start_ticks is None or now == start_ticks)


def remove_orphaned_swap_folders(nvme_path: str) -> list[Path]:
    """Delete folders of jobs whose driver is gone (SIGKILL, power loss); returns what was deleted."""
    removed = []
    for owner_file in Path(nvme_path).expanduser().absolute().glob(f"{PREFIX}*/{OWNER_FILE}"):
        try:
            owner = json.loads(owner_file.read_text())
        except (OSError, ValueError):
            continue
        if not is_alive(int(owner["pid"]), owner.get("start_ticks")):
            remove_swap_folder(owner_file.parent)
            removed.append(owner_file.parent)
    return removed
