"""A sweep as a whole: its jobs, which of them are reused, how far it is, when it has to stop.

What every process of a sweep must know is in SWEEP_DIR/sweep.json, and what became of a job in its own folder, so it is the same under
every launcher: jobs in this process, in others, or on other machines that share the folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from zinfer.job.files import STOP_FILE, SWEEP_FILE

if TYPE_CHECKING:
    from zinfer.sweep.resume import EarlierRun


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One point of the sweep, before it runs."""

    num: int
    overrides: list[str]
    state: str = "run"
    """run, reused, or refused: its configuration cannot run anywhere."""
    verdict: str = "unknown"
    """Of the memory plan: fits, does_not_fit, refused, unknown."""
    reason: str | None = None
    needed_bytes: dict[str, int] = field(default_factory=dict)
    key: str | None = None

    @property
    def name(self) -> str:
        return " ".join(self.overrides)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What SWEEP_DIR/sweep.json says."""

    folder: Path
    command: str
    """What to type to go on with it."""
    output_format: str
    tracking_uri: str | None
    """None with tracking=none."""
    fail_fast: bool
    preview: bool
    local: bool
    """Whether its jobs run on this machine: then the keys computed at the start are theirs."""
    in_process: bool
    """Whether its jobs run in the process that started it."""
    forked: bool
    """Whether several jobs follow each other in one process, so that a worker server pays off."""
    started_s: float
    pid: int
    jobs: list[SweepJob] | None
    """None where another sweeper than Hydra's own chooses them one after the other."""
    reusable: dict[str, EarlierRun] = field(default_factory=dict)

    def write(self) -> None:
        """Store it for the jobs."""
        from zinfer.job.folder import write_json

        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SWEEP_FILE, {**asdict(self), "folder": str(self.folder)})

    def job(self, num: int) -> SweepJob | None:
        """The job of that number, where the jobs are known beforehand."""
        return next((job for job in self.jobs or [] if job.num == num), None)

    def swept(self) -> set[str]:
        """The overrides that are not the same in all jobs."""
        every = [set(job.overrides) for job in self.jobs or []]
        anywhere: set[str] = set().union(*every)
        return {
            override
            for override in anywhere
            if len(every) == 1 or not all(override in job for job in every)
        }

    def stopped(self) -> str | None:
        """Why no further job is to start (interrupted, fail_fast), or None."""
        from zinfer.job.folder import read_json

        path = self.folder / STOP_FILE
        return str((read_json(path) or {}).get("reason")) if path.exists() else None

    def stop(self, reason: str) -> None:
        """Tell all jobs, in whatever process."""
        from zinfer.job.folder import write_json

        write_json(self.folder / STOP_FILE, {"reason": reason})

    def folders(self) -> Iterator[tuple[int, Path]]:
        """Number and folder of every job that has one."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name.zfill(9)):
            if path.name.isdigit():
                yield int(path.name), path

    def count(self) -> tuple[int, int]:
        """Jobs that are done, and how many of them did not end well."""
        from zinfer.job.files import RESULT_FILE, REUSED_FILE
        from zinfer.job.folder import read_json

        documents = [
            document
            for _, path in self.folders()
            for name in (RESULT_FILE, REUSED_FILE)
            if (document := read_json(path / name))
        ]
        return len(documents), sum(
            document["status"] not in ("ok", "planned") for document in documents
        )

    def elapsed_s(self) -> float:
        """Since the start."""
        return time.time() - self.started_s


def read_sweep(folder: Path) -> Sweep | None:
    """The sweep of this folder; None where there is none."""
    from zinfer.job.folder import read_json
    from zinfer.sweep.resume import EarlierRun

    stored = read_json(folder / SWEEP_FILE)
    if stored is None:
        return None
    jobs = stored.pop("jobs")
    return Sweep(
        **{
            **stored,
            "folder": Path(stored["folder"]),
            "jobs": None if jobs is None else [SweepJob(**job) for job in jobs],
            "reusable": {key: EarlierRun.read(run) for key, run in stored["reusable"].items()},
        }
    )


def started_here(sweep: Sweep) -> bool:
    """Whether this process started the sweep, and will end it."""
    return sweep.pid == os.getpid()
