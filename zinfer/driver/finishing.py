"""End a job: its result is stored beside it and shown. Imports little, for refusals end so too."""

from __future__ import annotations

from pathlib import Path

from zinfer.driver.refusals import refusal
from zinfer.driver.terminal import Terminal
from zinfer.job.files import RESULT_FILE
from zinfer.job.folder import FolderInUse, attempt_in
from zinfer.job.outcome import Outcome
from zinfer.job.records import write_json


def finish(outcome: Outcome, job_dir: Path, terminal: Terminal) -> Outcome:
    """Store the result beside the job and show it.

    Without an attempt in the folder one is begun: nothing of an earlier one stands beside it.
    """
    try:
        with attempt_in(job_dir) as attempt:
            write_json(job_dir / RESULT_FILE, {**outcome.document(), "attempt": attempt})
    except FolderInUse as error:
        terminal.warning(f"no {RESULT_FILE} was written: {error}")
    except OSError as error:
        terminal.warning(f"{job_dir / RESULT_FILE} was not written: {error}")
    terminal.finish(outcome)
    return outcome


def in_use(error: FolderInUse, job_dir: Path, terminal: Terminal) -> Outcome:
    """Refuse a folder that another zinfer works on, and write nothing into it."""
    outcome = refusal([str(error)], job_dir)
    terminal.finish(outcome)
    return outcome
