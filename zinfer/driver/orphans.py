"""What a killed driver (SIGKILL, power loss) could not do any more is done at the next start of zinfer, wherever that is.

Its workers are ended, its swap folder is removed, its run is closed in MLflow with the samples that it had got to.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.config import ConfigError, RunConfig, config_from_stored
from zinfer.driver.ending import Watched
from zinfer.driver.terminal import Terminal
from zinfer.driver.workers import signal_group
from zinfer.job.events import EventReader
from zinfer.job.files import (
    ENVIRONMENT_FILE,
    JOB_FILE,
    PARENT_FILE,
    RESULT_FILE,
    SWEEP_FILE,
    WORKERS_FILE,
)
from zinfer.job.folder import abandoned_folders, forget, read_json, write_json
from zinfer.job.outcome import EndedBy, Outcome
from zinfer.job.swap import is_alive, remove_swap_folder, swap_folder
from zinfer.tracking.client import connect, store_errors
from zinfer.tracking.run import TrackedRun
from zinfer.tracking.store import TrackingUnavailable, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

REASON = "the driver was killed"


def close_abandoned(terminal: Terminal) -> None:
    """Care for every folder that a killed driver left on this machine; one sentence for each."""
    for folder, kind in abandoned_folders():
        try:
            if kind == "sweep":
                close_sweep(folder)
            elif not (folder / RESULT_FILE).exists():
                close_job(folder, terminal)
        except TrackingUnavailable as error:
            terminal.warning(
                f"{folder} was left by a driver that was killed, and its run cannot be closed yet: {error}"
            )
            continue
        forget(folder)


def close_job(job_dir: Path, terminal: Terminal) -> Outcome | None:
    """End what is left of one job, and say what it came to. None where the driver had not got to a worker.

    Raises:
        TrackingUnavailable: its run could not be closed.
    """
    end_left_workers(job_dir)
    config = config_of(job_dir)
    if config is None:
        return None
    if config.offload.nvme_path:
        remove_swap_folder(swap_folder(config.offload.nvme_path, job_dir))
    outcome = outcome_of_abandoned(job_dir)
    run_id = close_run(config, job_dir, outcome)
    write_json(job_dir / RESULT_FILE, {**outcome.document(), "run_id": run_id})
    terminal.note(
        f"closed {job_dir}: {outcome.reason}" + (f" (MLflow run {run_id})" if run_id else "")
    )
    return outcome


def config_of(job_dir: Path) -> RunConfig | None:
    """The configuration that the driver stored, if it got that far and this version still reads it."""
    try:
        return config_from_stored(read_json(job_dir / JOB_FILE)["config"])
    except (ConfigError, TypeError, KeyError):
        return None


def end_left_workers(job_dir: Path) -> None:
    """Workers notice within a second that their driver is gone; those that cannot are killed."""
    for worker in read_json(job_dir / WORKERS_FILE) or []:
        if is_alive(worker["pid"], worker["start_ticks"]):
            signal_group(worker["pid"], signal.SIGKILL)


def outcome_of_abandoned(job_dir: Path) -> Outcome:
    """Everything that the worker had reported; a result that was complete stays one."""
    watched = Watched()
    for event in EventReader(job_dir).new_events():
        watched.take(event)
    environment = read_json(job_dir / ENVIRONMENT_FILE)
    common: dict[str, Any] = {"job_dir": str(job_dir), "environment": environment}
    if watched.result is not None:
        return watched.outcome(
            watched.result["status"], metrics=watched.result["metrics"], **common
        )
    return watched.outcome(
        "killed",
        reason=f"{REASON} while in phase {watched.phase}",
        ended_by=EndedBy.DRIVER_KILLED,
        **common,
    )


def close_run(config: RunConfig, job_dir: Path, outcome: Outcome) -> str | None:
    """End the job's run if it is still RUNNING in its store. Returns its id."""
    if config.tracking.store == "none" or not (job_dir / ENVIRONMENT_FILE).exists():
        return None  # the run is created after the environment is stored
    uri = tracking_uri(config.tracking, working_directory(job_dir))
    with store_errors(uri):
        client = connect(uri)
        run_id = open_run_of(client, config, job_dir)
        if run_id is None:
            return None
        environment = read_json(job_dir / ENVIRONMENT_FILE) or {}
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


def open_run_of(client: MlflowClient, config: RunConfig, job_dir: Path) -> str | None:
    """The RUNNING run of this job folder."""
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        return None
    where = f"attributes.status = 'RUNNING' and tags.`zinfer.job_dir` = '{job_dir.absolute()}'"
    runs = client.search_runs([experiment.experiment_id], filter_string=where, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def working_directory(job_dir: Path) -> Path:
    """Where the driver stood: a relative store is relative to it."""
    noted = read_json(job_dir / JOB_FILE) or {}
    return Path(noted.get("working_directory") or Path.cwd())


def close_sweep(sweep_dir: Path) -> None:
    """End the sweep's own run, if one was created."""
    from zinfer.tracking.parent import close_parent

    if (sweep_dir / PARENT_FILE).exists():
        sweep = read_json(sweep_dir / SWEEP_FILE) or {}
        close_parent(sweep_dir / PARENT_FILE, sweep.get("tracking_uri"), "killed")
