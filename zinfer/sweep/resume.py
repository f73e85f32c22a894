"""Decide which jobs of a sweep need not run again.

A run stands for a job when everything that decides its numbers is equal: the resolved
configuration without paths, the code, the libraries, the hardware and the method. The run's tag
zinfer.key has all of it. Not reused are runs that were stopped from outside, runs that the machine
disturbed, and, as sweep.retry says, runs that ended badly. A run that did not fit stands as long as
the memory plan says that it does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from zinfer.config import RunConfig
from zinfer.job.files import RESULT_FILE, REUSED_FILE
from zinfer.job.folder import attempt_in
from zinfer.job.outcome import STOPPED_FROM_OUTSIDE, Json
from zinfer.job.records import read_result, write_json
from zinfer.job.unsent import folders_since
from zinfer.machine.disk import filesystem_of
from zinfer.machine.environment import environment
from zinfer.sweep.earlier_runs import EarlierRun, ended_runs
from zinfer.sweep.plan import plan_job
from zinfer.sweep.record import Sweep, SweepJob
from zinfer.tracking.job_key import job_key


def reusable_runs(
    uri: str, experiment: str, *, retry: str, reuse_disturbed: bool
) -> dict[str, EarlierRun]:
    """Return key -> the run that stands for it.

    Args:
        retry: which of the runs that ended badly are run again, as sweep.retry says it.
        reuse_disturbed: whether a run that the machine disturbed stands too.
    """
    return standing(ended_runs(uri, experiment), retry=retry, reuse_disturbed=reuse_disturbed)


def standing(
    runs: Iterable[EarlierRun], *, retry: str, reuse_disturbed: bool
) -> dict[str, EarlierRun]:
    """Return the same of these runs, the newest last.

    A good run is better than a disturbed one, and that is better than one that ended badly.
    """
    found: dict[str, EarlierRun] = {}
    for run in runs:
        before = found.get(run.key)
        if stands(run, retry=retry, reuse_disturbed=reuse_disturbed):
            if before is None or _worth(run) >= _worth(before):
                found[run.key] = run
        elif before is not None and not before.ended_well:
            del found[run.key]
    return found


def _worth(run: EarlierRun) -> int:
    return (1 if run.disturbed else 2) if run.ended_well else 0


def stands(run: EarlierRun, *, retry: str, reuse_disturbed: bool) -> bool:
    """Return whether this run may stand for its job."""
    if run.ended_well:
        return reuse_disturbed or not run.disturbed
    return run.status == "does_not_fit" or not would_retry(run.status, run.ended_by, retry)


def would_retry(status: str, ended_by: str | None, retry: str) -> bool:
    """Return whether a job that ended badly is to be run again.

    One that was interrupted, or whose driver was killed, says nothing about its job: it is run
    again whatever `retry` is.
    """
    if ended_by in STOPPED_FROM_OUTSIDE:
        return True
    return retry == "failed" or (retry == "oom" and status in ("oom_device", "oom_host"))


def with_reused(
    sweep: Sweep, configs: Sequence[RunConfig | None], reusable: dict[str, EarlierRun]
) -> Sweep:
    """Mark the jobs that an earlier run stands for.

    `reusable` keeps the runs that a job of this sweep may find on any machine. Jobs whose run did
    not fit are marked later, by `with_refusals_kept`, when they have been planned.
    """
    if sweep.jobs is None:
        return replace(sweep, reusable=reusable)
    facts = _EnvironmentOnce()
    jobs, heads = [], set()
    for job, config in zip(sweep.jobs, configs, strict=True):
        if config is not None:
            key = job_key(config, facts.of(config))
            heads.add(key.rpartition(".")[0])
            earlier = reusable.get(key) if sweep.local else None
            done = earlier is not None and earlier.status != "does_not_fit"
            job = replace(job, key=key, state="reused" if done else job.state)
        jobs.append(job)
    kept = {key: run for key, run in reusable.items() if key.rpartition(".")[0] in heads}
    return replace(sweep, jobs=jobs, reusable=kept)


def with_refusals_kept(sweep: Sweep) -> Sweep:
    """Reuse the runs that did not fit, where the job's plan says that it still does not."""
    if sweep.jobs is None or not sweep.local:
        return sweep

    def kept(job: SweepJob) -> SweepJob:
        earlier = sweep.reusable.get(str(job.key))
        stands = earlier is not None and job.state == "run" and job.verdict == "does_not_fit"
        return replace(job, state="reused") if stands else job

    return replace(sweep, jobs=[kept(job) for job in sweep.jobs])


def stands_now(earlier: EarlierRun, config: RunConfig) -> bool:
    """Return whether this run stands for a job on this machine, with the memory that it has now."""
    return earlier.status != "does_not_fit" or plan_job(config).verdict == "does_not_fit"


class _EnvironmentOnce:
    """The environment's facts, asked once for each set of devices and file system."""

    def __init__(self) -> None:
        self._known: dict[str, Json] = {}

    def of(self, config: RunConfig) -> Json:
        """Return the facts for this job."""
        nvme_path = config.offload.nvme_folder
        which = f"{config.hardware} {filesystem_of(nvme_path) if nvme_path else None}"
        if which not in self._known:
            self._known[which] = environment(config, nvme_path)
        return self._known[which]


def note_reused(earlier: EarlierRun, job_dir: Path) -> Json:
    """Write reused.json into the job's folder: the run that stands for it, and its numbers.

    What the store says of the run wins. Files are read only where they are that very run's.
    """
    found = _result_of(earlier)
    document: Json = {
        **found,
        "status": earlier.status,
        "reason": earlier.reason,
        "ended_by": earlier.ended_by.value,
        "run_id": earlier.run_id,
        "job_dir": earlier.job_dir,
        "metrics": {**(found.get("metrics") or {}), **earlier.metrics},
        "reused": True,
    }
    with attempt_in(job_dir) as attempt:
        document["attempt"] = attempt
        write_json(job_dir / REUSED_FILE, document)
    return document


def _result_of(earlier: EarlierRun) -> Json:
    """Return the result.json that this run wrote, also where its folder was used again since."""
    if earlier.job_dir is None:
        return {}
    for folder in folders_since(Path(earlier.job_dir)):
        found = read_result(folder / RESULT_FILE) or {}
        if found.get("run_id") == earlier.run_id:
            return found
    return {}
