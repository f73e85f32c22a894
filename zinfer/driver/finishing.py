"""End a job: its result is stored beside it and shown. Imports little, for refusals end so too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from zinfer.config.tasks import function_named, task_of
from zinfer.driver.refusals import refusal
from zinfer.driver.terminal import Terminal
from zinfer.job.files import RESULT_FILE
from zinfer.job.folder import FolderInUse, attempt_in, end_of
from zinfer.job.folder_state import FolderState
from zinfer.job.left_files import redact_left
from zinfer.job.outcome import Outcome
from zinfer.job.records import write_json
from zinfer.tracking.deadline import never

if TYPE_CHECKING:
    from zinfer.config import RunConfig


def do_task(
    config: RunConfig,
    job_dir: Path,
    terminal: Terminal,
    *,
    forked: bool = False,
    stopped: Callable[[], bool] = never,
) -> Outcome:
    """Do the configuration's task in this folder, whatever task it is.

    Args:
        forked: other jobs follow in this process, so a server may hold their workers' imports.
        stopped: asked again and again; True ends the job as Ctrl-C does.
    """
    command = function_named(task_of(config).command)
    try:
        with attempt_in(job_dir):
            outcome: Outcome = command(config, job_dir, terminal, forked=forked, stopped=stopped)
    except FolderInUse as error:
        return in_use(error, job_dir, terminal)
    return outcome


def finish(outcome: Outcome, job_dir: Path, terminal: Terminal) -> Outcome:
    """Store the result beside the job and show it.

    Without an attempt in the folder one is begun: nothing of an earlier one stands beside it.
    A folder that took the place of the job's is somebody else's: nothing is written into it.
    """
    try:
        with attempt_in(job_dir) as attempt:
            problem = store(outcome, job_dir, attempt)
    except FolderInUse as error:
        problem = str(error)
    except OSError as error:
        problem = f"{job_dir}: {error.strerror}"
    if problem is not None:
        terminal.warning(f"no {RESULT_FILE} was written: {problem}")
    terminal.finish(outcome)
    return outcome


def store(outcome: Outcome, job_dir: Path, attempt: str) -> str | None:
    """Write the job's result.json. Returns the problem where it cannot be written."""
    found = end_of(job_dir)
    if found.state is FolderState.REPLACED:
        return found.problem
    try:
        write_json(job_dir / RESULT_FILE, {**outcome.document(), "attempt": attempt})
        redact_left(job_dir)
    except OSError as error:
        return found.problem or f"{job_dir}: {error.strerror}"
    return None


def in_use(error: FolderInUse, job_dir: Path, terminal: Terminal) -> Outcome:
    """Refuse a folder that another zinfer works on, and write nothing into it."""
    outcome = refusal([str(error)], job_dir)
    terminal.finish(outcome)
    return outcome
