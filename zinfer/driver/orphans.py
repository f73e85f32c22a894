"""Do what a killed driver (SIGKILL, power loss) could not do, at a later start of zinfer.

Its workers are ended, its swap folder is removed, its run is closed in MLflow with the samples
that it had got to. This happens beside a job, never before it, and never before a plan.
"""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.config import ConfigError, RunConfig, config_from_stored
from zinfer.driver.ending import Watched
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.terminal import Terminal
from zinfer.driver.workers import signal_group
from zinfer.job.events import EventReader
from zinfer.job.files import ENVIRONMENT_FILE, PARENT_FILE, RESULT_FILE, SWEEP_FILE, WORKERS_FILE
from zinfer.job.folder import (
    abandoned_folder_held,
    abandoned_folders,
    forget,
    read_job,
)
from zinfer.job.left_files import redact_left
from zinfer.job.outcome import EndedBy, Json, Outcome
from zinfer.job.processes import is_alive
from zinfer.job.records import (
    JobRecord,
    WorkerRecord,
    read_json,
    read_record,
    read_result,
    write_json,
)
from zinfer.job.swap import remove_swap_folder, swap_folder
from zinfer.tracking.client import connect, store_errors
from zinfer.tracking.deadline import within
from zinfer.tracking.names import ATTEMPT_TAG
from zinfer.tracking.run import TrackedRun
from zinfer.tracking.store import TrackingUnavailable
from zinfer.tracking.uri import tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

REASON = "the driver was killed"
CARE_S = 10.0
"""Longest time that a job spends on others' runs; what is left is for the next start."""


def close_abandoned(terminal: Terminal, *, within_folder: Path | None = None) -> None:
    """Close every folder that a killed driver left on this machine; return a sentence for each.

    Args:
        within_folder: only those inside it.
    """
    folders = [
        (folder, kind)
        for folder, kind in abandoned_folders()
        if within_folder is None or folder.is_relative_to(within_folder.resolve())
    ]
    if not folders:
        return
    left = [folder for folder, _ in folders]

    def care() -> None:
        for folder, kind in folders:
            with abandoned_folder_held(folder) as ours:
                if ours and close_folder(folder, kind, terminal):
                    forget(folder)
            left.remove(folder)

    try:
        within(CARE_S, care, "a store of theirs", Interrupts.has_insisted)
    except TrackingUnavailable as error:
        for folder in left:
            terminal.warning(
                f"{folder} was left by a driver that was killed; it is closed at a later start: "
                f"{error}"
            )


def close_folder(folder: Path, kind: str, terminal: Terminal) -> bool:
    """Close one folder. Return False where its run could not be closed yet, which is said."""
    try:
        if kind == "sweep":
            close_sweep(folder)
        else:
            close_job(folder, terminal)
    except TrackingUnavailable as error:
        terminal.warning(
            f"{folder} was left by a driver that was killed, and its run cannot be closed yet: "
            f"{error}"
        )
        return False
    return True


def close_job(job_dir: Path, terminal: Terminal) -> Outcome | None:
    """End what is left of one job, and say what it came to. None where it got no worker.

    Raises:
        TrackingUnavailable: its run could not be closed.
    """
    end_left_workers(job_dir)
    job = read_job(job_dir)
    config = config_of(job)
    if job is None or config is None:
        return None
    if config.offload.nvme_path:
        remove_swap_folder(swap_folder(config.offload.nvme_path, job.attempt), job_dir)
    stored = read_result(job_dir / RESULT_FILE)
    outcome = outcome_in(job_dir, job, stored) if stored else outcome_of_abandoned(job_dir, job)
    if stored is None:
        write_json(job_dir / RESULT_FILE, {**outcome.document(), "attempt": job.attempt})
    run_id = close_run(config, job_dir, job, outcome)
    if stored is None:
        outcome = replace(outcome, run_id=run_id)
        write_json(job_dir / RESULT_FILE, {**outcome.document(), "attempt": job.attempt})
        terminal.note(
            f"closed {job_dir}: {outcome.reason or outcome.status}"
            + (f" (MLflow run {run_id})" if run_id else "")
        )
    redact_left(job_dir)
    return outcome


def config_of(job: JobRecord | None) -> RunConfig | None:
    """Return the configuration of a job record, if this version still reads it."""
    try:
        return None if job is None else config_from_stored(job.config)
    except ConfigError:
        return None


def end_left_workers(job_dir: Path) -> None:
    """Kill workers that are left. They notice within a second that their driver is gone; or not."""
    for worker in read_record(job_dir / WORKERS_FILE, list[WorkerRecord]) or []:
        if worker.start_ticks is not None and is_alive(worker.pid, worker.start_ticks):
            signal_group(worker.pid, signal.SIGKILL)


def watched_in(job_dir: Path, job: JobRecord) -> Watched:
    """Read everything that the worker of this attempt had reported."""
    watched = Watched()
    for event in EventReader(job_dir, job.attempt).new_events():
        watched.take(event)
    return watched


def outcome_in(job_dir: Path, job: JobRecord, result: Json) -> Outcome:
    """Return the outcome that a job's result.json and its worker's events tell."""
    return watched_in(job_dir, job).outcome(
        result["status"],
        reason=result.get("reason"),
        ended_by=EndedBy(result.get("ended_by", EndedBy.ITSELF)),
        problems=tuple(result.get("problems") or ()),
        metrics=result.get("metrics") or {},
        stability=result.get("stability"),
        energy=result.get("energy"),
        quality=result.get("quality"),
        profile=result.get("profile"),
        weights=result.get("weights"),
        linear=result.get("linear"),
        packed=result.get("packed"),
        environment=environment_in(job_dir),
        job_dir=str(job_dir),
    )


def outcome_of_abandoned(job_dir: Path, job: JobRecord) -> Outcome:
    """Return what a job without a result came to; a result that was complete stays one."""
    watched = watched_in(job_dir, job)
    common: dict[str, Any] = {"job_dir": str(job_dir), "environment": environment_in(job_dir)}
    if watched.result is not None:
        return watched.finished(**common)
    return watched.outcome(
        "killed",
        reason=f"{REASON} while in phase {watched.phase}",
        ended_by=EndedBy.DRIVER_KILLED,
        **common,
    )


def environment_in(job_dir: Path) -> Json | None:
    """Return the attempt's environment.json, if it is a document."""
    found = read_json(job_dir / ENVIRONMENT_FILE)
    return found if isinstance(found, dict) else None


def close_run(config: RunConfig, job_dir: Path, job: JobRecord, outcome: Outcome) -> str | None:
    """End the attempt's run if it is still RUNNING in its store. Returns its id."""
    environment = environment_in(job_dir)
    if config.tracking.store == "none" or environment is None:
        return None  # the run is created after the environment is stored
    uri = tracking_uri(config.tracking, Path(job.working_directory))
    with store_errors(uri):
        client = connect(uri, config.tracking.timeout_s)
        run_id = open_run_of(client, config, job)
        if run_id is None:
            return None
        run = TrackedRun(
            run_id=run_id,
            config=config,
            job_dir=job_dir,
            environment=environment,
            uri=uri,
            client=client,
        )
        run.finish(outcome)
    return run_id


def open_run_of(client: MlflowClient, config: RunConfig, job: JobRecord) -> str | None:
    """Find the RUNNING run of this attempt. Its id is hexadecimal: nothing to quote."""
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None or not job.attempt.isalnum():
        return None
    where = f"attributes.status = 'RUNNING' and tags.`{ATTEMPT_TAG}` = '{job.attempt}'"
    found = client.search_runs([experiment.experiment_id], where, max_results=1)
    return str(found[0].info.run_id) if found else None


def close_sweep(sweep_dir: Path) -> None:
    """End the sweep's own run, if one was created."""
    from zinfer.tracking.parent import close_parent

    if (sweep_dir / PARENT_FILE).exists():
        sweep = read_json(sweep_dir / SWEEP_FILE)
        uri = sweep.get("tracking_uri") if isinstance(sweep, dict) else None
        close_parent(sweep_dir / PARENT_FILE, uri if isinstance(uri, str) else None, "killed")
    redact_left(sweep_dir)
