"""task=upload: send the runs whose store could not be reached when they ran.

Their files stayed in their job folders.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from zinfer.config import RunConfig
from zinfer.driver.finishing import finish
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.orphans import config_of, environment_in, outcome_in
from zinfer.driver.terminal import Terminal
from zinfer.job.files import NOT_LOGGED_FILE, RESULT_FILE
from zinfer.job.folder import read_job
from zinfer.job.outcome import Outcome
from zinfer.job.records import NotLogged, read_record, read_result, write_json
from zinfer.job.unsent import unsent
from zinfer.tracking.client import connect, store_errors
from zinfer.tracking.deadline import never, within
from zinfer.tracking.run import TrackedRun, open_run
from zinfer.tracking.store import TrackingUnavailable
from zinfer.tracking.uri import resolved_tracking, tracking_uri


def upload_job(
    config: RunConfig,
    job_dir: Path,
    terminal: Terminal,
    *,
    forked: bool = False,
    stopped: Callable[[], bool] = never,
) -> Outcome:
    """Send the runs that are not logged yet, and leave and show how that ended.

    Args:
        forked: of no use here: no worker is started.
        stopped: True leaves what is not sent yet.
    """
    return finish(upload(config, job_dir, terminal, stopped), job_dir, terminal)


def upload(
    config: RunConfig, job_dir: Path, terminal: Terminal, stopped: Callable[[], bool] = never
) -> Outcome:
    """Send every run of this working directory that is not logged yet, to the store named now.

    Their folders may be anywhere. Those of other working directories are only named.
    """
    config = replace(config, tracking=resolved_tracking(config.tracking, terminal.note))
    if config.tracking.store == "none":
        return Outcome(
            status="error",
            reason="tracking=none stores nothing. "
            "Set tracking=sqlite, or tracking=server tracking.uri=...",
        )
    found, sent = unsent(), 0
    folders = found.folders
    for folder in folders:
        try:
            run_id = within(
                config.tracking.timeout_s,
                partial(send, folder, config),
                "the run store",
                lambda: Interrupts.received or stopped(),
            )
        except TrackingUnavailable as error:
            return Outcome(
                status="error",
                reason=f"{sent} of {len(folders)} runs were sent, then: {error}",
                job_dir=str(job_dir),
            )
        if run_id is None:
            terminal.warning(
                f"{folder} has no configuration that this version reads: left as it is"
            )
            continue
        sent += 1
        terminal.note(f"sent {folder} as run {run_id}")
    said = f"{sent} of {len(folders)} runs sent to {tracking_uri(config.tracking, Path.cwd())}"
    said += f"; looked in {', '.join(found.looked_in)} of {Path.cwd()}"
    terminal.note(said)
    for other in found.elsewhere:
        terminal.note(f"{other} has more: cd {shlex.quote(other)} && zinfer task=upload")
    return Outcome(status="ok", reason=said, job_dir=str(job_dir))


def send(folder: Path, config: RunConfig) -> str | None:
    """Log one job folder, into the run that was opened for it if one was. Returns the run's id.

    Raises:
        TrackingUnavailable: the store does not take it; the folder stays as it is.
    """
    record = read_job(folder)
    job = config_of(record)
    result = read_result(folder / RESULT_FILE)
    environment = environment_in(folder)
    if record is None or job is None or result is None or environment is None:
        return None
    if result.get("attempt") != record.attempt:
        return None
    tracking = replace(
        config.tracking,
        experiment=job.tracking.experiment,
        run_name=job.tracking.run_name,
        tags=job.tracking.tags,
    )
    job = replace(job, tracking=tracking, sweep=replace(job.sweep, parent_run_id=None))
    left = read_record(folder / NOT_LOGGED_FILE, NotLogged)
    opened = left.run_id if left is not None else None
    run = _existing(opened, job, folder, environment) if opened else None
    run = run or open_run(
        job, job_dir=folder.absolute(), environment=environment, attempt=record.attempt
    )
    run.finish(outcome_in(folder, record, result))
    write_json(folder / RESULT_FILE, {**result, "run_id": run.run_id})
    (folder / NOT_LOGGED_FILE).unlink()
    return run.run_id


def _existing(
    run_id: str, job: RunConfig, folder: Path, environment: dict[str, object]
) -> TrackedRun | None:
    """Find the run that the job had opened before the store went away, if it is in this store."""
    uri = tracking_uri(job.tracking, Path.cwd())
    with store_errors(uri):
        from mlflow.exceptions import MlflowException

        client = connect(uri, job.tracking.timeout_s)
        try:
            client.get_run(run_id)
        except MlflowException:
            return None
    return TrackedRun(
        run_id=run_id,
        config=job,
        job_dir=folder.absolute(),
        environment=environment,
        uri=uri,
        client=client,
    )
