"""Wait until no job of a sweep is left with the batch system that runs them.

Submitit stops waiting at the first job that left no result: cancelled, killed with its node, or
never started. It also takes a job for done that Slurm is about to requeue. The other jobs go on,
so the end of a sweep asks Slurm itself. Under submitit's local launcher it asks the kernel.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zinfer.driver.interrupts import Interrupts
from zinfer.driver.terminal import Terminal

POLL_S = 2.0
SILENCE_S = 300.0
"""Longest time that a controller of Slurm may not answer: it may be starting again."""
SQUEUE_S = 60.0
GONE = "invalid job id"
"""Squeue's word for jobs that ended so long ago that Slurm has forgotten them."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """The jobs that submitit has submitted for a sweep."""

    system: Literal["slurm", "local"]
    folder: str
    """Where submitit keeps a folder for each job, named by its id."""

    def submitted(self) -> list[str]:
        """Return the ids of all jobs, in whatever state; of an array of jobs, that of the array."""
        files = Path(self.folder).glob("*/*_submitted.pkl")
        return sorted({path.parent.name.partition("_")[0] for path in files})

    def left(self) -> list[str] | None:
        """Return the jobs that run or wait to run. None: the batch system does not answer."""
        submitted = self.submitted()
        if self.system == "local":
            return [job for job in submitted if _is_local_job(job, self.folder)]
        return _in_slurm(submitted) if submitted else []

    def cancel_waiting(self) -> None:
        """Take the jobs out of Slurm's queue that have not started."""
        submitted = self.submitted()
        if self.system == "slurm" and submitted:
            _answer_of(["scancel", "--quiet", "--state=PENDING", *submitted])


def queue_of(launcher: str, folder: str | None) -> Queue | None:
    """Return the queue of a sweep under this launcher; None where there is none.

    Args:
        launcher: hydra.launcher._target_.
        folder: hydra.launcher.submitit_folder; `%j` in it stands for the id of a job.
    """
    if folder is None or not launcher.startswith("hydra_plugins.hydra_submitit_launcher."):
        return None
    parent = Path(folder.partition("%j")[0] or ".").absolute()
    system: Literal["slurm", "local"] = "slurm" if launcher.endswith("SlurmLauncher") else "local"
    return Queue(system=system, folder=str(parent))


def wait_for_queue(queue: Queue, terminal: Terminal) -> None:
    """Return when none of its jobs is left, at Ctrl-C, or when Slurm has been silent too long."""
    answered_s, looks = time.monotonic(), 0
    while not Interrupts.received:
        left = queue.left()
        if left is not None:
            answered_s = time.monotonic()
            if not left:
                return
            looks += 1
            if looks == 2:  # at the first, Slurm may still be cleaning up after the last one
                terminal.note(_still_there(queue, left) + ". Ctrl-C ends them")
        elif time.monotonic() - answered_s > SILENCE_S:
            terminal.warning(
                f"Slurm has not answered for {SILENCE_S:.0f} s; its jobs may still run: "
                f"squeue --jobs={','.join(queue.submitted())}"
            )
            return
        time.sleep(POLL_S)


def still_queued(queue: Queue) -> str | None:
    """Say which jobs of an earlier start are left with the batch system; None for none."""
    left = queue.left()
    if not left:
        return None
    end = "scancel" if queue.system == "slurm" else "kill"
    return f"{_still_there(queue, left)}. Wait for their end, or end them: {end} {' '.join(left)}"


def _still_there(queue: Queue, left: list[str]) -> str:
    where = "in Slurm's queue" if queue.system == "slurm" else "running"
    return f"{len(left)} of its jobs {'is' if len(left) == 1 else 'are'} still {where}"


def _in_slurm(submitted: list[str]) -> list[str] | None:
    asked = ["squeue", "--noheader", "--array", "--format=%i", "--jobs=" + ",".join(submitted)]
    done = _answer_of(asked)
    if done is None:
        return None
    if done.returncode:
        return [] if GONE in done.stderr.lower() else None
    return done.stdout.split()


def _answer_of(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    """Run a command of Slurm. None: it is not there, or says nothing in time."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=SQUEUE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _is_local_job(job: str, folder: str) -> bool:
    """Return whether submitit's process of that number still works for this folder."""
    try:
        command = Path(f"/proc/{job}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(part.startswith(folder.encode()) for part in command)
