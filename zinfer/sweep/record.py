"""The record of a sweep: its jobs, their folders, what is reused, and when it has to stop.

SWEEP_DIR/sweep.json has what every process of a sweep must know. Each job that begins adds
SWEEP_DIR/.jobs/NUM.json with the folder that Hydra gave it, and leaves its result in that folder.
So the state is the same under every launcher: jobs in this process, in others, or on other
machines that share the folder. A folder that a sweep uses again keeps nothing of the sweep before:
what it had goes to SWEEP_DIR/earlier/N.

In MLflow the run of the sweep (tag zinfer.role=sweep) names all its jobs, reused ones included:

- The tag `zinfer.jobs` is a JSON list, one entry for each job:
  {"num": 0, "run_id": "32 hexadecimal digits" or null, "state": "run"}
  `state` is run (this sweep ran it), reused (an earlier run stands for it), refused, or not_run.
  A list that exceeds MLflow's limit for a tag goes on in `zinfer.jobs.1`, `zinfer.jobs.2`, ...,
  each a JSON list of its own.
- The artifact sweep.json is the record with {"num", "overrides", "folder", "state", "run_id",
  "status", "reason"} for each job in its field `jobs`.

Runs that this sweep ran also have the tag mlflow.parentRunId; reused runs keep that of the sweep
that ran them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from zinfer.driver.label import as_typed
from zinfer.job.files import JOBS_FOLDER, RESULT_FILE, REUSED_FILE, STOP_FILE, SWEEP_FILE
from zinfer.job.outcome import Json
from zinfer.job.records import read_json, read_result, write_json
from zinfer.sweep.decision import DECIDED, Started
from zinfer.sweep.queue import Queue
from zinfer.sweep.time_left import JobSize

if TYPE_CHECKING:
    from zinfer.sweep.earlier_runs import EarlierRun

SWEEP_VARIABLE = "ZINFER_SWEEP_DIR"
"""Environment variable that tells each job where its sweep's record is."""
SAID_FILE = "said.txt"
"""In JOBS_FOLDER: lines of jobs in other processes, which the sweep's own terminal prints."""

JobState = Literal["run", "reused", "refused"]
"""refused: this configuration cannot run anywhere."""
Verdict = Literal["fits", "does_not_fit", "refused", "unknown"]
"""Of the memory plan, before the job runs."""
Direction = Literal["minimize", "maximize"]
StopReason = Literal["interrupted", "fail_fast"]


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One point of the sweep, before it runs."""

    num: int
    overrides: list[str]
    folder: str
    """Absolute path that Hydra is expected to give it."""
    state: JobState = "run"
    verdict: Verdict = "unknown"
    reason: str | None = None
    """Why it will be refused, or why its verdict is unknown."""
    needed_bytes: dict[str, int] = field(default_factory=dict)
    """Per memory tier."""
    key: str | None = None
    """Key of the run (tracking/job_key.py), where the sweep looked for earlier runs."""
    task: str = "run"
    generations: int = 0
    predicted_s: float | None = None
    work_bytes: float | None = None
    """These three as its plan says them (zinfer.sweep.plan.JobPlan)."""

    @property
    def size(self) -> JobSize:
        """Return what its time is estimated from."""
        return JobSize(task=self.task, predicted_s=self.predicted_s, work_bytes=self.work_bytes)


@dataclass(frozen=True, kw_only=True)
class JobFolder:
    """A job of this attempt at the sweep: one that has begun, wherever it runs."""

    num: int
    folder: Path
    overrides: list[str]
    label: str = ""
    """Its model and the settings that differ."""

    kept: Json | None = None
    """Its result as this process saw it, should the folder be gone."""

    def document(self) -> Json | None:
        """Return its result.json, or its reused.json. None: it has not ended."""
        found = read_result(self.folder / RESULT_FILE) or read_result(self.folder / REUSED_FILE)
        return found or self.kept


class Kept:
    """Jobs and stops that this process has seen, by the attempt, should a folder be gone."""

    jobs: ClassVar[dict[tuple[str, int], JobFolder]] = {}
    stopped: ClassVar[dict[str, StopReason]] = {}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The content of SWEEP_DIR/sweep.json."""

    folder: Path
    attempt: str
    """Random. A job of an earlier sweep in the same folder has another one."""
    command: str
    """The command that goes on with this sweep."""
    output_format: str
    tracking_uri: str | None
    """None with tracking=none."""
    experiment: str
    """MLflow experiment of the jobs."""
    resumes: bool
    """Whether typing the command again reuses what is there: a store, and sweep.resume=true."""
    retry: str
    """sweep.retry."""
    reuse_disturbed: bool = False
    """sweep.reuse_disturbed."""
    fail_fast: bool
    report: bool = True
    """sweep.report."""
    preview: bool
    local: bool
    """Whether its jobs run on this machine, so that keys computed at the start are theirs."""
    in_process: bool
    """Whether its jobs run in the process that started it."""
    forked: bool
    """Whether several jobs follow each other in one process, so that a worker server pays off."""
    queue: Queue | None = None
    """Its jobs with a batch system; None where its launcher runs them without one."""
    direction: Direction | None = None
    """Of a sweeper that searches: which end of sweep.objective it looks for."""
    objective: str = "generated_tokens_per_s"
    """sweep.objective: the metric of a job that such a sweeper is told."""
    started_s: float
    pid: int
    jobs: list[SweepJob] | None
    """None where another sweeper than Hydra's own chooses them one after the other."""
    trials: int | None = None
    """How many jobs such a sweeper will choose; None where it does not say."""
    fixed: list[str] = field(default_factory=list)
    """Where the jobs are not known: the settings that all of them have in common, by name."""
    reusable: dict[str, EarlierRun] = field(default_factory=dict)
    """Key -> earlier run that may stand for a job."""

    def write(self) -> None:
        """Store the sweep's record for its jobs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {**asdict(self), "folder": str(self.folder)}
        write_json(self.folder / SWEEP_FILE, record, private=True)

    def job(self, num: int) -> SweepJob | None:
        """Return the job of that number; None where the jobs are not known beforehand."""
        return next((job for job in self.jobs or [] if job.num == num), None)

    @cached_property
    def swept(self) -> set[str]:
        """Return the overrides that are not the same in all jobs."""
        every = [set(job.overrides) for job in self.jobs or []]
        anywhere: set[str] = set().union(*every)
        return {
            override
            for override in anywhere
            if len(every) == 1 or not all(override in job for job in every)
        }

    def stopped(self) -> StopReason | None:
        """Return why no further job is to start, or None."""
        found: Json = read_json(self.folder / STOP_FILE) or {}
        if found.get("attempt") != self.attempt:
            return Kept.stopped.get(self.attempt)
        return found.get("reason")

    def stop(self, reason: StopReason) -> None:
        """Tell all jobs, in whatever process, that no further one is to start."""
        Kept.stopped[self.attempt] = reason
        with contextlib.suppress(OSError):  # deleted or full: this process knows it anyway
            write_json(self.folder / STOP_FILE, {"reason": reason, "attempt": self.attempt})

    def begin_job(self, num: int, folder: Path, overrides: list[str], label: str = "") -> JobFolder:
        """Record that this job has begun, in the folder that Hydra gave it."""
        job = JobFolder(num=num, folder=folder, overrides=overrides, label=label)
        Kept.jobs[self.attempt, num] = job
        notes = self.folder / JOBS_FOLDER
        note = {"attempt": self.attempt, "folder": str(folder), "overrides": overrides}
        note["label"] = label
        with contextlib.suppress(OSError):  # deleted or full: this process knows it anyway
            notes.mkdir(parents=True, exist_ok=True)
            write_json(notes / f"{num}.json", note, private=True)
        return job

    def end_job(self, job: JobFolder, document: Json) -> None:
        """Keep the job's result in this process too."""
        Kept.jobs[self.attempt, job.num] = replace(job, kept=document)

    def begun(self) -> Iterator[JobFolder]:
        """Yield the jobs of this attempt that have begun, in their order."""
        jobs = {num: job for (attempt, num), job in Kept.jobs.items() if attempt == self.attempt}
        for path in (self.folder / JOBS_FOLDER).glob("[0-9]*.json"):
            note, num = read_json(path), int(path.stem)
            if note is not None and note["attempt"] == self.attempt and num not in jobs:
                folder = Path(note["folder"])
                jobs[num] = JobFolder(
                    num=num, folder=folder, overrides=note["overrides"], label=note["label"]
                )
        yield from (jobs[num] for num in sorted(jobs))

    def varying(self, overrides: Sequence[str]) -> list[str]:
        """Return those of a job's overrides that others do not share; all, if they share all."""
        if self.jobs is None:
            found = [text for text in overrides if text.partition("=")[0] not in self.fixed]
        else:
            found = [override for override in overrides if override in self.swept]
        return [as_typed(override) for override in found or overrides]


def ended_well(document: Json | None) -> bool:
    """Return whether a job with this result.json or reused.json has numbers or a plan."""
    return document is not None and document["status"] in ("ok", "planned")


def read_sweep(folder: Path) -> Sweep | None:
    """Return the sweep of this folder; None where there is none."""
    from zinfer.sweep.earlier_runs import EarlierRun

    stored = read_json(folder / SWEEP_FILE)
    if stored is None:
        return None
    jobs = stored.pop("jobs")
    return Sweep(
        **{
            **stored,
            "folder": Path(stored["folder"]),
            "queue": stored["queue"] and Queue(**stored["queue"]),
            "jobs": None if jobs is None else [SweepJob(**job) for job in jobs],
            "reusable": {key: EarlierRun.read(run) for key, run in stored["reusable"].items()},
        }
    )


def sweep_of_job(sweep_dir: str) -> Sweep | None:
    """Return the sweep that a job belongs to; None where its record was deleted.

    The process that started the sweep writes a deleted record again, and the sweep goes on.

    Args:
        sweep_dir: hydra.sweep.dir as this job has it. Where the setting contains something that is
            swept, the jobs' folders are not below the sweep's own, which the environment names.
    """
    sweep = read_sweep(Path(os.environ.get(SWEEP_VARIABLE) or sweep_dir).absolute())
    decision = DECIDED.get()
    if sweep is None and isinstance(decision, Started):
        sweep = decision.sweep
        with contextlib.suppress(OSError):
            sweep.write()
    return sweep


def started_here(sweep: Sweep) -> bool:
    """Return whether this process started the sweep, and will end it."""
    return sweep.pid == os.getpid()
