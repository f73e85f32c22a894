"""End a sweep, however it came to its end.

Every job is accounted for in one table or one document. Then come the exit code, the run in MLflow
that holds the jobs together, and what to type to go on.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zinfer.driver.interrupts import Interrupts
from zinfer.driver.orphans import close_abandoned
from zinfer.driver.screen import Screen
from zinfer.driver.terminal import Terminal
from zinfer.driver.workers import Servers
from zinfer.job.files import NOT_LOGGED_FILE
from zinfer.job.folder import is_driven
from zinfer.job.left_files import redact_left
from zinfer.job.outcome import EXIT_CODES, INTERRUPTED, EndedBy, Json, Status
from zinfer.redact import redact
from zinfer.sweep.decision import Decision, NoSweep, Planned, Previewed, Started
from zinfer.sweep.earlier_runs import runs_of_newest_sweep
from zinfer.sweep.queue import wait_for_queue
from zinfer.sweep.record import Sweep, ended_well
from zinfer.sweep.report import report_sweep
from zinfer.sweep.resume import would_retry
from zinfer.sweep.sweepers import best_line
from zinfer.sweep.table import SPARE_OF_RESULTS, reason_of, reasons, result_table
from zinfer.tracking.parent import SweptRun, SweptState

STOP_WAIT_S = 4.0
"""For jobs in other processes that have been told to stop."""

SWEEP_STATUS: dict[int, Status] = {0: "ok", INTERRUPTED: "killed"}
"""Exit code -> status of the sweep's own run; error for all others."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One job at the end of its sweep."""

    num: int
    overrides: list[str]
    folder: Path
    document: Json | None
    """Its result.json or reused.json; None for a job that has neither."""

    @property
    def status(self) -> str:
        """Return the job's status; not_run where it has none."""
        return str(self.document["status"]) if self.document is not None else "not_run"

    @property
    def has_result(self) -> bool:
        """Return whether the job came to an end that says something of it.

        That it does not fit is such an end.
        """
        return ended_well(self.document) or self.status == "does_not_fit"

    @property
    def is_disturbed(self) -> bool:
        """Return whether it has numbers of a machine that did something else meanwhile."""
        stability = (self.document or {}).get("stability") or {}
        return ended_well(self.document) and stability.get("verdict") == "disturbed"

    @property
    def run(self) -> SweptRun:
        """Return its run, as the sweep's own run names it."""
        found = self.document or {}
        state: SweptState = "reused" if found.get("reused") else "run"
        if self.document is None:
            state = "not_run"
        elif self.status == "refused":
            state = "refused"
        return SweptRun(num=self.num, run_id=found.get("run_id"), state=state)


def end(decision: Decision, *, interrupted: bool) -> int:
    """End what the head has decided, and return the exit code."""
    match decision:
        case Planned():
            return decision.exit_code
        case NoSweep():
            return end_refused(decision)
        case Previewed():
            return end_preview(decision.sweep)
        case Started():
            with Interrupts.in_order():
                return end_sweep(decision, interrupted=interrupted)


def end_refused(decision: NoSweep) -> int:
    """Show why there is no sweep."""
    outcome = decision.outcome
    terminal = Terminal(decision.output_format)
    if outcome.traceback is not None:
        terminal.note(outcome.traceback.rstrip())
    terminal.finish(outcome)
    return outcome.exit_code


def end_preview(sweep: Sweep) -> int:
    """Print the jobs. Exit code 0 when every job would run or is there; 2 when one is refused."""
    if sweep.jobs is None:
        note = "hydra.sweeper chooses its jobs one after the other, so there is nothing to preview"
        Terminal(sweep.output_format).note(note)
        return 0
    jobs = []
    for job in sweep.jobs:
        earlier = sweep.reusable.get(str(job.key)) if job.state == "reused" else None
        jobs.append({**asdict(job), "run_id": earlier.run_id if earlier else None})
    if sweep.output_format == "json":
        print(json.dumps(redact({"status": "preview", "jobs": jobs})), flush=True)
    return 2 if any(job.verdict in ("does_not_fit", "refused") for job in sweep.jobs) else 0


def end_sweep(started: Started, *, interrupted: bool) -> int:
    """Account for every job, show it, close the sweep's run, and return the exit code."""
    sweep = started.sweep
    if started.board is not None:
        started.board.close()
    Screen.close()
    terminal = Terminal(sweep.output_format)
    Servers.close()
    if sweep.queue is not None and not interrupted:
        wait_for_queue(sweep.queue, terminal)
        interrupted = Interrupts.received
    if interrupted:
        sweep.stop("interrupted")
        if sweep.queue is not None:
            sweep.queue.cancel_waiting()
        wait_for_jobs(sweep)
    # of jobs whose process a launcher has killed
    close_abandoned(terminal, within_folder=sweep.folder)
    rows = rows_of(sweep)
    code = exit_code(rows, interrupted=interrupted or (sweep.in_process and any_interrupted(rows)))
    if sweep.output_format == "json":
        said = "interrupted" if interrupted else ("ok" if code == 0 else "failed")
        print(json.dumps(redact(document(rows, status=said))), flush=True)
    else:
        table = [(row.num, row.overrides, row.document) for row in rows]
        terminal.table(result_table(sweep, table), SPARE_OF_RESULTS)
        for line in reasons((row.num, reason_of(row.document or {})) for row in rows):
            terminal.line(line, to_out=True)
        if sweep.direction is not None:
            terminal.line(best_line(sweep, table), to_out=True)
        for line in how_to_go_on(sweep, rows, interrupted=interrupted):
            terminal.note(line)
        terminal.note(f"sweep folder {sweep.folder}")
    runs = [row.run for row in rows]
    page = started.parent.end(
        SWEEP_STATUS.get(code, "error"),
        runs,
        record(sweep, rows),
        Interrupts.has_insisted,
        experiment=experiment_of(sweep, runs),
    )
    if page is not None:
        terminal.note(f"to compare them: {page}")
    with contextlib.suppress(OSError):  # the folder was deleted, or is full
        redact_left(sweep.folder)
    if code != INTERRUPTED:
        report_sweep(sweep, runs, terminal)
    started.held.close()
    return code


def experiment_of(sweep: Sweep, runs: Sequence[SweptRun]) -> str | None:
    """Return where the sweep needs a run although no job of it has created one.

    That is a sweep with reused jobs, unless the newest sweep there names just the same runs.
    """
    found = sorted(run.run_id for run in runs if run.run_id is not None)
    if sweep.tracking_uri is None or not any(run.state == "reused" for run in runs):
        return None
    same = runs_of_newest_sweep(sweep.tracking_uri, sweep.experiment) == found
    return None if same else sweep.experiment


def wait_for_jobs(sweep: Sweep) -> None:
    """Wait for jobs in other processes, which end in order when they see that the sweep stopped."""
    deadline_s = time.monotonic() + STOP_WAIT_S
    while time.monotonic() < deadline_s and any(is_driven(job.folder) for job in sweep.begun()):
        time.sleep(0.1)


def rows_of(sweep: Sweep) -> list[Row]:
    """Return every job that was planned, and every one that has begun, in their order."""
    begun = {job.num: job for job in sweep.begun()}
    planned = {job.num: job for job in sweep.jobs or []}
    rows = []
    for num in sorted(begun.keys() | planned.keys()):
        job: Any = begun.get(num) or planned[num]
        rows.append(
            Row(
                num=num,
                overrides=planned[num].overrides if num in planned else job.overrides,
                folder=Path(job.folder),
                document=begun[num].document() if num in begun else None,
            )
        )
    return rows


def exit_code(rows: Sequence[Row], *, interrupted: bool) -> int:
    """Return the sweep's exit code.

    0: every job ended well. 130: interrupted. 2: no job could run at all, as each was refused or
    does not fit. 1: a job failed, was refused, or did not run.
    """
    if interrupted:
        return INTERRUPTED
    if all(ended_well(row.document) for row in rows):
        return 0
    refused = [status for status, code in EXIT_CODES.items() if code == 2]
    return 2 if all(row.status in refused for row in rows) else 1


def any_interrupted(rows: Sequence[Row]) -> bool:
    """Return whether a signal ended a job.

    In a process of its own that is the job's own affair: scancel, or a time limit.
    """
    return any((row.document or {}).get("ended_by") == EndedBy.INTERRUPTED for row in rows)


def document(rows: Sequence[Row], status: str) -> Json:
    """Return what format=json prints of a sweep: the jobs' own documents, in their order."""
    jobs = [
        {"num": row.num, "overrides": row.overrides, **(row.document or {"status": "not_run"})}
        for row in rows
    ]
    return {"status": status, "jobs": jobs}


def record(sweep: Sweep, rows: Sequence[Row]) -> Json:
    """Return the record of the ended sweep, for its run in MLflow."""
    jobs = [
        {
            **asdict(row.run),
            "overrides": row.overrides,
            "folder": str(row.folder),
            "status": row.status,
            "reason": (row.document or {}).get("reason"),
        }
        for row in rows
    ]
    return {"command": sweep.command, "folder": str(sweep.folder), "jobs": jobs}


def how_to_go_on(sweep: Sweep, rows: Sequence[Row], *, interrupted: bool) -> list[str]:
    """Return sentences: what is missing, why, and what the same command would run of it."""
    lines = disturbed_line(sweep, rows)
    missing = [row for row in rows if not row.has_result]
    if not missing:
        return lines
    reason = "interrupted" if interrupted else "ended"
    if not interrupted and sweep.stopped() == "fail_fast":
        reason = "stopped at the first failure"
    lines += [f"{reason} with {len(missing)} of {len(rows)} jobs not done"]
    again = [row for row in missing if would_run_again(row, sweep.retry)]
    refused = sum(row.status == "refused" for row in missing)
    standing = len(missing) - len(again) - refused
    if refused:
        lines.append(f"{refused} refused: correct what their reason names")
    if standing:
        lines.append(
            f"{standing} failed and sweep.retry={sweep.retry} does not run them again. "
            "Set sweep.retry=failed to do so"
        )
    unsent = sum((row.folder / NOT_LOGGED_FILE).exists() for row in rows)
    if unsent:
        lines.append(f"{unsent} not in the store yet. To send them first: zinfer task=upload")
    if again and sweep.resumes and sweep.jobs is not None:
        lines.append(f"To run those {len(again)}, and only those: {sweep.command}")
    elif again and sweep.resumes:
        lines.append(f"To go on: {sweep.command}")
    elif again:
        why = "sweep.resume=false" if sweep.tracking_uri is not None else "tracking=none"
        lines.append(f"To run the whole sweep again ({why} reuses nothing): {sweep.command}")
    return lines


def disturbed_line(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """Say how many results the machine disturbed: the same command measures them again."""
    count = sum(row.is_disturbed for row in rows)
    if not count or sweep.reuse_disturbed or not sweep.resumes:
        return []
    return [
        f"{count} disturbed by what else the machine did. The same command measures them again; "
        "set sweep.reuse_disturbed=true to keep them"
    ]


def would_run_again(row: Row, retry: str) -> bool:
    """Return whether the same command would run this job again."""
    if row.document is None:
        return True
    if row.status == "refused":
        return False
    return would_retry(row.status, row.document.get("ended_by"), retry)
