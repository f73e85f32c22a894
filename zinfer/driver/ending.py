"""Say how a worker ended: by its own last word if it had one, else by what the system says."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zinfer.config import RunConfig
from zinfer.driver.interrupts import WARNINGS
from zinfer.driver.workers import Worker
from zinfer.job.events import Event, EventReader
from zinfer.job.files import EVENTS_FILE, RANK_EVENTS_FILE, WORKER_LOG
from zinfer.job.folder_state import FolderEnd
from zinfer.job.outcome import EndedBy, Outcome, Status
from zinfer.units import MIB, format_bytes

TRACEBACK_LINES = 40
FULL_DISK_BYTES = 4 * MIB
"""A swap disk with less than this left, after a worker failed on it, was full."""
HOST_MEMORY_SIGNS = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc",
    "unable to mmap", "failed to allocate", "resource temporarily unavailable", "memoryerror",
    "mlock",
)  # fmt: skip
"""Words of Python, torch, libstdc++ and DeepSpeed's aio when host memory is used up."""
DISK_SIGNS = {
    "no space left on device": "a disk is full",
    "disk quota exceeded": "the quota of a disk is used up",
    "file_offset + buffer nbytes > file bytes": "a swapped file is shorter than what was written",
    "read error  read_bytes": "a swapped file is shorter than what was written",
    "input/output error": "a disk reports an error",
    "stale file handle": "a network file system lost a file",
    "incomplete metadata, file not fully covered": "a checkpoint file was cut short",
}
"""Words of the kernel, DeepSpeed's aio and safetensors about a disk -> their meaning."""


@dataclass
class Watched:
    """Everything that a worker's events have said so far."""

    attempt: str = ""
    model: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    deepspeed: dict[str, Any] | None = None
    result: Event | None = None
    generated: dict[str, Any] | None = None
    phase: str = "start"
    samples: list[Event] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """Remember one more event."""
        head = ("event", "time_s", "attempt")
        fields = {key: value for key, value in event.items() if key not in head}
        match event["event"]:
            case "planned":
                self.model, self.plan, self.deepspeed = (
                    fields["model"],
                    fields["plan"],
                    fields["deepspeed"],
                )
            case "phase":
                self.phase = fields["name"]
            case "sample":
                self.samples.append(fields)
            case "warning":
                self.warnings.append(fields["message"])
            case "generated":
                self.generated = fields
            case "result":
                self.result = fields

    def finished(self, **fields: Any) -> Outcome:
        """Return the outcome that the worker itself reported as its result."""
        assert self.result is not None, "ask only where there is a result"
        return self.outcome(
            self.result["status"],
            metrics=self.result["metrics"],
            stability=self.result.get("stability"),
            energy=self.result.get("energy"),
            quality=self.result.get("quality"),
            profile=self.result.get("profile"),
            weights=self.result.get("weights"),
            linear=self.result.get("linear"),
            packed=self.result.get("packed"),
            **fields,
        )

    def outcome(self, status: Status, **fields: Any) -> Outcome:
        """Return an outcome with everything that the worker had got to."""
        return Outcome(
            status=status,
            model=self.model,
            plan=self.plan,
            deepspeed=self.deepspeed,
            samples=tuple(self.samples),
            warnings=tuple(self.warnings),
            generated=self.generated,
            **fields,
        )


def oom_kills() -> int:
    """Return how often the kernel has killed for want of memory on this machine.

    Source: oom_kill in /proc/vmstat, Linux 4.13 and later.
    """
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def disk_free_bytes(folder: Path) -> int | None:
    """Return the bytes left for this user on the folder's disk; ask before it is removed."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """Facts that the driver saw while the worker ran."""

    ended_by: EndedBy = EndedBy.ITSELF
    oom_kills: int = 0
    swap_free_bytes: int | None = None
    """On the swap disk when the worker had ended; None without one."""
    interrupted_by: signal.Signals | None = None
    """The signal that the driver got; None where its sweep told it to stop."""
    folder: FolderEnd = field(default_factory=FolderEnd)
    """State of the job's folder when the worker had ended."""


def outcome_of(
    config: RunConfig, job_dir: Path, watched: Watched, worker: Worker, seen: Circumstances
) -> Outcome:
    """Return the truthful outcome of a job whose worker is gone."""
    where = f"while in phase {watched.phase}"
    if watched.result is not None:
        return watched.finished()
    if seen.ended_by is EndedBy.INTERRUPTED:
        reason = f"{_interrupted(seen.interrupted_by)} {where}"
        return watched.outcome("killed", reason=reason, ended_by=seen.ended_by)
    if seen.ended_by is EndedBy.TIMEOUT:
        return watched.outcome(
            "timeout",
            reason=f"not done after launcher.timeout_s={config.launcher.timeout_s:g} {where}",
            ended_by=seen.ended_by,
        )
    log_tail = _log_tail(job_dir)
    returncode = worker.returncode
    rank = config.launcher.node_rank * config.launcher.ranks + (worker.first_failed or 0)
    who = "the worker" if len(worker.ranks) == 1 else f"rank {rank}"
    if returncode < 0:
        status, reason = _of_signal(signal.Signals(-returncode), who, log_tail, config, seen)
        return watched.outcome(status, reason=f"{reason} {where}", traceback=log_tail)
    failures = _failures(job_dir, watched.attempt)
    failed = min(
        failures, key=lambda event: event["time_s"], default=None
    )  # the other ranks fail because of it
    said_nothing = returncode != 0 and rank not in [event["rank"] for event in failures]
    if failed is not None and not said_nothing:
        reason = failed["reason"]
        if failed["status"] == "error":
            cause = _full_disk(config, seen) if _disk_is_full(seen) else None
            reason = f"{cause}: {reason}" if cause else folder_cause(seen.folder, reason)
        return watched.outcome(
            failed["status"],
            reason=reason,
            problems=tuple(failed["problems"]),
            traceback=failed.get("traceback"),
        )
    if returncode == 0 and config.launcher.node_rank > 0:
        return watched.outcome(
            "ok", reason=f"done as node {config.launcher.node_rank}; the results are with node 0"
        )
    reason = f"{who} ended with exit code {returncode} {where} and said nothing"
    if _disk_is_full(seen):
        reason = f"{_full_disk(config, seen)}: {reason}"
    elif seen.folder.problem is not None:
        reason = folder_cause(seen.folder, reason)
    elif (cause := disk_cause(log_tail)) is not None:
        reason = f"{cause}: {reason}"
    return watched.outcome("error", reason=reason, traceback=log_tail)


def _interrupted(sign: signal.Signals | None) -> str:
    """Say who interrupted the job, where that is not the person at the terminal."""
    if sign is None or sign is signal.SIGINT:
        return "interrupted"
    if sign in WARNINGS:
        return f"interrupted by the batch system's time limit or preemption ({sign.name})"
    return f"interrupted by {sign.name}"


def _of_signal(
    sign: signal.Signals, who: str, log_tail: str | None, config: RunConfig, seen: Circumstances
) -> tuple[Status, str]:
    """Return status and reason of a process that was killed, or that aborted in C++."""
    if sign == signal.SIGKILL and seen.oom_kills:
        return "oom_host", f"the kernel ended {who} for want of host memory"
    said = (log_tail or "").lower()
    if sign == signal.SIGABRT and any(hint in said for hint in HOST_MEMORY_SIGNS):
        return "oom_host", f"host memory ran out: {who} aborted"
    if sign in (signal.SIGABRT, signal.SIGBUS) and _disk_is_full(seen):
        return "error", f"{_full_disk(config, seen)}: {who} aborted"
    if sign in (signal.SIGABRT, signal.SIGBUS) and (cause := disk_cause(log_tail)) is not None:
        return "error", f"{cause}: {who} was ended by {sign.name}"
    if sign == signal.SIGBUS:
        return "error", f"a file was cut short while {who} read it, or its disk is gone (SIGBUS)"
    return "killed", f"{who} was ended by {sign.name}"


def folder_cause(folder: FolderEnd, reason: str) -> str:
    """Put what became of the job's folder before the reason that the worker or the system gave."""
    return reason if folder.problem is None else f"{folder.problem}. Seen of it: {reason}"


def disk_cause(log_tail: str | None) -> str | None:
    """Return what the log says of a disk, with the line that says it; None for nothing."""
    for line in reversed((log_tail or "").splitlines()):
        for sign, meaning in DISK_SIGNS.items():
            if sign in line.lower():
                return f"{meaning} ({' '.join(line.split())[:200]})"
    return None


def _disk_is_full(seen: Circumstances) -> bool:
    return seen.swap_free_bytes is not None and seen.swap_free_bytes < FULL_DISK_BYTES


def _full_disk(config: RunConfig, seen: Circumstances) -> str:
    left = format_bytes(seen.swap_free_bytes)
    return f"the disk of offload.nvme_path={config.offload.nvme_path} is full ({left} left)"


def _failures(job_dir: Path, attempt: str) -> list[Event]:
    """Return what each rank of this host reported as its end, with the rank."""
    failures = []
    for path in job_dir.glob(RANK_EVENTS_FILE.format(rank="*")):
        found = re.fullmatch(RANK_EVENTS_FILE.format(rank=r"(\d+)"), path.name)
        failures += _failed_in(job_dir, attempt, path.name, int(found[1]) if found else 0)
    return [*_failed_in(job_dir, attempt, EVENTS_FILE, 0), *failures]


def _failed_in(job_dir: Path, attempt: str, name: str, rank: int) -> list[Event]:
    events = EventReader(job_dir, attempt, name).new_events()
    return [{**event, "rank": rank} for event in events if event["event"] == "failed"]


def _log_tail(job_dir: Path) -> str | None:
    try:
        lines = (job_dir / WORKER_LOG).read_text(errors="replace").splitlines()
    except OSError:
        return None
    return "\n".join(lines[-TRACEBACK_LINES:]) or None
